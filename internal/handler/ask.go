package handler

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"

	"sampan.dev/sampan/internal/spec"
)

const (
	// askTime bounds how long a program may take to answer.
	askTime = 10 * time.Second
	// maxAnswer bounds how much it may say, in bytes.
	maxAnswer = 1 << 20
)

// errMute is the error of a program that cannot say what it can do, which will
// not change while it is the same program.
var errMute = errors.New("it does not say what it can do")

// ask runs `PATH features`.
func ask(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, askTime, fmt.Errorf("no answer in %v", askTime))
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "features")
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, complaints := limited{max: maxAnswer}, limited{max: 1 << 10}
	cmd.Stdout, cmd.Stderr = &out, &complaints

	// The death signal is that of the thread that starts the command.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return out.Bytes(), nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s features: %w", path, context.Cause(ctx))
	case errors.As(err, &exit):
		return nil, fmt.Errorf("%s features: %w: %w: %s", path, errMute, err, strings.TrimSpace(complaints.String()))
	}
	return nil, fmt.Errorf("%s features: %w", path, err)
}

// read makes Features of an answer. What the answer leaves out is not known, and
// counts as in spec.Minimal.
func read(answer []byte) (spec.Features, error) {
	var said features.Features
	if err := json.Unmarshal(answer, &said); err != nil {
		return spec.Features{}, fmt.Errorf("features: %w: %w", errMute, err)
	}
	f := spec.Minimal()
	f.MountOptions = said.MountOptions
	f.RecursiveReadOnly = slices.Contains(said.MountOptions, "rro")
	linux := said.Linux
	if linux == nil {
		return f, nil
	}
	f.UserNamespaces = slices.Contains(linux.Namespaces, string(specs.UserNamespace))
	if m := linux.MountExtensions; m != nil && m.IDMap != nil {
		f.IDMappedMounts = is(m.IDMap.Enabled, false)
	}
	if linux.Seccomp != nil {
		f.Seccomp = is(linux.Seccomp.Enabled, f.Seccomp)
	}
	if linux.Apparmor != nil {
		f.AppArmor = is(linux.Apparmor.Enabled, f.AppArmor)
	}
	if linux.Selinux != nil {
		f.SELinux = is(linux.Selinux.Enabled, f.SELinux)
	}
	return f, nil
}

func is(said *bool, otherwise bool) bool {
	if said == nil {
		return otherwise
	}
	return *said
}

// limited is a buffer that forgets what exceeds max.
type limited struct {
	bytes.Buffer
	max int
}

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, l.max-l.Len()))])
	return len(p), nil
}
