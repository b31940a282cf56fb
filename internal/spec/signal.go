package spec

import (
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The kernel's first and last real-time signals as programs may use them: the
// C library keeps the first two for itself.
const (
	sigRTMin unix.Signal = 34
	sigRTMax unix.Signal = 64
)

// criSignals are the signals the CRI names, up to the real-time ones. It has
// names for the same number twice, so it is a list: the first one is the one
// to report.
var criSignals = []struct {
	cri runtimeapi.Signal
	sig unix.Signal
}{
	{runtimeapi.Signal_SIGNAL_SIGABRT, unix.SIGABRT}, {runtimeapi.Signal_SIGNAL_SIGALRM, unix.SIGALRM},
	{runtimeapi.Signal_SIGNAL_SIGBUS, unix.SIGBUS}, {runtimeapi.Signal_SIGNAL_SIGCHLD, unix.SIGCHLD},
	{runtimeapi.Signal_SIGNAL_SIGCLD, unix.SIGCHLD}, {runtimeapi.Signal_SIGNAL_SIGCONT, unix.SIGCONT},
	{runtimeapi.Signal_SIGNAL_SIGFPE, unix.SIGFPE}, {runtimeapi.Signal_SIGNAL_SIGHUP, unix.SIGHUP},
	{runtimeapi.Signal_SIGNAL_SIGILL, unix.SIGILL}, {runtimeapi.Signal_SIGNAL_SIGINT, unix.SIGINT},
	{runtimeapi.Signal_SIGNAL_SIGIO, unix.SIGIO}, {runtimeapi.Signal_SIGNAL_SIGIOT, unix.SIGABRT},
	{runtimeapi.Signal_SIGNAL_SIGKILL, unix.SIGKILL}, {runtimeapi.Signal_SIGNAL_SIGPIPE, unix.SIGPIPE},
	{runtimeapi.Signal_SIGNAL_SIGPOLL, unix.SIGIO}, {runtimeapi.Signal_SIGNAL_SIGPROF, unix.SIGPROF},
	{runtimeapi.Signal_SIGNAL_SIGPWR, unix.SIGPWR}, {runtimeapi.Signal_SIGNAL_SIGQUIT, unix.SIGQUIT},
	{runtimeapi.Signal_SIGNAL_SIGSEGV, unix.SIGSEGV}, {runtimeapi.Signal_SIGNAL_SIGSTKFLT, unix.SIGSTKFLT},
	{runtimeapi.Signal_SIGNAL_SIGSTOP, unix.SIGSTOP}, {runtimeapi.Signal_SIGNAL_SIGSYS, unix.SIGSYS},
	{runtimeapi.Signal_SIGNAL_SIGTERM, unix.SIGTERM}, {runtimeapi.Signal_SIGNAL_SIGTRAP, unix.SIGTRAP},
	{runtimeapi.Signal_SIGNAL_SIGTSTP, unix.SIGTSTP}, {runtimeapi.Signal_SIGNAL_SIGTTIN, unix.SIGTTIN},
	{runtimeapi.Signal_SIGNAL_SIGTTOU, unix.SIGTTOU}, {runtimeapi.Signal_SIGNAL_SIGURG, unix.SIGURG},
	{runtimeapi.Signal_SIGNAL_SIGUSR1, unix.SIGUSR1}, {runtimeapi.Signal_SIGNAL_SIGUSR2, unix.SIGUSR2},
	{runtimeapi.Signal_SIGNAL_SIGVTALRM, unix.SIGVTALRM}, {runtimeapi.Signal_SIGNAL_SIGWINCH, unix.SIGWINCH},
	{runtimeapi.Signal_SIGNAL_SIGXCPU, unix.SIGXCPU}, {runtimeapi.Signal_SIGNAL_SIGXFSZ, unix.SIGXFSZ},
}

// StopSignal returns the signal that asks a container to stop: the container's
// own, else the image's, else SIGTERM.
func StopSignal(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) (unix.Signal, error) {
	if s := c.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		sig, ok := signalByCRI(s)
		if !ok {
			return 0, invalid("stop_signal", s, "there is no such signal", "")
		}
		return sig, nil
	}
	if image.StopSignal == "" {
		return unix.SIGTERM, nil
	}
	sig, ok := signalByName(image.StopSignal)
	if !ok {
		return 0, invalid("image.StopSignal", image.StopSignal, "there is no such signal", "set stop_signal")
	}
	return sig, nil
}

// SignalOf returns the CRI's name of a signal, for a container's status.
func SignalOf(sig unix.Signal) runtimeapi.Signal {
	if sig >= sigRTMin && sig <= sigRTMax {
		return runtimeapi.Signal_SIGNAL_SIGRTMIN + runtimeapi.Signal(sig-sigRTMin)
	}
	for _, s := range criSignals {
		if s.sig == sig {
			return s.cri
		}
	}
	return runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT
}

func signalByCRI(s runtimeapi.Signal) (unix.Signal, bool) {
	if s >= runtimeapi.Signal_SIGNAL_SIGRTMIN && s <= runtimeapi.Signal_SIGNAL_SIGRTMAX {
		return sigRTMin + unix.Signal(s-runtimeapi.Signal_SIGNAL_SIGRTMIN), true
	}
	for _, known := range criSignals {
		if known.cri == s {
			return known.sig, true
		}
	}
	return 0, false
}

// signalByName reads a signal as images name it: "SIGTERM", "term", "15",
// "SIGRTMIN+3", "RTMAX-1".
func signalByName(name string) (unix.Signal, bool) {
	name = strings.ToUpper(strings.TrimSpace(name))
	if n, err := strconv.ParseUint(name, 10, 8); err == nil {
		return unix.Signal(n), n > 0 && unix.Signal(n) <= sigRTMax
	}
	name = strings.TrimPrefix(name, "SIG")
	if sig, ok := realtimeSignal(name); ok {
		return sig, true
	}
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig, true
	}
	return 0, false
}

// realtimeSignal reads "RTMIN", "RTMIN+3", "RTMAX-2".
func realtimeSignal(name string) (unix.Signal, bool) {
	base, offset, hasOffset := sigRTMin, "", false
	switch {
	case strings.HasPrefix(name, "RTMIN"):
		offset, hasOffset = strings.CutPrefix(name[len("RTMIN"):], "+")
	case strings.HasPrefix(name, "RTMAX"):
		base = sigRTMax
		offset, hasOffset = strings.CutPrefix(name[len("RTMAX"):], "-")
	default:
		return 0, false
	}
	if !hasOffset {
		return base, offset == ""
	}
	n, err := strconv.ParseUint(offset, 10, 8)
	if err != nil || n > uint64(sigRTMax-sigRTMin) {
		return 0, false
	}
	if base == sigRTMax {
		return base - unix.Signal(n), true
	}
	return base + unix.Signal(n), true
}
