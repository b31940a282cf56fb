package host

import (
	"errors"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPeekExit(t *testing.T) {
	for script, want := range map[string]unix.WaitStatus{
		"exit 0":        0,
		"exit 7":        7 << 8,
		"kill -TERM $$": unix.WaitStatus(unix.SIGTERM),
	} {
		t.Run(script, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", "read x; "+script)
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			pid := cmd.Process.Pid
			p, err := Identify(pid)
			if err != nil {
				t.Fatal(err)
			}
			h, err := p.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			if got, _, err := PeekExit(Child(pid)); got != 0 || err != nil {
				t.Fatalf("a living child: %d, %v", got, err)
			}
			in.Close()
			if err := h.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			for range 2 { // peeking leaves it there
				for name, c := range map[string]Children{"pid": Child(pid), "pidfd": h.Child()} {
					if got, status, err := PeekExit(c); got != pid || status != want || err != nil {
						t.Fatalf("by %s: %d, %#x, %v; want %#x", name, got, status, err, want)
					}
				}
			}
			if status, ok := p.ZombieStatus(); !ok || status != want {
				t.Fatalf("of the zombie: %#x, %v; want %#x", status, ok, want)
			}
			if err := Reap(h.Child()); err != nil {
				t.Fatal(err)
			}
			if _, _, err := PeekExit(Child(pid)); !errors.Is(err, unix.ECHILD) {
				t.Fatalf("a reaped child: %v", err)
			}
			if err := Reap(Child(pid)); err != nil {
				t.Fatal(err)
			}
		})
	}
}
