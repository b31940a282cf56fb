package host

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernelSigaction is struct kernel_sigaction: what rt_sigaction(2) takes, on all
// of the 64-bit architectures. Package os/signal cannot tell the kernel's default
// action from one that the Go runtime does not know.
type kernelSigaction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

const (
	sigDefault = 0
	sigIgnored = 1
	lastSignal = 64
)

// UnignoreSignals gives every signal that whoever started this process has made
// it ignore its default action. Ignored signals are inherited across exec: those
// of a shell's background job, of nohup, or of a library's spawn would be ignored
// by every container too. Call it before os/signal is used.
func UnignoreSignals() error {
	for sig := range uintptr(lastSignal + 1) {
		if sig == 0 || sig == uintptr(unix.SIGKILL) || sig == uintptr(unix.SIGSTOP) {
			continue
		}
		var a kernelSigaction
		if err := rtSigaction(sig, nil, &a); err != nil {
			return fmt.Errorf("look at signal %d: %w", sig, err)
		}
		if a.handler != sigIgnored {
			continue
		}
		if err := rtSigaction(sig, &kernelSigaction{handler: sigDefault}, nil); err != nil {
			return fmt.Errorf("reset signal %d: %w", sig, err)
		}
	}
	return nil
}

func rtSigaction(sig uintptr, set, old *kernelSigaction) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(old)), unsafe.Sizeof(set.mask), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
