package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// transports are crictl's.
var transports = []string{"spdy", "websocket"}

// process is a crictl that runs beside the test.
type process struct {
	*testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan error

	mu  sync.Mutex
	out bytes.Buffer // stdout, and stderr behind it unless it has its own
	err bytes.Buffer
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// startCrictl starts a crictl with pipes.
func startCrictl(t *testing.T, l *lab.Lab, args ...string) *process {
	t.Helper()
	cmd, err := l.CrictlCommand(args...)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{T: t, cmd: cmd, done: make(chan error, 1)}
	cmd.Stdout, cmd.Stderr = p, &p.err
	if p.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	return p
}

// sees waits until the process has shown a text.
func (p *process) sees(text string) {
	p.Helper()
	for end := time.Now().Add(15 * time.Second); !strings.Contains(p.text(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			p.Fatalf("%v: no %q in %q", p.cmd.Args, text, p.text())
		}
	}
}

// ends waits for the end of the process.
func (p *process) ends() error {
	p.Helper()
	select {
	case err := <-p.done:
		return err
	case <-time.After(20 * time.Second):
		p.Fatalf("%v does not end; it has shown %.500q", p.cmd.Args, p.text())
	}
	return nil
}

// streamPod runs a pod with one container and returns their ids.
func streamPod(t *testing.T, l *lab.Lab, name, image string, change func(*runtimeapi.ContainerConfig), args ...string) (pod, id string) {
	t.Helper()
	podConfig := l.PodConfig(name)
	pod = l.RunPod(t, podConfig)
	config := l.ContainerConfig(name, l.Pull(t, image), args...)
	if change != nil {
		change(config)
	}
	id = l.CreateContainer(t, pod, podConfig, config)
	l.StartContainer(t, id)
	return pod, id
}

func TestExecStreams(t *testing.T) {
	l := lab.New(t, lab.Options{})
	pod, id := streamPod(t, l, "box", "busybox", nil, "sleep", "1000")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			t.Run("output and exit code", func(t *testing.T) {
				p := startCrictl(t, l, "exec", "-r", transport, id, "sh", "-c", "echo out; echo err >&2; exit 3")
				if err := p.ends(); err == nil || !strings.Contains(p.err.String(), "exit code 3") {
					t.Errorf("%v, %q", err, p.err.String())
				}
				if p.text() != "out\n" || !strings.HasPrefix(p.err.String(), "err\n") {
					t.Errorf("stdout %q, stderr %q", p.text(), p.err.String())
				}
			})
			t.Run("end of input", func(t *testing.T) {
				p := startCrictl(t, l, "exec", "-i", "-r", transport, id, "sh", "-c", "wc -c; echo after")
				const size = 5_000_000
				if n, err := p.in.Write(make([]byte, size)); err != nil {
					t.Fatal(n, err)
				}
				p.in.Close()
				if err := p.ends(); err != nil || p.text() != fmt.Sprintf("%d\nafter\n", size) {
					t.Errorf("%v, %q, %q", err, p.text(), p.err.String())
				}
			})
			t.Run("end before the input's", func(t *testing.T) {
				p := startCrictl(t, l, "exec", "-i", "-r", transport, id, "sh", "-c", "head -c 3; exit 4")
				go func() {
					for {
						if _, err := p.in.Write(make([]byte, 4096)); err != nil {
							return
						}
					}
				}()
				if err := p.ends(); err == nil || !strings.Contains(p.err.String(), "exit code 4") || len(p.text()) != 3 {
					t.Errorf("%v, %q, %q", err, p.text(), p.err.String())
				}
			})
			t.Run("much output", func(t *testing.T) {
				p := startCrictl(t, l, "exec", "-r", transport, id, "sh", "-c", "seq 1000000; echo end")
				if err := p.ends(); err != nil || !strings.HasSuffix(p.text(), "\n999999\n1000000\nend\n") || len(p.text()) != 6888896+4 {
					t.Errorf("%v, %d bytes, %q", err, len(p.text()), p.err.String())
				}
			})
			t.Run("terminal", func(t *testing.T) { testTerminal(t, l, transport, id) })
			t.Run("client gone", func(t *testing.T) {
				p := startCrictl(t, l, "exec", "-r", transport, id, "sh", "-c", "echo up; sleep 4321; true")
				p.sees("up\n")
				p.cmd.Process.Kill()
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
					out := string(l.ExecSync(t, id, "ps").GetStdout())
					if !strings.Contains(out, "4321") {
						break
					}
					if time.Now().After(end) {
						t.Fatalf("what it started still runs:\n%s", out)
					}
				}
			})
		})
	}
	c := crictl{t, l}
	if out := c.run("exec", id, "sh", "-c", "grep -h SigIgn /proc/1/status /proc/self/status | sort -u"); out != "SigIgn:\t0000000000000000" {
		t.Errorf("processes are born with ignored signals: %s", out)
	}
	c.fails("no such file", "exec", id, "/absent")
	l.RemovePod(t, pod)
	c.fails("NotFound", "exec", id, "true")
}

