package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// plugins runs plugins for libcni: in a process group of their own, so that
// those that do not finish in time are killed with all they started.
type plugins struct {
	version.PluginDecoder
	netns string // the namespace they run in, or empty for the process's own
	dirs  []string
}

var _ invoke.Exec = (*plugins)(nil)

// FindInPath implements invoke.Exec.
func (p *plugins) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// A plugin that is just being installed cannot be run for a moment.
const (
	busyTries = 5
	busyPause = 200 * time.Millisecond
)

// ExecPlugin implements invoke.Exec.
func (p *plugins) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	for try := 1; ; try++ {
		stdout, err := p.run(ctx, path, stdin, environ)
		if !errors.Is(err, unix.ETXTBSY) || try == busyTries {
			return stdout, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(busyPause):
		}
	}
}

func (p *plugins) run(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second // what the plugin started may hold its output open

	run := cmd.Run
	if p.netns != "" {
		run = func() error { return host.InNetNS(p.netns, cmd.Run) }
	}
	err := run()
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("plugin %s was killed: %w", filepath.Base(path), ctx.Err())
	case errors.Is(err, exec.ErrWaitDelay) || err == nil:
		return stdout.Bytes(), nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return nil, err
	}
	return nil, pluginError(err, stdout.Bytes(), stderr.String())
}

// pluginError is the error a plugin reports on its standard output, or what it
// left instead.
func pluginError(err error, stdout []byte, stderr string) error {
	reported := &types.Error{}
	if json.Unmarshal(stdout, reported) == nil && reported.Msg != "" {
		return reported
	}
	const enough = 1024
	said := strings.TrimSpace(stderr)
	if said == "" {
		said = strings.TrimSpace(string(stdout))
	}
	if said == "" {
		return err
	}
	return fmt.Errorf("%w: %.*q", err, enough, said)
}

// loopbackUp runs in a pod's namespace.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	return nil
}
