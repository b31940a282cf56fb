// Command inspect runs as a container's process in the tests of package spec
// and prints what it finds itself to be, as JSON.
//
//	inspect [-read FILE]... [-write FILE]...
package main

import (
	"encoding/json"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Report is what the process finds.
type Report struct {
	Args, Env  []string
	Cwd        string
	Hostname   string
	Pid        int
	UID, GID   int
	Groups     []int
	Status     map[string]string // /proc/self/status
	OOMScore   string
	OpenFiles  uint64
	Mounts     map[string]string // options and propagation by mount point
	Namespaces map[string]string
	Reads      map[string]string // the first bytes of each -read, or "error: ..."
	Writes     map[string]string // what opening each -write for writing gives
}

func main() {
	// As PID 1 a process has to ask for signals.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM)

	r := Report{
		Args: os.Args, Env: os.Environ(), Pid: os.Getpid(), UID: os.Getuid(), GID: os.Getgid(),
		Status: map[string]string{}, Mounts: map[string]string{}, Namespaces: map[string]string{},
		Reads: map[string]string{}, Writes: map[string]string{},
	}
	r.Cwd, _ = os.Getwd()
	r.Hostname, _ = os.Hostname()
	r.Groups, _ = os.Getgroups()
	r.OOMScore = strings.TrimSpace(read("/proc/self/oom_score_adj"))
	for line := range strings.Lines(read("/proc/self/status")) {
		key, value, _ := strings.Cut(line, ":")
		r.Status[key] = strings.TrimSpace(value)
	}
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	r.OpenFiles = limit.Max
	for line := range strings.Lines(read("/proc/self/mountinfo")) {
		// id parent device root POINT OPTIONS [PROPAGATION]... - type source options
		line, _, _ = strings.Cut(line, " - ")
		if f := strings.Fields(line); len(f) > 5 {
			r.Mounts[f[4]] = strings.Join(f[5:], " ")
		}
	}
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"} {
		r.Namespaces[ns], _ = os.Readlink("/proc/self/ns/" + ns)
	}
	for i := 1; i+1 < len(os.Args); i += 2 {
		switch name := os.Args[i+1]; os.Args[i] {
		case "-read":
			r.Reads[name] = head(name)
		case "-write":
			f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
			if err != nil {
				r.Writes[name] = "error: " + err.Error()
				continue
			}
			r.Writes[name] = "ok"
			f.Close()
		}
	}
	json.NewEncoder(os.Stdout).Encode(r)
}

func read(path string) string {
	data, _ := os.ReadFile(path)
	return string(data)
}

func head(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return "error: " + err.Error()
	}
	defer f.Close()
	buf := make([]byte, 64)
	n, err := f.Read(buf)
	if err != nil && err != io.EOF {
		return "error: " + err.Error()
	}
	return strings.TrimSpace(string(buf[:n]))
}