// testTerminal has a user type in a shell and change the window's size.
func testTerminal(t *testing.T, l *lab.Lab, transport, id string) {
	// A shell that edits its lines would ask the terminal questions.
	cmd, err := l.CrictlCommand("exec", "-it", "-r", transport, id, "sh", "-c", `trap : INT; while read x; do eval "$x"; done`)
	if err != nil {
		t.Fatal(err)
	}
	master, p := inTerminal(t, cmd, 90, 30)
	say := func(text string) {
		if _, err := master.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	say("stty size; tty\n")
	p.sees("30 90\r\n/dev/pts/")
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: 77, Row: 22}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); !strings.Contains(p.text(), "22 77\r\n"); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the new size does not arrive: %q", p.text())
		}
		say("stty size\n")
	}
	say("cat\n")
	say("typed\n")
	p.sees("typed\r\ntyped\r\n")
	say("\x03") // interrupts cat, and throws away what else was typed
	p.sees("^C")
	time.Sleep(200 * time.Millisecond)
	say("exit 5\n")
	if err := p.ends(); err == nil || !strings.Contains(p.text(), "exit code 5") {
		t.Errorf("%v, %q", err, p.text())
	}
}

// inTerminal starts a command in a terminal of its own.
func inTerminal(t *testing.T, cmd *exec.Cmd, width, height uint16) (master *os.File, p *process) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}); err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p = &process{T: t, cmd: cmd, done: make(chan error, 1)}
	t.Cleanup(func() { cmd.Process.Kill() })
	go func() {
		io.Copy(p, master)
		p.done <- cmd.Wait()
	}()
	return master, p
}

func TestAttachStreams(t *testing.T) {
	l := lab.New(t, lab.Options{})
	interactive := func(c *runtimeapi.ContainerConfig) { c.Stdin = true }
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			pod, id := streamPod(t, l, "talk-"+transport, "busybox", interactive, "sh", "-c", `while read x; do echo "got $x"; done; echo end`)
			a := startCrictl(t, l, "attach", "-i", "-r", transport, id)
			b := startCrictl(t, l, "attach", "-i", "-r", transport, id)
			time.Sleep(500 * time.Millisecond) // nothing tells when they are attached
			fmt.Fprintln(a.in, "one")
			a.sees("got one\n")
			b.sees("got one\n")
			fmt.Fprintln(b.in, "two")
			a.sees("got two\n")
			a.cmd.Process.Kill()
			a.in.Close()
			fmt.Fprintln(b.in, "three")
			b.sees("got three\n")
			if _, err := l.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
				t.Fatal(err)
			}
			if err := b.ends(); err != nil {
				t.Errorf("when the container had ended: %v, %q", err, b.err.String())
			}
			logs := crictl{t, l}.logs(id)
			if logs != "got one\ngot two\ngot three\n" {
				t.Errorf("the log has %q", logs)
			}
			l.RemovePod(t, pod)
		})
	}
	once := func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true }
	pod, id := streamPod(t, l, "once", "busybox", once, "sh", "-c", "cat; echo end")
	p := startCrictl(t, l, "attach", "-i", id)
	fmt.Fprintln(p.in, "some input")
	p.in.Close()
	if err := p.ends(); err != nil || p.text() != "some input\nend\n" {
		t.Errorf("once: %v, %q, %q", err, p.text(), p.err.String())
	}
	c := crictl{t, l}
	c.fails("exited", "attach", id)
	l.RemovePod(t, pod)

	pod, id = streamPod(t, l, "terminal", "busybox", func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true },
		"sh", "-c", `while read x; do eval "$x"; done`)
	cmd, err := l.CrictlCommand("attach", "-it", id)
	if err != nil {
		t.Fatal(err)
	}
	master, p := inTerminal(t, cmd, 91, 31)
	for end := time.Now().Add(10 * time.Second); !strings.Contains(p.text(), "31 91\r\n"); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the window's size does not arrive: %q", p.text())
		}
		master.WriteString("stty size\n")
	}
	master.WriteString("exit\n")
	if err := p.ends(); err != nil {
		t.Errorf("terminal: %v, %q", err, p.text())
	}
	if logs := c.logs(id); !strings.Contains(logs, "31 91") {
		t.Errorf("the terminal's log has %q", logs)
	}
	l.RemovePod(t, pod)
}

