package worker

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

const (
	// treeRounds bounds how often killTree looks for processes it has not seen.
	treeRounds = 100
	// treeTimeout bounds the asking for the container's processes.
	treeTimeout = 5 * time.Second
)

// killTree kills the process, its descendants, and what is in its session though
// its parent is gone. Every process is stopped when it is found, so that it can
// make no more, and all are killed when no other is found.
func (e *execProcess) killTree() {
	ctx, cancel := context.WithTimeout(context.Background(), treeTimeout)
	defer cancel()
	tree := map[int]*host.Pidfd{e.process.Pid: nil}
	e.pidfd.Signal(unix.SIGSTOP)
	for range treeRounds {
		pids, err := e.c.rt.Pids(ctx, e.c.name())
		if err != nil {
			e.c.log.Warn("look for the descendants of an exec", "err", err)
			break
		}
		if !e.grow(tree, pids) {
			break
		}
	}
	e.pidfd.Signal(unix.SIGKILL)
	for _, h := range tree {
		if h != nil {
			h.Signal(unix.SIGKILL)
			h.Close()
		}
	}
}

// grow adds those of pids to tree that belong there, and stops them.
func (e *execProcess) grow(tree map[int]*host.Pidfd, pids []int) (grown bool) {
	for again := true; again; {
		again = false
		for _, pid := range pids {
			if _, known := tree[pid]; known {
				continue
			}
			p, err := host.Identify(pid)
			if err != nil {
				continue // gone
			}
			parent, session, ok := ancestry(pid)
			if _, child := tree[parent]; !ok || !child && session != e.process.Pid {
				continue
			}
			h, err := p.Open()
			if err != nil {
				continue
			}
			h.Signal(unix.SIGSTOP)
			tree[pid] = h
			grown, again = true, true
		}
	}
	return grown
}

// ancestry returns a process' parent and session.
func ancestry(pid int) (parent, session int, ok bool) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, false
	}
	// Behind the name, which may hold anything: state, parent, group, session.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 4 {
		return 0, 0, false
	}
	parent, perr := strconv.Atoi(string(fields[1]))
	session, serr := strconv.Atoi(string(fields[3]))
	return parent, session, perr == nil && serr == nil
}
