package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
)

// Attach connects to the first process of a running container; see
// keeper.Client.Attach.
func (s *Pods) Attach(ctx context.Context, r keeper.AttachRequest) error {
	c, k, err := s.running(ctx, r.ID)
	if err != nil {
		return err
	}
	r.ID = c.ID
	return k.Attach(ctx, r)
}

// ResizeTerminal tells the terminal of a running container how large its window
// is.
func (s *Pods) ResizeTerminal(ctx context.Context, id string, width, height uint16) error {
	c, k, err := s.running(ctx, id)
	if err != nil {
		return err
	}
	return k.Resize(ctx, c.ID, width, height)
}

// Dial connects to a TCP port of a pod, as a process in it would do that asks for
// localhost.
func (s *Pods) Dial(ctx context.Context, id string, port uint16) (net.Conn, error) {
	p, err := s.pod(id)
	if err != nil {
		return nil, err
	}
	st := p.Status()
	if !st.Ready {
		return nil, fmt.Errorf("%v is not ready: %w", p, errdefs.ErrFailedPrecondition)
	}
	var errs []error
	for _, address := range []string{"127.0.0.1", "::1"} {
		conn, err := host.DialInNetNS(ctx, st.NetNS, "tcp", net.JoinHostPort(address, strconv.Itoa(int(port))))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("%v: %w: %w", p, errors.Join(errs...), errdefs.ErrUnavailable)
}