// TestAttachStalled stops a client, and a worker under another.
func TestAttachStalled(t *testing.T) {
	l := lab.New(t, lab.Options{})
	pod, id := streamPod(t, l, "busy", "busybox", func(c *runtimeapi.ContainerConfig) { c.Stdin = true },
		"sh", "-c", `while read x; do seq 3000000; echo "done $x"; done`)
	stalled := startCrictl(t, l, "attach", id)
	reads := startCrictl(t, l, "attach", "-i", id)
	time.Sleep(500 * time.Millisecond)
	stalled.cmd.Process.Signal(syscall.SIGSTOP)
	fmt.Fprintln(reads.in, "one")
	reads.sees("\n3000000\ndone one\n")
	stalled.cmd.Process.Signal(syscall.SIGCONT)
	if err := stalled.ends(); err == nil {
		t.Error("a client that did not read ended as if it had")
	} else if text := stalled.err.String(); !strings.Contains(text, "too slowly") {
		t.Logf("the client that did not read was told: %s", text)
	}
	logs := crictl{t, l}.logs(id)
	if !strings.HasSuffix(logs, "\n3000000\ndone one\n") || strings.Count(logs, "\n") != 3_000_001 {
		t.Errorf("the log has %d lines", strings.Count(logs, "\n"))
	}
	for _, pid := range l.Keepers(t, "worker") {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if err := reads.ends(); err == nil || !strings.Contains(reads.err.String(), "connection to the keeper lost") {
		t.Errorf("after the worker's death: %v, %s", err, reads.err.String())
	}
	reads = startCrictl(t, l, "attach", "-i", id)
	time.Sleep(500 * time.Millisecond)
	fmt.Fprintln(reads.in, "two")
	reads.sees("\ndone two\n")
	l.RemovePod(t, pod)
	reads.ends()
}

func TestPortForward(t *testing.T) {
	l := lab.New(t, lab.Options{})
	own, _ := streamPod(t, l, "web", "nginx", nil)
	hostConfig := l.PodConfig("hostweb")
	hostConfig.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	onHost := l.RunPod(t, hostConfig)
	id := l.CreateContainer(t, onHost, hostConfig, func() *runtimeapi.ContainerConfig {
		c := l.ContainerConfig("web", l.Pull(t, "busybox"), "sh", "-c", "mkdir /www; echo on the host > /www/index.html; httpd -f -p 127.0.0.1:18099 -h /www")
		c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		return c
	}())
	l.StartContainer(t, id)
	for i, transport := range transports {
		for _, target := range []struct{ pod, port, page string }{{own, "80", "Welcome to nginx!"}, {onHost, "18099", "on the host"}} {
			local := fmt.Sprintf("%d", 18200+i)
			p := startCrictl(t, l, "port-forward", "-r", transport, target.pod, local+":"+target.port)
			p.sees("Forwarding from")
			for range 3 {
				if page := get(t, "http://127.0.0.1:"+local); !strings.Contains(page, target.page) {
					t.Errorf("%s: got %q", transport, page)
				}
			}
			p.cmd.Process.Signal(syscall.SIGINT)
			p.ends()
		}
	}
	for _, bad := range []*runtimeapi.PortForwardRequest{{PodSandboxId: "absent"}, {PodSandboxId: own, Port: []int32{70000}}} {
		ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
		if r, err := l.Runtime.PortForward(ctx, bad); err == nil {
			t.Errorf("%v: %s", bad, r.GetUrl())
		}
		cancel()
	}
	l.RemovePod(t, own)
	l.RemovePod(t, onHost)
}

// TestStreamsLeaveNothing ends sessions in every way there is, many times.
func TestStreamsLeaveNothing(t *testing.T) {
	l := lab.New(t, lab.Options{})
	pod, id := streamPod(t, l, "box", "busybox", func(c *runtimeapi.ContainerConfig) { c.Stdin = true },
		"sh", "-c", "httpd -p 80 -h /etc; while read x; do echo $x; done")
	sessions := func() {
		for _, transport := range transports {
			inTerm := func(command ...string) *process {
				cmd, err := l.CrictlCommand(append([]string{"exec", "-it", "-r", transport, id}, command...)...)
				if err != nil {
					t.Fatal(err)
				}
				_, p := inTerminal(t, cmd, 80, 24)
				return p
			}
			for _, p := range []*process{startCrictl(t, l, "exec", "-r", transport, id, "true"), inTerm("true")} {
				if err := p.ends(); err != nil {
					t.Errorf("%v: %v, %q, %q", p.cmd.Args, err, p.text(), p.err.String())
				}
			}
			started := []*process{
				startCrictl(t, l, "exec", "-i", "-r", transport, id, "sleep", "1000"),
				inTerm("sleep", "1000"),
				startCrictl(t, l, "attach", "-i", "-r", transport, id),
				startCrictl(t, l, "port-forward", "-r", transport, pod, "18300:80"),
			}
			started[3].sees("Forwarding from")
			if page := get(t, "http://127.0.0.1:18300/hostname"); !strings.Contains(page, "box") {
				t.Errorf("forwarded page: %q", page)
			}
			time.Sleep(200 * time.Millisecond)
			for _, p := range started {
				p.cmd.Process.Kill()
				p.ends()
			}
		}
	}
	sessions()
	time.Sleep(12 * time.Second) // the longest that a connection stays
	checkGrowth(t, l, "sessions of all kinds", func() {
		for range 5 {
			sessions()
		}
	})
	if out := string(l.ExecSync(t, id, "ps").GetStdout()); strings.Contains(out, "sleep 1000") {
		t.Errorf("processes are left:\n%s", out)
	}
	l.RemovePod(t, pod)
}
