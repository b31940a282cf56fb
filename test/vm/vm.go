// Package vm boots virtual machines for tests of what this machine has not:
// systemd, cgroup v2, AppArmor, other kernels, power that fails. It is QEMU
// with an emulated processor, so it works everywhere and some ten times slower
// than the machine it runs on; a boot takes about 15 seconds.
//
// A guest is Debian from Debian's packages (see Build) with the disks of the
// test. It has no network. The test runs commands in it and copies files to and
// from it over a virtio port, and may end it at any moment with Kill. What a
// guest writes to its root file system is gone when it ends, what it writes to
// the test's disks stays, as far as it got there.
package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/test/vm/guest/api"
)

// Command is a program to run in a guest.
type Command = api.Command

// Disk is a file with an ext4 file system for the guest.
type Disk struct {
	Path     string // on the host
	Mount    string // in the guest; made if it is not there
	ReadOnly bool
}

// Options of a machine.
type Options struct {
	Kernel  string   // the beginning of its version, "6.1"; the oldest if empty
	Append  []string // words to add to the kernel's command line
	Disks   []Disk
	Memory  int           // MiB; 2048 if 0
	Timeout time.Duration // for the boot; 10 minutes if 0
}

// VM is a running machine. Its methods may be called concurrently.
type VM struct {
	dir     string
	console console
	client  http.Client
	qemu    *exec.Cmd
	exited  chan struct{} // closed when QEMU has ended
}

// errGone is why nothing can be asked of a machine that has ended.
var errGone = errors.New("the machine has ended")

// machine is what every guest is; memory is in MiB. Its processors have no
// cmpxchg16b: QEMU 7.2 leaves wrong flags behind one without a lock, of which
// kernels from 6.12 on die.
func machine(memory int) []string {
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16", "-m", strconv.Itoa(memory),
	}
}

// defaultMemory is what a guest has unless its options say otherwise, in MiB.
const defaultMemory = 2048

// Probe tries whether this host can emulate a machine, one that is never started.
// The error says why it cannot.
func Probe(ctx context.Context) error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("guests are x86_64, and the programs that are to run in them are for %s", runtime.GOARCH)
	}
	cmd := exec.CommandContext(ctx, emulator, append(machine(defaultMemory), "-S", "-monitor", "stdio")...)
	cmd.Stdin = strings.NewReader("quit\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", emulator, err, bytes.TrimSpace(out))
	}
	return nil
}

const emulator = "qemu-system-x86_64"

// Boot starts a machine and returns when it runs commands. The error of a
// machine that does not come up ends with what it wrote to its console. Close
// must be called in the end.
func (i Image) Boot(ctx context.Context, o Options) (*VM, error) {
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "vm-")
	if err != nil {
		return nil, err
	}
	m := &VM{dir: dir, exited: make(chan struct{})}
	if err := m.start(ctx, i, o); err != nil {
		return nil, errors.Join(fmt.Errorf("boot: %w", err), os.RemoveAll(dir))
	}
	if _, err := m.Run(ctx, Command{Args: []string{"/bin/true"}}, io.Discard); err != nil {
		return nil, errors.Join(fmt.Errorf("boot: %w; the end of its console:\n%s", err, m.Console()), m.Close())
	}
	return m, nil
}

// start runs QEMU with one end of a socket pair as the guest's port.
func (m *VM) start(ctx context.Context, i Image, o Options) error {
	kernel, err := i.kernel(o.Kernel)
	if err != nil {
		return err
	}
	initrd, err := m.makeInitrd(ctx, kernel)
	if err != nil {
		return err
	}
	conn, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	m.qemu = exec.Command(emulator, arguments(i, o, kernel, initrd)...)
	m.qemu.ExtraFiles = []*os.File{theirs} // descriptor 3
	m.qemu.Stdout, m.qemu.Stderr = &m.console, &m.console
	m.qemu.Dir = m.dir
	m.qemu.Env = append(os.Environ(), "TMPDIR="+m.dir)
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig comes when the thread that forked ends
		defer close(m.exited)
		err := m.qemu.Start()
		started <- err
		if err == nil {
			_ = m.qemu.Wait() // killed, mostly
		}
		conn.Close()
	}()
	if err := <-started; err != nil {
		return err
	}
	m.client.Transport = overOne(conn)
	return nil
}

// overOne speaks HTTP/2 on the connection, and on no other when it breaks.
func overOne(conn net.Conn) http.RoundTripper {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	only := make(chan net.Conn, 1)
	only <- conn
	return &http.Transport{Protocols: &protocols, DialContext: func(context.Context, string, string) (net.Conn, error) {
		select {
		case c := <-only:
			return c, nil
		default:
			return nil, errGone
		}
	}}
}

func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "port"), os.NewFile(uintptr(fds[1]), "port")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// makeInitrd appends the guest's program to the kernel's modules: the kernel
// unpacks one archive after the other.
func (m *VM) makeInitrd(ctx context.Context, kernel string) (string, error) {
	program := filepath.Join(m.dir, "guest")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "sampan.dev/sampan/test/vm/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest's program: %w\n%s", err, out)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	modules, err := os.ReadFile(filepath.Join(kernel, "modules.cpio"))
	if err != nil {
		return "", err
	}
	archive := bytes.NewBuffer(modules)
	writeEntry(archive, "init", 0o100755, data)
	endArchive(archive)
	path := filepath.Join(m.dir, "initrd")
	return path, os.WriteFile(path, archive.Bytes(), 0o644)
}

