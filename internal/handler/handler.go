// Package handler finds out what the OCI runtimes behind the configured handlers
// can do. A runtime's command is asked once, by its `features`, and again when
// another program stands in its place. Nothing else is known of a runtime, least of
// all its version.
package handler

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"syscall"

	"sampan.dev/sampan/internal/spec"
)

// Report is what is known of a handler.
type Report struct {
	Features spec.Features
	Problem  string // why the features are only the minimal ones; empty otherwise
}

// Handlers are all configured handlers. All methods may be called at once.
type Handlers struct {
	all    map[string]*handler
	cancel context.CancelFunc
}

// Open begins to ask the programs of all handlers; programs has their paths by the
// handlers' names, an empty one for the built-in handler. Close ends it.
func Open(programs map[string]string, log *slog.Logger) *Handlers {
	ctx, cancel := context.WithCancel(context.Background())
	h := &Handlers{all: make(map[string]*handler, len(programs)), cancel: cancel}
	for name, path := range programs {
		h.all[name] = &handler{ctx: ctx, path: path, log: log.With("handler", name)}
		if path == "" {
			h.all[name].report = &Report{Features: spec.BuiltinFeatures()}
		}
		h.all[name].look()
	}
	return h
}

// Close ends the asking and waits for its end.
func (h *Handlers) Close() {
	h.cancel()
	for _, one := range h.all {
		one.work.Wait()
	}
}

// Names lists the handlers, sorted.
func (h *Handlers) Names() []string {
	names := make([]string, 0, len(h.all))
	for name := range h.all {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Now returns what is true of the program that stands there now. It waits while a
// new one is asked. An unknown name is ErrNotExist.
func (h *Handlers) Now(ctx context.Context, name string) (Report, error) {
	return h.get(ctx, name, false)
}

// Last returns what is known already, and has it brought up to date for the next
// time. It waits only when nothing has been known before.
func (h *Handlers) Last(ctx context.Context, name string) (Report, error) {
	return h.get(ctx, name, true)
}

func (h *Handlers) get(ctx context.Context, name string, old bool) (Report, error) {
	one, ok := h.all[name]
	if !ok {
		return Report{}, fmt.Errorf("handler %q: %w", name, fs.ErrNotExist)
	}
	if one.path == "" {
		return *one.report, nil
	}
	looked := one.look()
	if r := one.last(); r != nil && old {
		return *r, nil
	}
	select {
	case <-looked:
		return *one.last(), nil
	case <-ctx.Done():
		return Report{}, fmt.Errorf("handler %q: ask %s what it can do: %w", name, one.path, context.Cause(ctx))
	}
}

// handler is one of them.
type handler struct {
	ctx  context.Context // of asking
	path string
	log  *slog.Logger
	work sync.WaitGroup

	mu      sync.Mutex
	program program       // that has given the report
	report  *Report       // nil at first; never changed, but replaced
	looking chan struct{} // closed at the end of the look under way; nil if there is none
}

func (h *handler) last() *Report {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.report
}

// look looks whether the program is still the one that was asked, asks it if it is
// not, and returns what is closed afterwards. A look under way is joined.
func (h *handler) look() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.path == "" {
		return nil
	}
	if h.looking != nil {
		return h.looking
	}
	done := make(chan struct{})
	h.looking = done
	h.work.Go(func() {
		defer close(done)
		h.bringUpToDate()
		h.mu.Lock()
		h.looking = nil
		h.mu.Unlock()
	})
	return done
}

func (h *handler) bringUpToDate() {
	now, err := identify(h.path)
	h.mu.Lock()
	known := h.report != nil && err == nil && h.program == now
	h.mu.Unlock()
	if known {
		return
	}
	report := Report{Features: spec.Minimal()}
	if err == nil {
		var answer []byte
		if answer, err = ask(h.ctx, h.path); err == nil {
			report.Features, err = read(answer)
		}
	}
	if err != nil {
		report = Report{Features: spec.Minimal(), Problem: err.Error()}
	}
	// What may be otherwise the next time is asked again then.
	if err != nil && !errors.Is(err, errMute) {
		now = program{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if report.Problem != "" && (h.report == nil || h.report.Problem != report.Problem) {
		h.log.Info("handler does not say what it can do: it is taken to be able to do little", "err", report.Problem)
	}
	h.program, h.report = now, &report
}

// program tells one program from another that takes its place.
type program struct {
	device, inode uint64
	size          int64
	changed       syscall.Timespec
}

func identify(path string) (program, error) {
	info, err := os.Stat(path)
	if err != nil {
		return program{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return program{}, fmt.Errorf("%s: the file system tells nothing of it", path)
	}
	return program{device: uint64(st.Dev), inode: st.Ino, size: st.Size, changed: st.Ctim}, nil
}

// MarshalJSON is what people get to see of a report.
func (r Report) MarshalJSON() ([]byte, error) {
	f := r.Features
	return json.Marshal(map[string]any{
		"recursiveReadOnlyMounts": f.RecursiveReadOnly, "userNamespaces": f.UserNamespaces, "idMappedMounts": f.IDMappedMounts,
		"seccomp": f.Seccomp, "apparmor": f.AppArmor, "selinux": f.SELinux, "problem": r.Problem,
	})
}
