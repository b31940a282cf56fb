package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/config"
)

// maxMessage is the size of message the kubelet accepts.
const maxMessage = 16 << 20

// client is one connection to a CRI runtime.
type client struct {
	runtime runtimeapi.RuntimeServiceClient
	image   runtimeapi.ImageServiceClient
	cc      *grpc.ClientConn
}

// daemon says where a verb finds the daemon and how long it may take.
type daemon struct {
	endpoint string
	timeout  time.Duration
}

// verb makes a client's command: run gets a connection, and a context that
// ends with the timeout.
func (d daemon) verb(cmd *cobra.Command, run func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error) *cobra.Command {
	cmd.Flags().StringVar(&d.endpoint, "endpoint", config.Default().Listen, "socket of the daemon")
	cmd.Flags().DurationVar(&d.timeout, "timeout", d.timeout, "how long to wait, 0 for ever")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		if d.timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, d.timeout)
			defer cancel()
		}
		c, err := connect(d.endpoint)
		if err != nil {
			return err
		}
		defer c.cc.Close()
		return d.explain(run(ctx, c, cmd, args))
	}
	return cmd
}

func connect(endpoint string) (*client, error) {
	if strings.HasPrefix(endpoint, "/") {
		endpoint = "unix://" + endpoint
	}
	if !strings.HasPrefix(endpoint, "unix:///") {
		return nil, fmt.Errorf("endpoint %q: must be a unix socket, like %q", endpoint, config.Default().Listen)
	}
	cc, err := grpc.NewClient(endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", endpoint, err)
	}
	return &client{runtime: runtimeapi.NewRuntimeServiceClient(cc), image: runtimeapi.NewImageServiceClient(cc), cc: cc}, nil
}

// explain says in words what a gRPC status says in codes.
func (d daemon) explain(err error) error {
	if err == nil {
		return nil
	}
	var coded interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &coded) {
		return err
	}
	s := coded.GRPCStatus()
	// What stood before the status in the message is worth keeping.
	prefix, _, _ := strings.Cut(err.Error(), "rpc error:")
	switch {
	case s.Code() == codes.Unavailable && strings.Contains(s.Message(), "connection error"):
		return fmt.Errorf("no daemon answers at %s; start one with `sampan serve` or name its socket with --endpoint (%s)", d.endpoint, dialCause(s.Message()))
	case s.Code() == codes.DeadlineExceeded:
		return fmt.Errorf("%sno answer in %s: %s", prefix, d.timeout, s.Message())
	case s.Code() == codes.Unimplemented:
		return fmt.Errorf("%sthe daemon at %s cannot do this: %s", prefix, d.endpoint, s.Message())
	case s.Code() == codes.Unknown:
		return errors.New(prefix + s.Message())
	}
	return fmt.Errorf("%s%s (%s)", prefix, s.Message(), s.Code())
}

// dialCause cuts gRPC's wrapping off the system's own words.
func dialCause(message string) string {
	if i := strings.LastIndex(message, "connect: "); i >= 0 {
		return strings.TrimRight(message[i+len("connect: "):], `"`)
	}
	return message
}
