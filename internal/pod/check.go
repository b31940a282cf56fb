package pod

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"sampan.dev/sampan/internal/fsck"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/spec"
)

// CheckConfig says where to look. Running tells of a keeper whether it is alive.
type CheckConfig struct {
	Root, State, NetNS string
	KeeperFor          func(podID string) string
	KeeperDir          func(name string) string
	DefaultHandler     string
	Running            func(keeper string) bool
}

// Checked is what a check of pods has found.
type Checked struct {
	Problems         []fsck.Problem
	Pods, Containers map[string]bool // that there are, by id
}

// What to do about most things.
const (
	nextStart = "the daemon's next start undoes it"
	removePod = "remove the pod"
)

// Check compares the records of pods and containers with what there is of them:
// processes, mounts, namespaces, the keepers' files. It changes nothing.
func Check(cfg CheckConfig) (Checked, error) {
	c := &checker{
		Pods: &Pods{
			cfg:   Config{Root: cfg.Root, State: cfg.State, NetNS: cfg.NetNS, KeeperFor: cfg.KeeperFor, DefaultHandler: cfg.DefaultHandler},
			paths: paths{cfg.Root, cfg.State, cfg.NetNS},
		},
		cfg: cfg, pods: make(map[string]*Pod),
		found: Checked{Pods: make(map[string]bool), Containers: make(map[string]bool)},
	}
	points, err := host.MountPoints(cfg.State)
	if err != nil {
		return c.found, err
	}
	c.mounted = make(map[string]bool, len(points))
	for _, p := range points {
		c.mounted[p] = true
	}
	for _, step := range []func() error{c.checkPods, c.checkContainers, c.checkNobodys} {
		if err := step(); err != nil {
			return c.found, err
		}
	}
	return c.found, nil
}

type checker struct {
	*Pods
	cfg     CheckConfig
	pods    map[string]*Pod
	mounted map[string]bool
	found   Checked
}

func (c *checker) problem(object fmt.Stringer, remedy, format string, args ...any) {
	c.found.Problems = append(c.found.Problems, fsck.Problem{Object: object.String(), What: fmt.Sprintf(format, args...), Remedy: remedy})
}

// object is one whose name nobody knows.
type object string

func (o object) String() string { return string(o) }

func (c *checker) checkPods() error {
	ids, err := names(c.paths.pods())
	for _, id := range ids {
		if c.unbegun(id) {
			c.problem(object("pod "+short(id)), nextStart, "its making was cut off at once")
			continue
		}
		newer := len(c.newer)
		p := c.loadPod(id)
		c.found.Pods[id], c.pods[id] = true, p
		switch {
		case len(c.newer) > newer:
			c.problem(p, fsck.NewerWrote, "%v", errors.Join(c.newer[newer:]...))
		case p.phase == making:
			c.problem(p, nextStart, "its making was cut off")
		case p.phase == stopped && strings.HasPrefix(p.Config.GetMetadata().GetName(), "unreadable-"):
			c.problem(p, removePod, "%s", p.problem)
		case p.phase == ready:
			c.checkReady(p)
		}
	}
	return err
}

// checkReady looks for all that a pod has while it is ready.
func (c *checker) checkReady(p *Pod) {
	has := spec.NamespacesOf(p.Config.PodSandboxConfig)
	pins := c.namespaces(p)
	for kind, pin := range map[string]string{"network": pins.Net, "IPC": pins.IPC, "UTS": pins.UTS} {
		if pin != "" && !host.Pinned(pin) {
			c.problem(p, removePod, "its %s namespace is gone: nothing is pinned on %s", kind, pin)
		}
	}
	if has.PID && !host.Pinned(c.pinned(p.ID, "pid")) {
		c.problem(p, removePod, "its PID namespace is gone: nothing is pinned on %s", c.pinned(p.ID, "pid"))
	}
	if shm := c.shm(p); has.IPC && !c.mounted[shm] {
		c.problem(p, removePod, "its /dev/shm is not mounted on %s", shm)
	}
	f := c.files(p)
	for _, path := range []string{f.ResolvConf, f.Hostname, f.Hosts} {
		if _, err := os.Lstat(path); err != nil {
			c.problem(p, removePod, "%v", err)
		}
	}
}

func (c *checker) checkContainers() error {
	ids, err := names(c.paths.containers())
	for _, id := range ids {
		newer := len(c.newer)
		ct, made, err := c.loadContainer(id)
		name := fmt.Stringer(object("container " + short(id)))
		if ct != nil {
			name = ct
		}
		switch {
		case len(c.newer) > newer:
			c.problem(name, fsck.NewerWrote, "%v", errors.Join(c.newer[newer:]...))
		case ct == nil && errors.Is(err, os.ErrNotExist):
			c.problem(name, nextStart, "its making was cut off at once")
			continue
		case err != nil:
			c.problem(name, "remove the container", "%v", err)
		case c.pods[ct.PodID] == nil:
			c.problem(name, nextStart, "there is no pod %s", short(ct.PodID))
		case ct.problem != "":
			c.problem(name, "remove the container", "%s", ct.problem)
		case !made:
			c.problem(name, nextStart, "its making was cut off")
		case ct.exit == nil:
			c.checkAlive(c.pods[ct.PodID], ct)
		}
		c.found.Containers[id] = true
	}
	return err
}

