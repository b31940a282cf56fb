//go:build faultpoints

// Package fault, in a build for test/crash: see fault.go. It is controlled by
// files, which reach every process alike:
//
//	DIR/armed/NAME    "COUNT" or "COUNT all": at the COUNTth passage of NAME from
//	                  now on the process kills itself, or all of Sampan's at once
//	DIR/fired/NAME    armed/NAME, when that has happened
//	DIR/passed/NAME   has a byte for each passage
//
// Where DIR is not there, points are nothing.
package fault

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Dir is where the files are.
const Dir = "/run/sampan-faults"

// Point is a moment, called "what.done".
func Point(name string) {
	passed, err := os.OpenFile(filepath.Join(Dir, "passed", name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	passed.Write([]byte{'.'})
	passed.Close()
	if all, ok := due(name); ok {
		if all {
			killOthers()
		}
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
}

// Record is a moment in the life of a record of the kind, called "record.KIND.STEP".
func Record(kind, step string) { Point("record." + kind + "." + step) }

// due counts a passage, and tells whether it is the one.
func due(name string) (all, ok bool) {
	armed := filepath.Join(Dir, "armed", name)
	f, err := os.OpenFile(armed, os.O_RDWR, 0)
	if err != nil {
		return false, false
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return false, false
	}
	if _, err := os.Stat(armed); err != nil {
		return false, false // it was somebody else's
	}
	text, err := os.ReadFile(armed)
	fields := strings.Fields(string(text))
	if err != nil || len(fields) == 0 {
		return false, false
	}
	count, err := strconv.Atoi(fields[0])
	if err != nil {
		return false, false
	}
	if count > 1 {
		left := strings.Join(append([]string{strconv.Itoa(count - 1)}, fields[1:]...), " ")
		f.WriteAt([]byte(left+strings.Repeat(" ", len(text))), 0)
		return false, false
	}
	if err := os.Rename(armed, filepath.Join(Dir, "fired", name)); err != nil {
		return false, false
	}
	return len(fields) > 1 && fields[1] == "all", true
}

// killOthers kills every daemon, supervisor and worker but this process. Those of
// one lab see nobody else's.
func killOthers() {
	var pids []int
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		var pid int
		if _, err := fmt.Sscanf(path, "/proc/%d/", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		text, _ := os.ReadFile(path)
		args := strings.Split(string(text), "\x00")
		if len(args) < 2 {
			continue
		}
		name, role := filepath.Base(args[0]), args[1]
		if name == "sampan" && role == "serve" || strings.HasPrefix(name, "keeper-") && (role == "supervisor" || role == "worker") {
			pids = append(pids, pid)
		}
	}
	for _, pid := range pids {
		unix.Kill(pid, unix.SIGKILL)
	}
}
