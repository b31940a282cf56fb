package host

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProbeFacts(t *testing.T) {
	f, err := ProbeFacts()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", f)

	// The kernel's own words are the reference.
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := f.Seccomp, strings.Contains(string(status), "\nSeccomp_filters:"); got != want {
		t.Errorf("Seccomp = %v, but /proc/self/status says %v", got, want)
	}
	if !slices.IsSortedFunc(f.HugepageSizes, strings.Compare) {
		t.Errorf("HugepageSizes %q are not sorted", f.HugepageSizes)
	}
	if f.MinOOMScoreAdj < -1000 || f.MinOOMScoreAdj > 1000 {
		t.Errorf("MinOOMScoreAdj = %d", f.MinOOMScoreAdj)
	}

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if f.MaxOpenFiles < limit.Max {
		t.Errorf("MaxOpenFiles = %d, below the hard limit %d", f.MaxOpenFiles, limit.Max)
	}

	if os.Getuid() == 0 && !slices.Contains(f.Capabilities, "CAP_CHOWN") {
		t.Errorf("Capabilities of root %q lack CAP_CHOWN", f.Capabilities)
	}
	for _, c := range f.Capabilities {
		if !strings.HasPrefix(c, "CAP_") || strings.ToUpper(c) != c {
			t.Errorf("%q is no capability's name", c)
		}
	}
}

func TestCapabilitiesFollowTheBoundingSet(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can drop from the bounding set")
	}
	before, err := grantableCapabilities(0)
	if err != nil {
		t.Fatal(err)
	}
	var after []string
	err = onThread(func() error {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_CHOWN, 0, 0, 0); err != nil {
			return err
		}
		after, err = grantableCapabilities(unix.Gettid())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := slices.DeleteFunc(before, func(c string) bool { return c == "CAP_CHOWN" }); !slices.Equal(after, want) {
		t.Errorf("without CAP_CHOWN in the bounding set: %q, want %q", after, want)
	}
}

func TestDevices(t *testing.T) {
	null, err := Devices("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if len(null) != 1 || null[0].Path != "/dev/null" || null[0].Type != "c" || null[0].Major != 1 || null[0].Minor != 3 || null[0].Mode != 0o666 {
		t.Errorf("Devices(/dev/null) = %+v", null)
	}

	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/dev/zero", link); err != nil {
		t.Fatal(err)
	}
	if got, err := Devices(link); err != nil || len(got) != 1 || got[0].Path != link || got[0].Minor != 5 {
		t.Errorf("Devices(link to /dev/zero) = %+v, %v", got, err)
	}
	if got, err := Devices(dir); err != nil || len(got) != 0 {
		t.Errorf("Devices(directory without nodes) = %+v, %v", got, err)
	}
	for _, absent := range []string{filepath.Join(dir, "absent"), "/dev/null/absent"} {
		if got, err := Devices(absent); err != nil || len(got) != 0 {
			t.Errorf("Devices(absent) = %+v, %v", got, err)
		}
	}

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := Devices(file); err != nil || len(got) != 0 {
		t.Errorf("Devices(plain file) = %+v, %v", got, err)
	}
}

func TestDevicesBelowADirectory(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mknod(filepath.Join(dir, "node"), unix.S_IFCHR|0o640, int(unix.Mkdev(1, 7))); errors.Is(err, unix.EPERM) {
		t.Skip("this process may not make device nodes")
	} else if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("node", filepath.Join(dir, "alias")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, link} {
		got, err := Devices(path)
		if err != nil || len(got) != 1 || got[0].Path != filepath.Join(path, "node") || got[0].Minor != 7 {
			t.Errorf("Devices(%s) = %+v, %v", path, got, err)
		}
	}
}

func TestHugepageName(t *testing.T) {
	for kib, want := range map[uint64]string{64: "64KB", 2048: "2MB", 32768: "32MB", 1 << 20: "1GB", 16 << 20: "16GB"} {
		if got := hugepageName(kib); got != want {
			t.Errorf("%d KiB: %s, want %s", kib, got, want)
		}
	}
}

func TestAllDevices(t *testing.T) {
	list, err := AllDevices()
	if err != nil {
		t.Fatal(err)
	}
	has := func(path string) bool {
		return slices.ContainsFunc(list, func(d Device) bool { return d.Path == path })
	}
	if !has("/dev/null") {
		t.Error("/dev/null is missing")
	}
	for _, d := range list {
		if strings.HasPrefix(d.Path, "/dev/pts/") || d.Path == "/dev/console" || d.Path == "/dev/ptmx" {
			t.Errorf("%s is the container's own", d.Path)
		}
	}
}
