// Command testbox is what the test images run where Debian's busybox has no
// applet, one program that acts by the name it is called by: pause, pgrep,
// ipcs, lines and nonewprivs. It is static and imports only the standard library.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	if name == "testbox" && len(args) > 0 {
		name, args = args[0], args[1:]
	}
	verbs := map[string]func([]string) (int, error){
		"pause": pause, "pgrep": pgrep, "ipcs": ipcs, "lines": lines, "nonewprivs": nonewprivs,
	}
	verb, ok := verbs[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "testbox: no such verb: %s\n", name)
		os.Exit(127)
	}
	code, err := verb(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(code)
}

// pause waits for SIGTERM or SIGINT.
func pause([]string) (int, error) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	<-c
	return 0, nil
}

// nonewprivs tells whether its set-user-id bit had an effect.
func nonewprivs([]string) (int, error) {
	fmt.Printf("Effective uid: %d\n", os.Geteuid())
	return 0, nil
}

// pgrep prints the pids of the processes whose command name contains args[0].
func pgrep(args []string) (int, error) {
	if len(args) != 1 {
		return 2, fmt.Errorf("want one pattern, got %q", args)
	}
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return 0, err
	}
	code := 1
	for _, path := range comms {
		pid := filepath.Base(filepath.Dir(path))
		comm, err := os.ReadFile(path)
		if err != nil || pid == fmt.Sprint(os.Getpid()) {
			continue // gone meanwhile, or pgrep itself
		}
		if strings.Contains(string(comm), args[0]) {
			fmt.Println(pid)
			code = 0
		}
	}
	return code, nil
}

// ipcs lists the shared memory segments (ipcs -m). Its header has no digits, so
// that a segment's id is found in the output only if the segment is there.
func ipcs([]string) (int, error) {
	segments, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return 0, err
	}
	fmt.Println("key        shmid      owner      bytes")
	rows := strings.Split(strings.TrimSpace(string(segments)), "\n")[1:]
	for _, row := range rows {
		f := strings.Fields(row)
		fmt.Printf("%-10s %-10s %-10s %s\n", f[0], f[1], f[7], f[3])
	}
	return 0, nil
}

// lines writes numbered lines and exits with the code it was given: the log
// tests count that each line came through exactly once.
func lines(args []string) (int, error) {
	set := flag.NewFlagSet("lines", flag.ContinueOnError)
	count := set.Int("n", 1000, "how many lines")
	every := set.Duration("every", 0, "pause between bursts")
	burst := set.Int("burst", 1, "how many lines make a burst")
	width := set.Int("width", 0, "pad each line to this many bytes")
	code := set.Int("exit", 0, "exit code")
	both := set.Bool("both", false, "write every second line to stderr")
	if err := set.Parse(args); err != nil {
		return 2, err
	}
	out := bufio.NewWriterSize(os.Stdout, 64<<10)
	for i := 1; i <= *count; i++ {
		line := fmt.Sprintf("line %08d", i)
		if pad := *width - len(line); pad > 0 {
			line += strings.Repeat("x", pad)
		}
		if *both && i%2 == 0 {
			if _, err := fmt.Fprintln(os.Stderr, line); err != nil {
				return 3, err
			}
			continue
		}
		fmt.Fprintln(out, line)
		if *every > 0 && i%*burst == 0 {
			if err := out.Flush(); err != nil {
				return 3, err
			}
			time.Sleep(*every)
		}
	}
	if err := out.Flush(); err != nil {
		return 3, err
	}
	return *code, nil
}
