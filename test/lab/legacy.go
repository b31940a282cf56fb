package lab

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/host"
)

// HideUnified hides the v2 part of a hybrid cgroup layout from everything in the
// lab until the end of the test, which is then on a machine with v1 alone. Where
// the layout is another one it does nothing. It comes before New.
func HideUnified(t testing.TB) {
	t.Helper()
	Require(t)
	if host.CgroupMode() != host.CgroupHybrid {
		return
	}
	// A read-only directory like the real one: some programs would make the
	// missing one.
	view := t.TempDir()
	must(t, unix.Mount("tmpfs", view, "tmpfs", 0, "mode=755"))
	must(t, unix.Mount("", view, "", unix.MS_PRIVATE, "")) // or its end would be that of its copy
	defer func() { must(t, unix.Unmount(view, unix.MNT_DETACH)) }()
	entries, err := os.ReadDir(cgroupRoot)
	must(t, err)
	for _, e := range entries {
		if from := filepath.Join(cgroupRoot, e.Name()); e.IsDir() && e.Name() != "unified" {
			to := filepath.Join(view, e.Name())
			must(t, os.Mkdir(to, 0o755))
			must(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
		}
	}
	links, err := symlinks(cgroupRoot)
	must(t, err)
	for link, target := range links {
		must(t, os.Symlink(target, filepath.Join(view, filepath.Base(link))))
	}
	must(t, unix.Mount("", view, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	must(t, unix.Mount(view, cgroupRoot, "", unix.MS_BIND|unix.MS_REC, ""))
	t.Cleanup(func() { must(t, unix.Unmount(cgroupRoot, unix.MNT_DETACH)) })
}
