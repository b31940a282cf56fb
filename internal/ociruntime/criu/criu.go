// Package criu is what all OCI runtimes that checkpoint and restore with CRIU
// have in common: the options that they have no words for, the container's stdio,
// which is no file of its own, how the command that runs it is ended, and what CRIU says when it fails.
package criu

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ConfigAnnotation is the annotation in a bundle's config.json that names a file
// of further options for CRIU. A container can be checkpointed and restored only
// if it was created with one: what is between it and its keeper needs options
// that OCI runtimes do not have.
const ConfigAnnotation = "org.criu.config"

// ImagesDir is the directory in a checkpoint with CRIU's images.
const ImagesDir = "checkpoint"

// The logs that CRIU writes.
const (
	DumpLog    = "dump.log"
	RestoreLog = "restore.log"
)

// ghostLimit is the size up to which files that are open but deleted become part
// of a checkpoint.
const ghostLimit = "256M"

// common is what dump and restore have to agree on: established TCP connections
// are closed in the checkpoint, for a pod that is restored has another address,
// and the other end has gone on; locks are kept, for nobody else is supposed to
// lock a container's files; datagram sockets find their peers outside again.
var common = Options{"tcp-close", "file-locks", "ext-unix-sk"}

// Options is the content of a file of options.
type Options []string

// Write replaces the file at path.
func (o Options) Write(path string) error {
	return os.WriteFile(path, []byte(strings.Join(o, "\n")+"\n"), 0o600)
}

// DumpOptions returns the options for a dump of a container with this stdio.
func DumpOptions(stdio Stdio) Options {
	o := append(Options{"link-remap", "ghost-limit " + ghostLimit}, common...)
	for _, file := range slices.Compact(slices.Sorted(maps.Values(stdio))) {
		o = append(o, "external "+file)
	}
	return o
}

// RestoreOptions returns the options for a restore of processes that are to wait
// for SIGCONT.
func RestoreOptions() Options { return append(Options{"leave-stopped"}, common...) }

// fileFormat is how CRIU names a file: by mount and inode.
const fileFormat = "file[%x:%x]"

// Stdio has CRIU's names of those among the first three files of a container's
// first process that come from outside of the container, by descriptor.
type Stdio map[int]string

// StdioOf looks at the first three files of a process. From outside are those that
// have a path, but on a mount that the process does not have. Pipes are not
// among them: they have no path, and OCI runtimes take care of them.
func StdioOf(pid int) (Stdio, error) {
	mounts, err := mountIDs(pid)
	if err != nil {
		return nil, err
	}
	external := make(Stdio)
	for fd := range 3 {
		link := fmt.Sprintf("/proc/%d/fd/%d", pid, fd)
		path, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(path, "/") {
			continue // closed, or a pipe
		}
		mount, err := mountOf(pid, fd)
		if err != nil {
			return nil, err
		}
		if mounts[mount] {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(link, &st); err != nil {
			return nil, &fs.PathError{Op: "stat", Path: link, Err: err}
		}
		external[fd] = fmt.Sprintf(fileFormat, mount, st.Ino)
	}
	return external, nil
}

// mountIDs returns the mounts that a process has.
func mountIDs(pid int) (map[uint64]bool, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	ids := make(map[uint64]bool)
	for line := range strings.Lines(string(data)) {
		first, _, _ := strings.Cut(line, " ")
		if id, err := strconv.ParseUint(first, 10, 64); err == nil {
			ids[id] = true
		}
	}
	return ids, nil
}

// mountOf returns the mount that an open file is on.
func mountOf(pid, fd int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.ParseUint(strings.TrimSpace(id), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no mnt_id", path)
}

// maxReasons bounds what is quoted of a log.
const maxReasons = 3

// Reason returns the errors that CRIU has written into a log, the first ones,
// which are the cause of the others, or "" if there are none.
func Reason(log string) string {
	data, err := os.ReadFile(log)
	if err != nil {
		return ""
	}
	var reasons []string
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan() && len(reasons) < maxReasons; {
		// (00.048357) Error (criu/util.c:1533): the words
		_, words, ok := strings.Cut(s.Text(), "Error (")
		_, words, found := strings.Cut(words, "): ")
		if ok && found && !strings.HasPrefix(words, harmless) {
			reasons = append(reasons, words)
		}
	}
	return strings.Join(reasons, "; ")
}

// harmless is what CRIU complains of without giving up: it wants more open files
// for itself than its caller may have.
const harmless = "rlimit: Can't setup RLIMIT_NOFILE"