// checkAlive looks for all that a container has until its end.
func (c *checker) checkAlive(p *Pod, ct *Container) {
	if !c.cfg.Running(p.Keeper) {
		c.problem(ct, "start the daemon, which starts its keeper", "its keeper %s does not run: its output waits", p.Keeper)
	} else if !ct.process.Alive() {
		c.problem(ct, "remove the container", "its process %d is gone and its keeper has not recorded how it ended", ct.process.Pid)
	}
	dir := c.cfg.KeeperDir(p.Keeper)
	if !keeper.Holds(dir, ct.ID) {
		c.problem(ct, "remove the container", "its keeper does not know it")
	} else if missing := keeper.Missing(dir, ct.ID, ct.Config.GetTty()); missing != "" {
		c.problem(ct, "remove the container", "its keeper lacks %s", missing)
	}
	if !c.mounted[c.paths.rootfs(ct.ID)] {
		c.problem(ct, "remove the container", "its root file system is not mounted on %s", c.paths.rootfs(ct.ID))
	}
	if log := logPath(p, ct); log != "" {
		if _, err := os.Lstat(log); err != nil {
			c.problem(ct, "have the log reopened (the kubelet does), or its output goes to a file without a name", "%v", err)
		}
	}
}

// checkNobodys looks for what belongs to no pod and no container.
func (c *checker) checkNobodys() error {
	var errs []error
	for kind, known := range map[string]map[string]bool{"pods": c.found.Pods, "containers": c.found.Containers} {
		dir := filepath.Join(c.paths.state, kind)
		ids, err := names(dir)
		errs = append(errs, err)
		for _, id := range ids {
			if path := filepath.Join(dir, id); !known[id] {
				c.nobodys("directory "+path, func() error { return c.removeStateDir(path) })
			}
		}
	}
	trash, err := names(c.paths.trash())
	errs = append(errs, err)
	for _, name := range trash {
		path := filepath.Join(c.paths.trash(), name)
		c.nobodys("directory "+path, func() error { return os.RemoveAll(path) })
	}
	return errors.Join(append(errs, c.checkPins(), c.checkCgroups(), c.checkContainerCgroups())...)
}

func (c *checker) nobodys(what string, repair func() error) {
	c.found.Problems = append(c.found.Problems, fsck.Problem{Object: what, What: "it is nobody's", Remedy: nextStart, Repair: repair})
}

// checkPins looks for network namespaces of no pod. Another daemon's are not told
// from ours.
func (c *checker) checkPins() error {
	pins, err := filepath.Glob(c.paths.netNS("*"))
	for _, pin := range pins {
		if c.ownerOf(strings.TrimPrefix(filepath.Base(pin), "sampan-")) == "" {
			c.found.Problems = append(c.found.Problems, fsck.Problem{
				Object: "namespace " + pin, What: "it belongs to no pod", Remedy: "if no other daemon on this host has it: ip netns delete " + filepath.Base(pin),
			})
		}
	}
	return err
}

// checkCgroups does the same for the cgroups of pods.
func (c *checker) checkCgroups() error {
	seen := make(map[string]bool)
	for _, pattern := range []string{"/sys/fs/cgroup" + ownCgroup("*"), "/sys/fs/cgroup/*" + ownCgroup("*")} {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			name := filepath.Base(dir)
			if !seen[name] && c.ownerOf(strings.TrimPrefix(name, "sampan-")) == "" {
				c.found.Problems = append(c.found.Problems, fsck.Problem{
					Object: "cgroup " + dir, What: "it belongs to no pod", Remedy: "if no other daemon on this host has it, and it has no processes: rmdir it, in every hierarchy",
				})
			}
			seen[name] = true
		}
	}
	return nil
}

// checkContainerCgroups looks below the cgroups of pods for those of containers that
// are gone, which may have processes still.
func (c *checker) checkContainerCgroups() error {
	roots, err := host.CgroupRoots()
	seen := make(map[string]bool)
	for _, p := range c.pods {
		if !ownsCgroup(p) {
			continue
		}
		for _, root := range roots {
			ids, nerr := names(filepath.Join(root, p.Cgroup))
			err = errors.Join(err, nerr)
			for _, id := range ids {
				if seen[id] || !idPattern.MatchString(id) || id == p.ID || c.found.Containers[id] {
					continue
				}
				seen[id] = true
				cgroup := filepath.Join(p.Cgroup, id)
				c.nobodys("cgroup "+cgroup, func() error { return killCgroupAt(cgroup) })
			}
		}
	}
	return err
}

// idPattern is what ids of pods and containers look like; see newID.
var idPattern = regexp.MustCompile("^[0-9a-f]{64}$")

// ownsCgroup tells whether nobody but the pod has anything in its cgroup.
func ownsCgroup(p *Pod) bool {
	uid := p.Config.GetMetadata().GetUid()
	return p.Unit != "" || p.Cgroup == ownCgroup(p.ID) || uid != "" && strings.Contains(p.Cgroup, uid)
}

// ownerOf returns the pod whose id begins so.
func (c *checker) ownerOf(prefix string) string {
	for id := range c.found.Pods {
		if strings.HasPrefix(id, prefix) {
			return id
		}
	}
	return ""
}

func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	all := make([]string, 0, len(entries))
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all, ignoreAbsent(err)
}
