package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// CRIU is the program that checkpoints and restores processes, if the host has
// one that works on this kernel. It is tried when somebody asks, and again only if
// it is another file then.
type CRIU struct {
	// Path of the program; "" looks for criu in PATH.
	Path string

	mu    sync.Mutex
	tried identity // the file that the following is about
	found Program
	err   error
}

// Program is a program that was found to work.
type Program struct {
	Path    string
	Version string
}

// identity tells one file from another, also from one that has its path later.
type identity struct {
	path     string
	dev, ino uint64
	changed  unix.Timespec
}

// criuTimeout bounds each run of CRIU for a probe.
const criuTimeout = 10 * time.Second

// Check returns the program. The error is ErrNotImplemented if there is none, and
// ErrFailedPrecondition if it does not work here, with what it says about it.
func (c *CRIU) Check(ctx context.Context) (Program, error) {
	path, err := c.look()
	if err != nil {
		return Program{}, fmt.Errorf("criu, which checkpoints and restores processes, is not installed: %w: %w", err, errdefs.ErrNotImplemented)
	}
	id, err := identify(path)
	if err != nil {
		return Program{}, fmt.Errorf("criu: %w: %w", err, errdefs.ErrNotImplemented)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tried != id {
		found, err := tryCRIU(ctx, path)
		if ctx.Err() != nil {
			return Program{}, context.Cause(ctx)
		}
		c.tried, c.found, c.err = id, found, err
	}
	return c.found, c.err
}

func (c *CRIU) look() (string, error) {
	name := c.Path
	if name == "" {
		name = "criu"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

func identify(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return identity{path, st.Dev, st.Ino, st.Ctim}, nil
}

// tryCRIU asks the program for its version and has it check the kernel.
func tryCRIU(ctx context.Context, path string) (Program, error) {
	out, err := runCRIU(ctx, path, "--version")
	if err != nil {
		return Program{}, fmt.Errorf("%s --version: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	// Version: 4.1.1
	_, version, _ := strings.Cut(out, "Version:")
	version, _, _ = strings.Cut(strings.TrimSpace(version), "\n")
	if _, err := runCRIU(ctx, path, "check"); err != nil {
		return Program{}, fmt.Errorf("%s %s does not work on this kernel, a newer one may: %w: %w", path, version, err, errdefs.ErrFailedPrecondition)
	}
	return Program{Path: path, Version: version}, nil
}

func runCRIU(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, criuTimeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir, cmd.Env = "/", os.Environ()
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if said, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n"); said != "" {
			err = errors.New(said)
		}
		return "", err
	}
	return stdout.String(), nil
}
