//go:build cgo && seccomp

package builtin

import (
	"runtime"
	"sync"
	"testing"
	"unsafe"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestSeccomp installs a compiled profile in a thread and makes system calls there.
func TestSeccomp(t *testing.T) {
	profile, err := seccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}})
	if err != nil {
		t.Fatal(err)
	}
	config, err := specconv.SetupSeccomp(profile)
	if err != nil {
		t.Fatal(err)
	}
	var cache filters
	f, err := cache.of(config)
	if err != nil {
		t.Fatal(err)
	}
	const x32 = 0x40000000
	calls := []struct {
		name   string
		number uintptr
		want   unix.Errno
	}{
		{"getpid, which it allows", unix.SYS_GETPID, 0},
		{"add_key, which it does not", unix.SYS_ADD_KEY, unix.EPERM},
		{"one that is younger than the profile", 100000, unix.ENOSYS},
		{"one of x32 that is", x32 + 100000, unix.ENOSYS},
	}
	got := make([]unix.Errno, len(calls))
	var installed error
	inThread(func() {
		if installed = install(f); installed != nil {
			return
		}
		for i, call := range calls {
			_, _, got[i] = unix.RawSyscall(call.number, 0, 0, 0)
		}
	})
	if installed != nil {
		t.Fatal(installed)
	}
	for i, call := range calls {
		if got[i] != call.want {
			t.Errorf("%s: %v, want %v", call.name, got[i], call.want)
		}
	}
	if again, err := cache.of(config); err != nil || &again.program[0] != &f.program[0] {
		t.Errorf("the same profile is compiled twice (%v)", err)
	}
}

// inThread runs fn in a thread that ends with it.
func inThread(fn func()) {
	var done sync.WaitGroup
	done.Go(func() {
		runtime.LockOSThread() // and never unlocked
		fn()
	})
	done.Wait()
}

func install(f filter) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(f.program) / instructionSize), Filter: (*unix.SockFilter)(unsafe.Pointer(&f.program[0]))}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}
