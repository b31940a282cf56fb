// Command registry serves the test images on loopback until it is interrupted,
// and writes the hosts.toml files that send every registry's name to it, to try
// the daemon by hand with the images that the tests use.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"sampan.dev/sampan/test/images"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run() error {
	listen := flag.String("listen", "127.0.0.1:5000", "loopback address to serve on")
	hosts := flag.String("hosts-dir", "", "write hosts.toml files below this directory (for [registry] config_dir)")
	cache := flag.String("cache", ".cache", "where packages and built images are kept")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := images.Build(ctx, *cache)
	if err != nil {
		return err
	}
	handler, err := images.Handler(dir)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	if *hosts != "" {
		if err := images.WriteHosts(*hosts, "http://"+l.Addr().String(), images.Hosts...); err != nil {
			return err
		}
	}
	fmt.Printf("serving on http://%s\n", l.Addr())
	srv := images.Serve(l, handler)
	<-ctx.Done()
	return srv.Close()
}