func arguments(i Image, o Options, kernel, initrd string) []string {
	memory := o.Memory
	if memory == 0 {
		memory = defaultMemory
	}
	disks := []string{"vda:/:rw"}
	args := append(machine(memory),
		"-smp", "2",
		"-serial", "stdio", "-device", "virtio-serial",
		"-chardev", "socket,id=port,fd=3", "-device", "virtserialport,chardev=port,name="+api.Port,
		"-drive", "if=virtio,format=raw,snapshot=on,file="+filepath.Join(i.dir, "root.ext4"),
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", initrd,
	)
	for n, d := range o.Disks {
		option, drive := "rw", "if=virtio,format=raw,file="+d.Path
		if d.ReadOnly {
			option, drive = "ro", drive+",read-only=on"
		}
		args = append(args, "-drive", drive)
		disks = append(disks, fmt.Sprintf("vd%c:%s:%s", 'b'+n, d.Mount, option))
	}
	words := []string{"console=ttyS0", "panic=-1", "loglevel=4", "mitigations=off", "systemd.getty_auto=no", "systemd.show_status=no"}
	for _, unit := range idle {
		words = append(words, "systemd.mask="+unit)
	}
	words = append(append(words, "sampan.disks="+strings.Join(disks, ",")), o.Append...)
	return append(args, "-append", strings.Join(words, " "))
}

// idle are units of Debian's that no test needs, and that cost seconds.
var idle = []string{
	"apparmor.service", "apt-daily.timer", "e2scrub_reap.service", "modprobe@drm.service", "systemd-logind.service", "systemd-pstore.service",
	"systemd-random-seed.service", "systemd-tmpfiles-clean.timer", "systemd-udev-trigger.service", "systemd-update-utmp.service",
}

// Run runs a command in the guest until it ends and returns its exit code. What
// it writes goes to output as it comes, errors and all. If ctx ends before, the
// command is killed.
func (m *VM) Run(ctx context.Context, c Command, output io.Writer) (int, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return 0, err
	}
	r, err := m.ask(ctx, http.MethodPost, api.RunPath, nil, bytes.NewReader(body))
	if err != nil {
		return 0, fmt.Errorf("run %s: %w", c.Args[0], err)
	}
	defer r.Body.Close()
	if _, err := io.Copy(output, r.Body); err != nil {
		return 0, fmt.Errorf("run %s: %w", c.Args[0], m.cause(err))
	}
	code, err := strconv.Atoi(r.Trailer.Get(api.ExitTrailer))
	if err != nil {
		return 0, fmt.Errorf("run %s: %w", c.Args[0], m.cause(err))
	}
	return code, nil
}

// Shell runs a shell script in the guest and returns what it wrote; an exit
// code other than 0 is an error.
func (m *VM) Shell(ctx context.Context, script string) (string, error) {
	var output bytes.Buffer
	code, err := m.Run(ctx, Command{Args: []string{"/bin/sh", "-c", script}}, &output)
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: exit code %d\n%s", script, code, output.String())
	}
	return output.String(), err
}

// Put writes a file in the guest; its directory is made.
func (m *VM) Put(ctx context.Context, path string, mode os.FileMode, content io.Reader) error {
	r, err := m.ask(ctx, http.MethodPut, api.FilePath, url.Values{"path": {path}, "mode": {strconv.FormatUint(uint64(mode), 8)}}, content)
	if err != nil {
		return fmt.Errorf("put %s: %w", path, err)
	}
	return r.Body.Close()
}

// Get copies a file of the guest's to w.
func (m *VM) Get(ctx context.Context, path string, w io.Writer) error {
	r, err := m.ask(ctx, http.MethodGet, api.FilePath, url.Values{"path": {path}}, nil)
	if err != nil {
		return fmt.Errorf("get %s: %w", path, err)
	}
	defer r.Body.Close()
	_, err = io.Copy(w, r.Body)
	return err
}

func (m *VM) ask(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "guest", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	r, err := m.client.Do(req)
	if err != nil {
		return nil, m.cause(err)
	}
	if r.StatusCode != http.StatusOK {
		defer r.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(r.Body, 4096)) // as much of it as there is
		return nil, errors.New(strings.TrimSpace(string(text)))
	}
	return r, nil
}

// cause adds to an error that the machine is gone, if it is.
func (m *VM) cause(err error) error {
	select {
	case <-m.exited:
		return fmt.Errorf("%w: %w", errGone, err)
	default:
		return err
	}
}

// Kill ends the machine as a power failure does: what the guest has not
// written to its disks is lost. It returns when the machine is gone.
func (m *VM) Kill() error {
	err := m.qemu.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-m.exited
	return err
}

// Shutdown has the guest end in good order, within ctx.
func (m *VM) Shutdown(ctx context.Context) error {
	if _, err := m.Shell(ctx, "systemctl poweroff --no-block"); err != nil {
		return err
	}
	select {
	case <-m.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("shut down: %w; the end of its console:\n%s", context.Cause(ctx), m.Console())
	}
}

// Close kills the machine if it runs, and removes its files but the disks.
func (m *VM) Close() error {
	return errors.Join(m.Kill(), os.RemoveAll(m.dir))
}

// Console is the end of what the machine, or QEMU, wrote to its console.
func (m *VM) Console() string { return m.console.String() }

// consoleSize is how much of the console is kept, in bytes.
const consoleSize = 32 << 10

// console keeps the end of what is written to it.
type console struct {
	mu   sync.Mutex
	tail []byte
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tail = append(c.tail, p...)
	if over := len(c.tail) - consoleSize; over > 0 {
		c.tail = append(c.tail[:0], c.tail[over:]...)
	}
	return len(p), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.tail)
}
