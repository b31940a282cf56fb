package builtin_test

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/ociruntime/conformance"
)

// TestExecMeetsEnd kills containers, all processes at once, at every moment of an
// exec. The exec runs, or the container is to blame.
func TestExecMeetsEnd(t *testing.T) {
	lab := conformance.NewLab(t)
	rt := newLaunching(t)
	met := 0
	for delay := time.Duration(0); delay < 6*time.Millisecond; delay += 100 * time.Microsecond {
		c := lab.Run(t, rt, []string{"sleep", "60"})
		ended := make(chan error, 1)
		time.AfterFunc(delay, func() { ended <- rt.Signal(t.Context(), c.Container, unix.SIGKILL, true) })
		_, _, err := c.Exec(c.Process("true"), "")
		if err != nil {
			met++
		}
		if err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("exec in a container that is killed after %v: %v", delay, err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		c.Wait()
		c.Delete()
	}
	t.Logf("%d execs met the end", met)
}
