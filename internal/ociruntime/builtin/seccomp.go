//go:build cgo && seccomp

package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// compileSeccomp makes of a profile the flags and the instructions that the
// kernel takes: libseccomp's, behind some that let system calls be unknown
// (ENOSYS) which are younger than the profile, so that programs try older ones
// instead of giving up (EPERM).
func compileSeccomp(c *configs.Seccomp) (flags uint, program []byte, err error) {
	defaultAction, err := seccompAction(c.DefaultAction, c.DefaultErrnoRet)
	if err != nil {
		return 0, nil, err
	}
	filter, err := seccomp.NewFilter(defaultAction)
	if err != nil {
		return 0, nil, fmt.Errorf("seccomp: new filter: %w", err)
	}
	defer filter.Release()
	for _, name := range c.Architectures {
		arch, err := seccomp.GetArchFromString(name)
		if err == nil {
			err = filter.AddArch(arch)
		}
		if err != nil {
			return 0, nil, fmt.Errorf("seccomp: architecture %s: %w", name, err)
		}
	}
	if err := filter.SetNoNewPrivsBit(false); err != nil {
		return 0, nil, fmt.Errorf("seccomp: %w", err)
	}
	// A tree of system calls instead of a list. libseccomp cannot make one of none.
	if len(c.Syscalls) > 32 {
		_ = filter.SetOptimize(2) // slower without
	}
	for _, call := range c.Syscalls {
		if err := addSeccompRule(filter, call, defaultAction); err != nil {
			return 0, nil, fmt.Errorf("seccomp: system call %s: %w", call.Name, err)
		}
	}
	if program, err = exportFilter(filter); err != nil {
		return 0, nil, fmt.Errorf("seccomp: %w", err)
	}
	stub, err := unknownCalls(c)
	if err != nil {
		return 0, nil, fmt.Errorf("seccomp: %w", err)
	}
	program = append(stub, program...)
	if n := len(program) / instructionSize; n > maxInstructions {
		return 0, nil, fmt.Errorf("seccomp: the profile makes %d instructions, the kernel takes %d", n, maxInstructions)
	}
	return seccompFlags(c.Flags), program, nil
}

const (
	instructionSize = 8
	maxInstructions = 4096 // BPF_MAXINSNS
)

func seccompFlags(names []specs.LinuxSeccompFlag) (flags uint) {
	for _, name := range names {
		switch name {
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		}
	}
	return flags
}

func seccompAction(a configs.Action, errno *uint) (seccomp.ScmpAction, error) {
	code := int16(unix.EPERM)
	if errno != nil {
		code = int16(*errno)
	}
	switch a {
	case configs.Kill, configs.KillThread:
		return seccomp.ActKillThread, nil
	case configs.KillProcess:
		return seccomp.ActKillProcess, nil
	case configs.Trap:
		return seccomp.ActTrap, nil
	case configs.Errno:
		return seccomp.ActErrno.SetReturnCode(code), nil
	case configs.Trace:
		return seccomp.ActTrace.SetReturnCode(code), nil
	case configs.Log:
		return seccomp.ActLog, nil
	case configs.Allow:
		return seccomp.ActAllow, nil
	}
	return seccomp.ActInvalid, fmt.Errorf("seccomp: no such action: %d", a)
}

var seccompOperators = map[configs.Operator]seccomp.ScmpCompareOp{
	configs.EqualTo:              seccomp.CompareEqual,
	configs.NotEqualTo:           seccomp.CompareNotEqual,
	configs.GreaterThan:          seccomp.CompareGreater,
	configs.GreaterThanOrEqualTo: seccomp.CompareGreaterEqual,
	configs.LessThan:             seccomp.CompareLess,
	configs.LessThanOrEqualTo:    seccomp.CompareLessOrEqual,
	configs.MaskEqualTo:          seccomp.CompareMaskedEqual,
}

func addSeccompRule(filter *seccomp.ScmpFilter, call *configs.Syscall, defaultAction seccomp.ScmpAction) error {
	action, err := seccompAction(call.Action, call.ErrnoRet)
	if err != nil || action == defaultAction {
		return err
	}
	number, err := seccomp.GetSyscallFromName(call.Name)
	if err != nil {
		return nil // unknown to libseccomp: profiles name what other machines have
	}
	if len(call.Args) == 0 {
		return filter.AddRule(number, action)
	}
	var conditions []seccomp.ScmpCondition
	var used [6]int
	for _, arg := range call.Args {
		condition, err := seccomp.MakeCondition(arg.Index, seccompOperators[arg.Op], arg.Value, arg.ValueTwo)
		if err != nil {
			return err
		}
		conditions = append(conditions, condition)
		used[arg.Index]++
	}
	// Conditions of one rule hold all together, but libseccomp takes one for each
	// argument: where there are more, any of all is enough. So does runc.
	if max(used[0], used[1], used[2], used[3], used[4], used[5]) <= 1 {
		return filter.AddRuleConditional(number, action, conditions)
	}
	for _, condition := range conditions {
		if err := filter.AddRuleConditional(number, action, []seccomp.ScmpCondition{condition}); err != nil {
			return err
		}
	}
	return nil
}

