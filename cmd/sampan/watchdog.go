package main

import (
	"context"
	"log/slog"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// watch tells systemd's watchdog that the daemon is well, for as long as it
// answers its own clients, until ctx ends. It does nothing where no watchdog
// waits.
func watch(ctx context.Context, address string, log *slog.Logger) {
	limit, err := sdnotify.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("read the watchdog's settings", "err", err)
	}
	if limit == 0 {
		return
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		log.Error("watchdog", "err", err)
		return
	}
	defer conn.Close()
	// A probe that takes a third of the time leaves room for another.
	tick := time.NewTicker(limit / 3)
	defer tick.Stop()
	for {
		if err := probe(ctx, runtimeapi.NewRuntimeServiceClient(conn), limit/3); err == nil {
			sdnotify.SdNotify(false, sdnotify.SdNotifyWatchdog) //nolint:errcheck // the watchdog notices
		} else if ctx.Err() == nil {
			log.Error("the daemon does not answer itself; systemd will restart it", "err", err, "limit", limit)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// probe makes a call as any client would. The list asks every pod, so that a lock
// that is never given back is found too.
func probe(ctx context.Context, client runtimeapi.RuntimeServiceClient, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	return err
}
