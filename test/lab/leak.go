package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// snapshot is what the daemon could leave behind, as a set of lines such as
// "mount /run/…" or "link vethab12".
type snapshot map[string]bool

func (l *Lab) snapshot() (snapshot, error) {
	s := snapshot{}
	for _, look := range []func(snapshot) error{mounts, links, l.files, l.processes, cgroupDirs, firewall} {
		if err := look(s); err != nil {
			return nil, err
		}
	}
	if OnNode() {
		s.onlyOurs()
	}
	return s, nil
}

// since lists what is in s and was not in before, but for what expected matches.
func (s snapshot) since(before snapshot, expected *regexp.Regexp) []string {
	var left []string
	for line := range s {
		if !before[line] && !expected.MatchString(line) {
			left = append(left, line)
		}
	}
	slices.Sort(left)
	return left
}

func mounts(s snapshot) error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		s["mount "+strings.Fields(line)[4]] = true
	}
	return nil
}

func links(s snapshot) error {
	all, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, link := range all {
		s["link "+link.Attrs().Name] = true
	}
	namespaces, err := filepath.Glob("/run/netns/*")
	for _, path := range namespaces {
		s["netns "+path] = true
	}
	return err
}

func (l *Lab) files(s snapshot) error {
	for _, dir := range []string{l.Root, l.State} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // it is being removed, or is the FIFO's other end; looked at again later
			}
			s["file "+path] = true
			if d.IsDir() && d.Name() == "rootfs" {
				return filepath.SkipDir
			}
			return nil
		})
		if err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// processes lists every process of the lab but the tests themselves and the
// daemon, which is started and stopped by name.
func (l *Lab) processes(s snapshot) error {
	all, err := processes()
	for pid, args := range all {
		if pid == 1 || pid == os.Getpid() || len(args) > 3 && args[1] == "serve" && args[3] == l.config {
			continue
		}
		s[fmt.Sprintf("process %d %s", pid, strings.Join(args, " "))] = true
	}
	return err
}

// processes are the command lines of the lab, by pid; zombies are not counted.
func processes() (map[int][]string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	all := map[int][]string{}
	for _, path := range dirs {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		text, err := os.ReadFile(path)
		if err != nil || len(text) == 0 {
			continue // ended meanwhile
		}
		all[pid] = strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
	}
	return all, nil
}

func cgroupDirs(s snapshot) error {
	return filepath.WalkDir(cgroupRoot, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			s["cgroup "+path] = true
		}
		return nil // a cgroup that goes while it is being read is not left behind
	})
}

var counters = regexp.MustCompile(`counter packets \d+ bytes \d+|# handle \d+|expires \S+`)

func firewall(s snapshot) error {
	out, err := exec.Command("nft", "list", "ruleset").Output()
	if err != nil {
		return fmt.Errorf("nft list ruleset: %w", err)
	}
	table, set, inElements := "", "", false
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(counters.ReplaceAllString(line, ""))
		if strings.HasPrefix(line, "table ") {
			table = strings.TrimSuffix(line, " {")
		}
		if strings.HasPrefix(line, "set ") || strings.HasPrefix(line, "map ") {
			set = line
		}
		inElements = inElements || strings.HasPrefix(line, "elements = {")
		switch {
		case inElements && strings.HasPrefix(set, "set subnets"):
			// The subnets are the node's, from its first pod on.
			s["nft "+table+": "+line] = true
			inElements = !strings.HasSuffix(line, "}")
		case inElements:
			s["element "+table+": "+line] = true
			inElements = !strings.HasSuffix(line, "}")
		case line != "" && line != "}":
			s["nft "+table+": "+line] = true
		}
	}
	return nil
}

// What stays while the daemon runs, once it had a pod: its keeper, the bridge
// and the tables with their chains.
var standing = regexp.MustCompile(`^process \d+ \S*/bin/keeper-|^file .*/(keepers|bin|network/cni/cache|network/builtin/subnets|network/cni/cidrs)(/|$)|^cgroup .*/sampan\.keeper-|^link sampan0$|^nft `)

// What stays when the daemon and its keepers are gone: its directories, the
// bridge and the tables, which the pods of a stopped daemon would still need.
var remaining = regexp.MustCompile(`^file |^link sampan0$|^nft `)

var nothing = regexp.MustCompile(`^$`)

// tearDown removes what the test left, stops the daemon and fails the test if
// anything of the daemon's stays.
func (l *Lab) tearDown(t testing.TB) {
	if t.Failed() {
		t.Log(l.logTail())
	}
	if err := l.Races(); err != nil { // while keepers have their logs
		t.Error(err)
	}
	if l.runs() {
		if err := l.removeAll(); err != nil {
			t.Errorf("remove what the test left: %v\n%s", err, l.logTail())
		}
		if l.ready != nil {
			l.CheckClean(t)
		}
		l.Stop(t)
		if err := l.await(l.fresh, remaining, 30*time.Second); err != nil {
			t.Errorf("with the daemon stopped, %v", err)
		}
	}
	if err := l.reset(); err != nil {
		t.Error(err)
	} else if err := l.await(l.fresh, nothing, 10*time.Second); err != nil {
		t.Errorf("after sampan reset, %v", err)
	}
	if err := l.sweep(); err != nil {
		t.Errorf("make room for the next test: %v", err)
	}
}

