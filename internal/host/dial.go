package host

import (
	"context"
	"net"
)

// DialInNetNS connects like net.Dialer.DialContext, from within the network
// namespace pinned at path, or from the caller's if path is empty. The address
// must be numeric. The connection can be used on any thread.
func DialInNetNS(ctx context.Context, path, network, address string) (net.Conn, error) {
	var d net.Dialer
	if path == "" {
		return d.DialContext(ctx, network, address)
	}
	var conn net.Conn
	err := InNetNS(path, func() (err error) {
		// A numeric address is connected to by this goroutine, and so this thread.
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}
