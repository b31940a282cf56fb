package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// newRoot is where the root file system is mounted until it is the root.
const newRoot = "/newroot"

// agentDir is where the agent is for the guest, on the tmpfs that becomes its
// /run.
const agentDir = "run/sampan-test"

const agentUnit = `[Unit]
Description=Does what the host of this virtual machine asks for
After=dbus.socket systemd-journald.socket
[Service]
ExecStart=/` + agentDir + `/guest agent
OOMScoreAdjust=-1000
`

// boot never returns unless it fails, and then the kernel panics, which ends
// the machine.
func boot() error {
	for _, m := range []struct{ source, target string }{{"proc", "/proc"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}} {
		if err := mount(m.source, m.target, m.source, 0, ""); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := mountDisks(); err != nil {
		return err
	}
	if err := installAgent(); err != nil {
		return err
	}
	for _, dir := range []string{"run", "dev", "proc"} {
		if err := unix.Mount("/"+dir, filepath.Join(newRoot, dir), "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move /%s: %w", dir, err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, os.Environ())
}

func mount(source, target, fs string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fs, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

func loadModules() error {
	files, err := filepath.Glob("/modules/*.ko") // sorted
	if err != nil {
		return err
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}

// mountDisks mounts the disks of the parameter sampan.disks: DEVICE:PATH:OPTION
// with commas between them, the root file system first.
func mountDisks() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	for word := range strings.FieldsSeq(string(line)) {
		list, ok := strings.CutPrefix(word, "sampan.disks=")
		if !ok {
			continue
		}
		for entry := range strings.SplitSeq(list, ",") {
			f := strings.Split(entry, ":")
			if len(f) != 3 {
				return fmt.Errorf("sampan.disks: %q is not DEVICE:PATH:OPTION", entry)
			}
			if err := mountDisk("/dev/"+f[0], filepath.Join(newRoot, f[1]), f[2]); err != nil {
				return err
			}
		}
	}
	return nil
}

// mountDisk waits for the disk: devices are found in the background.
func mountDisk(device, target, option string) error {
	var flags uintptr
	if option == "ro" {
		flags = unix.MS_RDONLY
	}
	var err error
	for range 100 {
		if _, err = os.Stat(device); err == nil {
			return mount(device, target, "ext4", flags, "")
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// installAgent has systemd start this program again, as early as it starts any
// service. Both are on /run, so the disks need not know of it.
func installAgent() error {
	units := "/run/systemd/system"
	wants := units + "/multi-user.target.wants"
	for _, dir := range []string{"/" + agentDir, wants} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(units+"/agent.service", []byte(agentUnit), 0o644); err != nil {
		return err
	}
	if err := os.Symlink("../agent.service", wants+"/agent.service"); err != nil {
		return err
	}
	return copyFile("/init", "/"+agentDir+"/guest")
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Close()
}
