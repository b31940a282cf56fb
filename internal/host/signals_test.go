package host

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestMain lets the test binary stand for a process that inherits ignored signals.
func TestMain(m *testing.M) {
	if os.Getenv("HOST_TEST_SIGNALS") != "" {
		if err := UnignoreSignals(); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		out, err := exec.Command("grep", "SigIgn", "/proc/self/status").Output()
		if err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Stdout.Write(out)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestUnignoreSignals(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, trap := range []string{"", "trap '' HUP INT QUIT USR1 CHLD RTMIN RTMAX; "} {
		cmd := exec.Command("bash", "-c", trap+`exec "$0"`, self)
		cmd.Env = append(os.Environ(), "HOST_TEST_SIGNALS=1")
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != "SigIgn:\t0000000000000000" {
			t.Errorf("%q: a child is born with %q, %v", trap, got, err)
		}
	}
}
