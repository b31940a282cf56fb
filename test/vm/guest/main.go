// Command guest is the part of the harness inside the virtual machine, in one
// program. As the first process of the initial RAM disk it loads the modules it
// finds there, mounts the disks it is told of on the kernel's command line, and
// hands over to the root file system's own init. Started by that with the
// argument "agent", it does what the host asks for over a virtio port.
package main

import (
	"fmt"
	"os"
)

func main() {
	var err error
	switch {
	case os.Getpid() == 1:
		err = boot()
	case len(os.Args) == 2 && os.Args[1] == "agent":
		err = serve()
	default:
		err = fmt.Errorf("usage: guest agent")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}
