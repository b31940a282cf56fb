package handler

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sampan.dev/sampan/internal/spec"
)

// write puts a program in place of another, as package managers do.
func write(t *testing.T, path, script string) {
	t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte("#!/bin/sh\necho asked >>"+path+".asked\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func asked(path string) int {
	text, _ := os.ReadFile(path + ".asked") // absent: never
	return strings.Count(string(text), "asked")
}

func open(t *testing.T, path string) *Handlers {
	h := Open(map[string]string{"builtin": "", "other": path}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	t.Cleanup(h.Close)
	return h
}

func now(t *testing.T, h *Handlers, name string) Report {
	t.Helper()
	r, err := h.Now(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAnswers(t *testing.T) {
	minimal := spec.Minimal()
	for _, tt := range []struct {
		name, script string
		want         spec.Features
		problem      string
	}{
		{name: "everything", script: `echo '{"mountOptions":["ro","rro"],"linux":{"namespaces":["user"],"mountExtensions":{"idmap":{"enabled":true}},
			"seccomp":{"enabled":false},"apparmor":{"enabled":false},"selinux":{"enabled":false}}}'`,
			want: spec.Features{RecursiveReadOnly: true, UserNamespaces: true, IDMappedMounts: true, MountOptions: []string{"ro", "rro"}}},
		{name: "nothing", script: `echo '{}'`, want: minimal},
		{name: "null", script: `echo '{"linux":{"seccomp":{"enabled":null}}}'`, want: minimal},
		{name: "no such command", script: `echo unknown command features >&2; exit 1`, want: minimal, problem: "exit status 1: unknown command features"},
		{name: "no JSON", script: `echo usage: other`, want: minimal, problem: "invalid character"},
		{name: "endless", script: `exec head -c 3000000 /dev/zero`, want: minimal, problem: "invalid character"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "other")
			write(t, path, tt.script)
			got := now(t, open(t, path), "other")
			if diff := cmp.Diff(tt.want, got.Features); diff != "" {
				t.Errorf("features (-want +got):\n%s", diff)
			}
			if tt.problem == "" && got.Problem != "" || !strings.Contains(got.Problem, tt.problem) {
				t.Errorf("problem %q, want %q", got.Problem, tt.problem)
			}
		})
	}
}

// TestAskedOnce: a program is asked again only when it is another one.
func TestAskedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "other")
	write(t, path, `echo '{"mountOptions":["ro"]}'`)
	h := open(t, path)
	for range 20 {
		if now(t, h, "other").Features.RecursiveReadOnly {
			t.Fatal("it can what it does not say")
		}
	}
	if n := asked(path); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
	write(t, path, `echo '{"mountOptions":["rro"]}'`)
	if !now(t, h, "other").Features.RecursiveReadOnly {
		t.Error("the new program was not asked")
	}
	if n := asked(path); n != 2 {
		t.Errorf("asked %d times, want twice", n)
	}
	write(t, path, "exit 1") // mute: that is an answer too
	for range 3 {
		now(t, h, "other")
	}
	if n := asked(path); n != 3 {
		t.Errorf("asked %d times, want three times", n)
	}
}

// TestAbsent: a program that is not there yet is found when it is.
func TestAbsent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "other")
	h := open(t, path)
	if r := now(t, h, "other"); r.Features.RecursiveReadOnly || !strings.Contains(r.Problem, "no such file") {
		t.Errorf("absent: %+v", r)
	}
	write(t, path, `echo '{"mountOptions":["rro"]}'`)
	if r := now(t, h, "other"); !r.Features.RecursiveReadOnly || r.Problem != "" {
		t.Errorf("there now: %+v", r)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if r := now(t, h, "other"); r.Features.RecursiveReadOnly || r.Problem == "" {
		t.Errorf("gone again: %+v", r)
	}
}

// TestLastDoesNotWait: what is known is told while a new program thinks.
func TestLastDoesNotWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "other")
	write(t, path, `echo '{"mountOptions":["rro"]}'`)
	h := open(t, path)
	now(t, h, "other")
	write(t, path, "sleep 1000")
	for range 3 {
		if r, err := h.Last(t.Context(), "other"); err != nil || !r.Features.RecursiveReadOnly {
			t.Errorf("%+v, %v", r, err)
		}
	}
	// Close, at the end of the test, ends the program.
}

func TestBuiltin(t *testing.T) {
	h := open(t, filepath.Join(t.TempDir(), "other"))
	if r := now(t, h, "builtin"); !r.Features.RecursiveReadOnly || r.Problem != "" {
		t.Errorf("%+v", r)
	}
	if _, err := h.Now(t.Context(), "nobody"); err == nil {
		t.Error("a handler that is not configured has features")
	}
	if names := fmt.Sprint(h.Names()); names != "[builtin other]" {
		t.Error(names)
	}
}

// TestRealRuntimes asks what is installed.
func TestRealRuntimes(t *testing.T) {
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(name)
			if err != nil {
				t.Skipf("probe: %v", err)
			}
			r := now(t, open(t, path), "other")
			t.Logf("%+v", r)
			out, err := exec.Command(path, "features").Output()
			if (err != nil) != (r.Problem != "") {
				t.Errorf("problem %q, but by hand: %v", r.Problem, err)
			}
			if says := strings.Contains(string(out), `"rro"`); says != r.Features.RecursiveReadOnly {
				t.Errorf("recursively read-only mounts: %v, it says %v", r.Features.RecursiveReadOnly, says)
			}
			if !r.Features.Seccomp || !r.Features.AppArmor {
				t.Errorf("%+v", r)
			}
		})
	}
}
