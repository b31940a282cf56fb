// Package apparmor looks after AppArmor profiles: it knows which the kernel has,
// and gives it the one that confines containers which ask for no other.
//
// Containers are put under a profile by their OCI runtime.
package apparmor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/host"
)

const (
	// parseTime bounds a run of the parser.
	parseTime = 30 * time.Second
	// retryTime is how long a failure to load the default profile is taken for
	// granted, so that not every container waits for the next one.
	retryTime = 10 * time.Second
	// maxComplaint bounds what is told of a parser's words, in bytes.
	maxComplaint = 512
)

// Config says where things are. The zero value is a host without AppArmor.
type Config struct {
	Enabled  bool   // in the kernel
	Kernel   string // AppArmor's directory in securityfs
	Policies string // directory of policies and what they include
	Label    string // directory with the security attributes of this process
	Parser   string // name or path of apparmor_parser
	Logger   *slog.Logger
}

// HostConfig is the Config of a host.
func HostConfig(enabled bool, log *slog.Logger) Config {
	return Config{
		Enabled: enabled, Kernel: "/sys/kernel/security/apparmor", Policies: "/etc/apparmor.d",
		Label: "/proc/self/attr", Parser: parser(), Logger: log,
	}
}

// parser finds apparmor_parser also for a daemon that was started with the PATH
// of a user.
func parser() string {
	const name = "apparmor_parser"
	for _, place := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(place); err == nil {
			return path
		}
	}
	return name
}

// AppArmor is that of one host. All methods may be called at once.
type AppArmor struct {
	Config
	turn chan struct{} // held by whoever loads the default profile

	mu     sync.Mutex
	loaded bool      // by this process: the kernel has, or had, the text of this version
	failed error     // the last attempt's
	at     time.Time // of the last failure
}

// New returns the AppArmor of a host.
func New(c Config) *AppArmor {
	return &AppArmor{Config: c, turn: make(chan struct{}, 1)}
}

// ErrDisabled is wrapped by the errors of all methods on a host without AppArmor.
var ErrDisabled = fmt.Errorf("AppArmor is not enabled on this host: %w", errdefs.ErrFailedPrecondition)

// Profile returns the name of a profile that the kernel has. An empty name is the
// default profile, which is loaded if need be. An error says why there is none,
// and what to do.
func (a *AppArmor) Profile(ctx context.Context, name string) (string, error) {
	if !a.Enabled {
		return "", fmt.Errorf("%w; enable it, or use Unconfined", ErrDisabled)
	}
	if name == "" {
		return DefaultProfile, a.provide(ctx)
	}
	return name, a.check(name)
}

// Problem is why the default profile could not be loaded when it was last needed.
func (a *AppArmor) Problem() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

// check returns nil if the kernel has the profile.
func (a *AppArmor) check(name string) error {
	path := filepath.Join(a.Kernel, "profiles")
	list, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is not there; mount securityfs on %s: %w", path, filepath.Dir(a.Kernel), errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("list AppArmor profiles: %w", err)
	}
	for line := range bytes.Lines(list) {
		// NAME (MODE), and a name may have spaces.
		if i := bytes.LastIndex(line, []byte(" (")); i > 0 && string(line[:i]) == name {
			return nil
		}
	}
	return fmt.Errorf("AppArmor profile %q is not loaded; load it with apparmor_parser on this node: %w", name, errdefs.ErrFailedPrecondition)
}

// provide makes sure that the kernel has the default profile, in the text of this
// version: once in the life of this process it replaces what may be there, later
// only what somebody has removed.
func (a *AppArmor) provide(ctx context.Context) error {
	if done, err := a.settled(); done {
		return err
	}
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return fmt.Errorf("load AppArmor profile %s: %w", DefaultProfile, context.Cause(ctx))
	}
	if done, err := a.settled(); done {
		return err // meanwhile
	}
	err := a.load(ctx)
	if err != nil && a.check(DefaultProfile) == nil {
		// Somebody has loaded one by hand, or an earlier daemon has.
		a.Logger.Warn("AppArmor profile stays as it is", "profile", DefaultProfile, "err", err)
		err = nil
	}
	if err == nil {
		err = a.check(DefaultProfile)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.loaded, a.failed = err == nil, err
	if err != nil {
		a.at = time.Now()
		a.Logger.Error("AppArmor profile cannot be loaded: containers that do not ask for it run without", "profile", DefaultProfile, "err", err)
	}
	return err
}

// settled reports whether there is nothing to do, or nothing that would help.
func (a *AppArmor) settled() (bool, error) {
	a.mu.Lock()
	loaded, failed, at := a.loaded, a.failed, a.at
	a.mu.Unlock()
	if loaded && a.check(DefaultProfile) == nil {
		return true, nil
	}
	return failed != nil && time.Since(at) < retryTime, failed
}

// load gives the kernel the profile, in place of the one of this name that it may
// have.
func (a *AppArmor) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, parseTime, fmt.Errorf("no answer in %v", parseTime))
	defer cancel()
	cmd := exec.CommandContext(ctx, a.Parser, "--replace", "--skip-cache", "--quiet")
	cmd.WaitDelay = time.Second
	cmd.Stdin = strings.NewReader(profile(a.abi(), a.label()))
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("load AppArmor profile %s: apparmor_parser is not installed; install the package apparmor: %w", DefaultProfile, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("load AppArmor profile %s: %s: %w: %s", DefaultProfile, filepath.Base(a.Parser), err, firstLine(out))
}

func firstLine(out []byte) string {
	line, _, _ := bytes.Cut(bytes.TrimSpace(out), []byte("\n"))
	return string(line[:min(len(line), maxComplaint)])
}

// abi is the features file to write policies for, if the host has it.
func (a *AppArmor) abi() string {
	const abi = "abi/3.0"
	if _, err := os.Stat(filepath.Join(a.Policies, abi)); err != nil {
		return ""
	}
	return abi
}

// label is what this process is confined by; empty for nothing, and for what could
// not be written in a profile.
func (a *AppArmor) label() string {
	label := readLabel(a.Label)
	if label == "unconfined" || strings.ContainsAny(label, "\"\\\n") {
		return ""
	}
	return label
}

// readLabel reads a process' label, without the mode behind it, from the directory
// of its attributes; empty for a process that is gone, or has none.
func readLabel(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, "apparmor/current"))
	if err != nil { // before Linux 5.8
		text, err = os.ReadFile(filepath.Join(dir, "current"))
	}
	if err != nil {
		return ""
	}
	label := strings.TrimRight(string(text), "\n\x00")
	if i := strings.LastIndex(label, " ("); i > 0 {
		label = label[:i]
	}
	return label
}

// Unload takes the default profile from the kernel of this host, if it has it and
// nobody is confined by it any more: without it, a process would be free.
func Unload() error {
	return New(HostConfig(host.HasAppArmor(), slog.New(slog.DiscardHandler))).unload("/proc")
}

func (a *AppArmor) unload(proc string) error {
	if !a.Enabled || a.check(DefaultProfile) != nil {
		return nil
	}
	labels, err := filepath.Glob(filepath.Join(proc, "[0-9]*/attr"))
	if err != nil {
		return err
	}
	for _, dir := range labels {
		if readLabel(dir) == DefaultProfile {
			return nil // another daemon's container
		}
	}
	if err := os.WriteFile(filepath.Join(a.Kernel, ".remove"), []byte(DefaultProfile), 0); err != nil {
		return fmt.Errorf("unload AppArmor profile %s: %w", DefaultProfile, err)
	}
	return nil
}