// exportFilter returns libseccomp's instructions.
func exportFilter(filter *seccomp.ScmpFilter) ([]byte, error) {
	fd, err := unix.MemfdCreate("seccomp", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "seccomp")
	defer f.Close()
	if err := filter.ExportBPF(f); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}

// Instructions of classic BPF, and what they look at: struct seccomp_data.
const (
	loadWord    = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jumpEqual   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpGreater = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	jumpAtLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	giveBack    = unix.BPF_RET | unix.BPF_K

	offsetNumber = 0
	offsetArch   = 4

	// x32Bit is what system calls of the x32 ABI have in addition.
	x32Bit = 0x40000000
)

// auditArches are the architectures that profiles can name here, as the kernel
// names them. x32 is x86_64 with another range of numbers.
var auditArches = map[seccomp.ScmpArch]uint32{
	seccomp.ArchAMD64: unix.AUDIT_ARCH_X86_64,
	seccomp.ArchX32:   unix.AUDIT_ARCH_X86_64,
	seccomp.ArchX86:   unix.AUDIT_ARCH_I386,
	seccomp.ArchARM64: unix.AUDIT_ARCH_AARCH64,
	seccomp.ArchARM:   unix.AUDIT_ARCH_ARM,
}

// unknownCalls returns instructions that have system calls fail with ENOSYS whose
// number is above all that the profile names, and let the rest pass on.
func unknownCalls(c *configs.Seccomp) ([]byte, error) {
	switch {
	case c.DefaultAction == configs.Allow, c.DefaultAction == configs.Log, c.DefaultAction == configs.Trace:
		return nil, nil
	case c.DefaultErrnoRet != nil && *c.DefaultErrnoRet == uint(unix.ENOSYS):
		return nil, nil
	}
	native, err := seccomp.GetNativeArch()
	if err != nil {
		return nil, err
	}
	names := map[seccomp.ScmpArch]bool{native: true}
	for _, name := range c.Architectures {
		arch, err := seccomp.GetArchFromString(name)
		if err != nil {
			return nil, err
		}
		names[arch] = true
	}
	var program []byte
	for _, arch := range []seccomp.ScmpArch{seccomp.ArchAMD64, seccomp.ArchX32, seccomp.ArchX86, seccomp.ArchARM64, seccomp.ArchARM} {
		if !names[arch] {
			continue
		}
		delete(names, arch)
		if last := lastCall(c, arch); last > 0 {
			program = append(program, unknownCallsOf(arch, last)...)
		}
	}
	if len(names) > 0 {
		return nil, errors.New("an architecture is not known")
	}
	return program, nil
}

// lastCall is the largest number of those that the profile names; 0 if it names none.
func lastCall(c *configs.Seccomp, arch seccomp.ScmpArch) uint32 {
	var last uint32
	for _, call := range c.Syscalls {
		if n, err := seccomp.GetSyscallFromNameByArch(call.Name, arch); err == nil && n > 0 {
			last = max(last, uint32(n))
		}
	}
	return last
}

// unknownCallsOf is a block for one architecture. What is none of its system calls
// goes to the next block.
func unknownCallsOf(arch seccomp.ScmpArch, last uint32) []byte {
	const unknown = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	var b instructions
	b.add(loadWord, offsetArch, 0, 0)
	switch arch {
	case seccomp.ArchAMD64:
		b.add(jumpEqual, auditArches[arch], 0, 4)
		b.add(loadWord, offsetNumber, 0, 0)
		b.add(jumpAtLeast, x32Bit, 2, 0)
		b.add(jumpGreater, last, 0, 1)
	case seccomp.ArchX32:
		b.add(jumpEqual, auditArches[arch], 0, 4)
		b.add(loadWord, offsetNumber, 0, 0)
		b.add(jumpAtLeast, x32Bit, 0, 2)
		b.add(jumpGreater, last|x32Bit, 0, 1)
	default:
		b.add(jumpEqual, auditArches[arch], 0, 3)
		b.add(loadWord, offsetNumber, 0, 0)
		b.add(jumpGreater, last, 0, 1)
	}
	b.add(giveBack, unknown, 0, 0)
	return b
}

// instructions are struct sock_filter one after the other.
type instructions []byte

func (b *instructions) add(code uint16, k uint32, ifTrue, ifFalse uint8) {
	*b = binary.NativeEndian.AppendUint16(*b, code)
	*b = append(*b, ifTrue, ifFalse)
	*b = binary.NativeEndian.AppendUint32(*b, k)
}
