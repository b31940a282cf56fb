// Package bench runs `sampan bench` in a lab: on Sampan alone, or on Sampan and on
// Debian's containerd in turn. `make bench` and `make bench-compare` start it.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sampan.dev/sampan/internal/bench"
	"sampan.dev/sampan/test/images"
	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m, fetch) }

// fetch brings in what comes over the network, and what takes long.
func fetch(ctx context.Context, cache string) error {
	if what == "compare" {
		if err := images.Fetch(ctx, cache, "containerd"); err != nil {
			return err
		}
	}
	if what == "" {
		return nil
	}
	_, err := images.BuildLarge(cache)
	return err
}

// What to run: "sampan" or "compare", with further arguments of `sampan bench`,
// and the directory for results.
var (
	what      = os.Getenv("SAMPAN_BENCH")
	arguments = strings.Fields(os.Getenv("SAMPAN_BENCH_ARGS"))
	out       = os.Getenv("SAMPAN_BENCH_OUT")
)

// registryHost is where the large images seem to come from.
const registryHost = "bench.test"

// TestBench measures Sampan.
func TestBench(t *testing.T) {
	if what != "sampan" {
		t.Skip("`make bench` runs this")
	}
	l := newLab(t)
	if err := run(t, l, "bench", append([]string{"--start-command", startCommand(l)}, arguments...)...); err != nil {
		t.Error(err)
	}
}

// TestCompare measures Sampan, and containerd with runc and with crun.
func TestCompare(t *testing.T) {
	if what != "compare" {
		t.Skip("`make bench-compare` runs this")
	}
	l := newLab(t)
	c := startContainerd(t, l)
	// What containerd leaves goes with the lab.
	l.Foreign = regexp.MustCompile(`containerd|cni|veth|runc|crun|k8s\.io|table`)
	args := append([]string{"--start-command", startCommand(l), "--start-command", c.command, "--start-command", c.command}, arguments...)
	args = append(args, "--compare", sampan+"="+l.Socket, "containerd+runc="+c.socket+"#runc", "containerd+crun="+c.socket+"#crun")
	// What others cannot do the tables say; Sampan does everything.
	file := filepath.Join(out, "compare.json")
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	err := run(t, l, "compare", args...)
	results, readErr := bench.Load(file)
	if readErr != nil {
		t.Fatal(errors.Join(err, readErr))
	}
	for _, f := range results.Failures {
		if f.Target == sampan {
			t.Errorf("%s: %s", f.Case, f.Error)
		}
	}
}

// sampan is what tables call Sampan.
const sampan = "Sampan"

// diskSize has room for the large image, packed and unpacked, before and after
// its removal.
const diskSize = 12 << 30

// newLab is a lab with the large images on a disk of its own, whose daemon logs as
// it does in use.
func newLab(t *testing.T) *lab.Lab {
	lab.OwnDisk(t, diskSize)
	l := lab.New(t, lab.Options{LogLevel: "info"})
	cache, err := lab.Cache()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := images.BuildLarge(cache)
	if err != nil {
		t.Fatal(err)
	}
	handler, err := images.Handler(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := images.WriteHosts(l.Hosts, lab.Serve(t, handler), registryHost); err != nil {
		t.Fatal(err)
	}
	return l
}

// startCommand is how the case start starts the lab's daemon anew.
func startCommand(l *lab.Lab) string {
	return fmt.Sprintf("exec %s serve --config %s >>%s 2>&1", os.Getenv(lab.Binary), l.Config(), filepath.Join(l.Dir, "restarted.log"))
}

// run starts `sampan bench` with its output where the test's is, and afterwards
// a daemon of the lab's own again. A case that fails is an error.
func run(t *testing.T, l *lab.Lab, name string, args ...string) error {
	args = append([]string{"bench", "--log-dir", l.Logs(), "--endpoint", l.Socket}, args...)
	for _, image := range []string{images.Layers, images.LargeGzip, images.LargeZstd} {
		args = append(args, "--pull-image", registryHost+"/"+image)
	}
	if out != "" {
		base := filepath.Join(out, name)
		args = append(args, "--output", base+".json", "--report", base+".svg", "--report", base+".md")
	}
	cmd := exec.Command(os.Getenv(lab.Binary), args...)
	cmd.Stdout, cmd.Stderr, cmd.Env = os.Stdout, os.Stderr, l.Env()
	err := cmd.Run()
	if err != nil {
		restarted, _ := os.ReadFile(filepath.Join(l.Dir, "restarted.log"))
		err = fmt.Errorf("sampan %s: %w\n%s", strings.Join(args, " "), err, restarted)
	}
	l.Replace(t)
	return err
}
