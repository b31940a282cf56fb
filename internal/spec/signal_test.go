package spec

import (
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestStopSignal(t *testing.T) {
	for _, tt := range []struct {
		own   runtimeapi.Signal
		image string
		want  unix.Signal
		err   string
	}{
		{want: unix.SIGTERM},
		{image: "SIGQUIT", want: unix.SIGQUIT},
		{image: "quit", want: unix.SIGQUIT},
		{image: "3", want: unix.SIGQUIT},
		{image: " SIGUSR1 ", want: unix.SIGUSR1},
		{image: "SIGRTMIN+3", want: 37},
		{image: "RTMIN", want: 34},
		{image: "SIGRTMAX", want: 64},
		{image: "SIGRTMAX-14", want: 50},
		{own: runtimeapi.Signal_SIGNAL_SIGUSR1, image: "SIGQUIT", want: unix.SIGUSR1},
		{own: runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, want: 37},
		{own: runtimeapi.Signal_SIGNAL_SIGRTMAX, want: 64},
		{own: runtimeapi.Signal_SIGNAL_SIGTERM, image: "no signal at all", want: unix.SIGTERM},

		{image: "SIGFOO", err: `image.StopSignal: "SIGFOO": there is no such signal; set stop_signal`},
		{image: "0", err: "no such signal"},
		{image: "65", err: "no such signal"},
		{image: "-1", err: "no such signal"},
		{image: "SIGRTMIN+31", err: "no such signal"},
		{image: "SIGRTMIN-1", err: "no such signal"},
		{image: "SIGRTMAX+1", err: "no such signal"},
		{image: "SIG", err: "no such signal"},
		{own: 99, err: "stop_signal"},
	} {
		got, err := StopSignal(&runtimeapi.ContainerConfig{StopSignal: tt.own}, ocispec.ImageConfig{StopSignal: tt.image})
		if tt.err != "" {
			wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("container %v, image %q: %v, %v, want %v", tt.own, tt.image, got, err, tt.want)
		}
	}
}

// TestEverySignalOfTheCRI: each name is known, and what is reported for a
// signal stands for the same signal.
func TestEverySignalOfTheCRI(t *testing.T) {
	for value, name := range runtimeapi.Signal_name {
		s := runtimeapi.Signal(value)
		if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		sig, ok := signalByCRI(s)
		if !ok {
			t.Errorf("%s is not known", name)
			continue
		}
		if again, ok := signalByCRI(SignalOf(sig)); !ok || again != sig {
			t.Errorf("%s is signal %d, reported as %v", name, sig, SignalOf(sig))
		}
	}
}

func FuzzStopSignal(f *testing.F) {
	for _, s := range []string{"SIGTERM", "15", "rtmin+3", "SIGRTMAX-0", "SIGRTMIN+", "+15"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		sig, err := StopSignal(nil, ocispec.ImageConfig{StopSignal: name})
		if err == nil && (sig < 1 || sig > sigRTMax) {
			t.Errorf("%q is signal %d", name, sig)
		}
	})
}
