package vm_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sampan.dev/sampan/test/lab"
	"sampan.dev/sampan/test/vm"
)

var (
	powerCuts = flag.Int("power.cuts", 0, "how often the power fails; 0 is 8 times if SAMPAN_VM is all, and else skips")
	powerSeed = flag.Uint64("power.seed", 0, "of when the power fails, and of what is done until then; 0 takes one from the clock")
)

// maxWork is how long a machine works at most until its power fails. Its kernel
// writes files' content to the disk after 30 s by itself.
const maxWork = 40 * time.Second

// TestPowerLoss cuts the power of a machine that pulls, runs and removes, and boots
// it again from the same disk, several times. What it looks at each time is in
// test/node.
//
// QEMU hands what the guest writes to its disk to this host's page cache, where it
// outlives QEMU. What is in the guest's own page cache is lost: that is the power
// failure.
func TestPowerLoss(t *testing.T) {
	cuts := *powerCuts
	if cuts == 0 {
		if !everything() {
			t.Skip("neither is SAMPAN_VM all (make test-vm), nor is -power.cuts given")
		}
		cuts = 8
	}
	seed := *powerSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("again: go test ./test/vm -run '^TestPowerLoss$' -v -args -power.cuts=%d -power.seed=%d", cuts, seed)
	s := prepare(t, "./test/node")
	disk := vm.Disk{Path: filepath.Join(t.TempDir(), "root.ext4"), Mount: "/var/lib/sampan"}
	if err := vm.MakeDisk(t.Context(), disk.Path, "1G", ""); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for cut := 1; cut <= cuts && !t.Failed(); cut++ {
		m := s.boot(t, vm.Options{Disks: []vm.Disk{disk}})
		after := time.Duration(rng.Int64N(int64(maxWork)))
		s.cutPower(t, m, after, fmt.Sprintf("-power.seed=%d", rng.Uint64()))
		t.Logf("power failure %d after %v of work", cut, after.Round(time.Millisecond))
	}
	if !t.Failed() {
		m := s.boot(t, vm.Options{Disks: []vm.Disk{disk}})
		runTests(t, m, "./test/node", []string{onNode}, powerArgs("-power.last")...)
	}
}

func powerArgs(more ...string) []string {
	return append([]string{"-test.run=^TestPowerLoss$", "-power.disk=/var/lib/sampan"}, more...)
}

// cutPower lets the machine work for a while, and ends it.
func (s suite) cutPower(t *testing.T, m *vm.VM, after time.Duration, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	works := &watcher{Writer: os.Stdout, text: lab.PowerOn, seen: make(chan struct{})}
	killed := make(chan error, 1)
	go func() {
		select {
		case <-works.seen:
			time.Sleep(after)
		case <-ctx.Done():
		}
		killed <- m.Kill()
	}()
	code, err := m.Run(ctx, testCommand("./test/node", []string{onNode}, powerArgs(args...)...), works)
	if err == nil {
		t.Errorf("the machine's test ended before its power failed, with exit code %d", code)
	}
	cancel()
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if !works.found() {
		t.Errorf("the machine never worked: %v", err)
	}
}

// watcher is an output in which a line is waited for.
type watcher struct {
	io.Writer
	text string

	mu   sync.Mutex
	line []byte
	seen chan struct{} // closed when the line was written
	once bool
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range bytes.SplitAfterSeq(p, []byte("\n")) {
		w.line = append(w.line, c...)
		if !bytes.HasSuffix(c, []byte("\n")) {
			break
		}
		if !w.once && strings.TrimSpace(string(w.line)) == w.text {
			w.once = true
			close(w.seen)
		}
		w.line = w.line[:0]
	}
	return w.Writer.Write(p)
}

func (w *watcher) found() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.once
}
