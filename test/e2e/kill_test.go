package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/test/lab"
)

// TestKill kills one process of Sampan while 20 pods write numbered lines. Every
// container must live, every line must be in the logs exactly once, and every
// exit code must come through.
func TestKill(t *testing.T) {
	t.Run("daemon", func(t *testing.T) {
		testKill(t, func(t *testing.T, l *lab.Lab) {
			l.Kill(t)
			time.Sleep(3 * time.Second) // some containers end while there is no daemon
			l.Start(t)
		})
	})
	for _, role := range []string{"worker", "supervisor"} {
		t.Run(role, func(t *testing.T) {
			testKill(t, func(t *testing.T, l *lab.Lab) { killKeeper(t, l, role) })
		})
	}
}

// killKeeper kills the keeper's one process in a role and waits for another.
func killKeeper(t *testing.T, l *lab.Lab, role string) {
	before := l.Keepers(t, role)
	if len(before) != 1 {
		t.Fatalf("keeper: %d processes are the %s, want 1", len(before), role)
	}
	if err := unix.Kill(before[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(lab.Wait); ; time.Sleep(20 * time.Millisecond) {
		now := l.Keepers(t, role)
		if len(now) == 1 && now[0] != before[0] {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("keeper: a minute after its %s was killed: %v", role, now)
		}
	}
}

// writer is a container that writes numbered lines.
type writer struct {
	id, log string
	lines   int
	code    int32
}

func testKill(t *testing.T, kill func(*testing.T, *lab.Lab)) {
	l := lab.New(t, lab.Options{})
	image := l.Pull(t, "docker.io/sampan/lines")
	var writers []writer
	for i := range 20 {
		podConfig := l.PodConfig(fmt.Sprintf("writer-%d", i))
		w := writer{lines: 1000 + 60*i, code: int32(10 + i), log: filepath.Join(podConfig.LogDirectory, "lines.log")}
		args := []string{"-every=5ms"}
		if i%2 == 1 { // every second one writes 50 longer lines at once
			w.lines *= 50
			args = append(args, "-burst=50", "-width=80")
		}
		args = append(args, fmt.Sprint("-n=", w.lines), fmt.Sprint("-exit=", w.code))
		pod := l.RunPod(t, podConfig)
		w.id = l.CreateContainer(t, pod, podConfig, l.ContainerConfig("lines", image, args...))
		writers = append(writers, w)
	}
	for _, w := range writers {
		l.StartContainer(t, w.id)
	}
	for _, w := range writers {
		awaitFirstLine(t, w.log)
	}
	kill(t, l)
	for _, w := range writers {
		status := l.AwaitExit(t, w.id, 5*lab.Wait)
		if status.GetExitCode() != w.code {
			t.Errorf("%s: exit code %d (%s: %s), want %d", w.log, status.GetExitCode(), status.GetReason(), status.GetMessage(), w.code)
		}
		if err := checkLines(w.log, w.lines); err != nil {
			t.Error(err)
		}
	}
}

func awaitFirstLine(t *testing.T, log string) {
	t.Helper()
	for end := time.Now().Add(lab.Wait); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(log)
		if err == nil && bytes.Contains(text, []byte("\n")) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: no line after %v (%v)", log, lab.Wait, err)
		}
	}
}

// checkLines reads a CRI log and checks that the lines 1 to n are in it, in
// order and each once.
func checkLines(log string, n int) error {
	text, err := os.ReadFile(log)
	if err != nil {
		return err
	}
	var wrong []string
	next, line := 1, ""
	for row := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSuffix(row, "\n"), " ", 4)
		if len(f) != 4 || f[1] != "stdout" || f[2] != "F" && f[2] != "P" {
			return fmt.Errorf("%s: not a line of a CRI log: %q", log, row)
		}
		line += f[3]
		if f[2] == "P" {
			continue
		}
		if want := fmt.Sprintf("line %08d", next); !strings.HasPrefix(line, want) {
			wrong = append(wrong, fmt.Sprintf("%.40q instead of %q", line, want))
			fmt.Sscanf(line, "line %d", &next) //nolint:errcheck // go on from there if it is a number
		}
		next, line = next+1, ""
	}
	if next != n+1 || len(wrong) > 0 {
		return fmt.Errorf("%s: ends with line %d of %d, %d are out of order: %s", log, next-1, n, len(wrong), strings.Join(wrong[:min(3, len(wrong))], ", "))
	}
	return nil
}