// PowerOff ends what a machine's end would end: all processes that are not the
// test's, mounts, links, namespaces, cgroups and the firewall's rules. Files stay.
func (l *Lab) PowerOff() error {
	now, err := l.snapshot()
	if err != nil {
		return err
	}
	if err := l.removeSince(now.since(l.fresh, regexp.MustCompile(`^file |^nft |^element `))); err != nil {
		return err
	}
	return exec.Command("nft", "flush", "ruleset").Run()
}

// reset lets the product remove what it left on purpose.
func (l *Lab) reset() error {
	out, err := exec.Command(l.Binary, "reset", "--yes", "--config", l.config).CombinedOutput()
	if err != nil {
		return fmt.Errorf("sampan reset: %w\n%s", err, out)
	}
	return nil
}

// sweep makes the lab as it was before the daemon first ran, so that the next
// test starts from nothing whatever this one left.
func (l *Lab) sweep() error {
	now, err := l.snapshot()
	if err != nil {
		return err
	}
	if err := l.removeSince(now.since(l.fresh, regexp.MustCompile(`^file |^nft |^element `))); err != nil {
		return err
	}
	if err := os.RemoveAll(l.State); err != nil {
		return err
	}
	return exec.Command("nft", "flush", "ruleset").Run()
}

// removeSince takes away what since has listed.
func (l *Lab) removeSince(left []string) error {
	slices.Reverse(left) // what is below a mount point or in a cgroup first
	for _, kind := range []string{"process", "mount", "link", "netns", "cgroup"} {
		for _, line := range left {
			what, rest, _ := strings.Cut(line, " ")
			if what != kind {
				continue
			}
			if err := remove(kind, rest); err != nil {
				return fmt.Errorf("%s: %w", line, err)
			}
		}
	}
	return nil
}

func remove(kind, what string) error {
	var err error
	switch kind {
	case "process":
		var pid int
		if _, err = fmt.Sscan(what, &pid); err == nil {
			err = ignore(unix.Kill(pid, unix.SIGKILL), unix.ESRCH)
		}
	case "mount":
		err = ignore(unix.Unmount(what, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW), unix.EINVAL, unix.ENOENT)
	case "link":
		var link netlink.Link
		if link, err = netlink.LinkByName(what); err == nil {
			err = ignore(netlink.LinkDel(link), unix.ENODEV)
		} else if errors.As(err, &netlink.LinkNotFoundError{}) {
			err = nil // it went with its peer
		}
	case "netns":
		err = ignore(os.Remove(what), unix.ENOENT)
	case "cgroup":
		// Its processes were killed just now. What stays longer is reported already.
		for range 50 {
			if err = ignore(unix.Rmdir(what), unix.ENOENT); !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		err = ignore(err, unix.EBUSY)
	}
	return err
}

func ignore(err error, these ...error) error {
	for _, this := range these {
		if errors.Is(err, this) {
			return nil
		}
	}
	return err
}

// await waits until nothing is there that was not before.
func (l *Lab) await(before snapshot, expected *regexp.Regexp, limit time.Duration) error {
	if OnNode() {
		limit *= 4 // its processor is emulated, mostly
	}
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		now, err := l.snapshot()
		if err != nil {
			return err
		}
		left := now.since(before, expected)
		if l.Foreign != nil {
			left = slices.DeleteFunc(left, l.Foreign.MatchString)
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d things are %w after %v:\n  %s", len(left), errLeft, limit, strings.Join(first(left, 40), "\n  "))
		}
	}
}

// CheckClean fails the test unless all that was made since the daemon started
// is gone. Pods and images must be removed before.
func (l *Lab) CheckClean(t testing.TB) {
	t.Helper()
	l.check(t, l.ready)
}

// Mark is what there is at some moment of a test.
type Mark struct{ snapshot snapshot }

// Mark remembers what there is now, for CheckSince.
func (l *Lab) Mark(t testing.TB) Mark {
	t.Helper()
	s, err := l.snapshot()
	must(t, err)
	return Mark{s}
}

// CheckSince fails the test unless all that was made since the mark is gone.
func (l *Lab) CheckSince(t testing.TB, m Mark) {
	t.Helper()
	l.check(t, m.snapshot)
}

// LeftSince is an error unless all that was made since the mark is gone, soon.
func (l *Lab) LeftSince(m Mark) error { return l.await(m.snapshot, standing, 15*time.Second) }

func (l *Lab) check(t testing.TB, before snapshot) {
	t.Helper()
	if err := l.await(before, standing, 15*time.Second); err != nil {
		t.Error(err)
	}
}

func first(lines []string, n int) []string {
	if len(lines) > n {
		return append(slices.Clone(lines[:n]), fmt.Sprintf("… and %d more", len(lines)-n))
	}
	return lines
}

// removeAll stops and removes every pod and image.
func (l *Lab) removeAll() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	pods, err := l.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, pod := range pods.GetItems() {
		if _, err := l.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
			return err
		}
		if _, err := l.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
			return err
		}
	}
	list, err := l.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return err
	}
	for _, image := range list.GetImages() {
		if _, err := l.Images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image.GetId()}}); err != nil {
			return err
		}
	}
	return nil
}
