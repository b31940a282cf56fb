// Package stats reads what pods and containers use: the figures of cgroups, file
// systems and network interfaces, as the CRI's statistics and metrics.
//
// Everything is read when it is asked for, straight from the kernel's files; no
// goroutine polls. Two things are remembered: an earlier CPU figure of each
// cgroup, because a rate needs two, and what writable layers hold, because
// counting that means looking at each of their files.
//
// The package must not know how pods come about: it is told where to look.
package stats

import (
	"log/slog"
	"math"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Container is where to look for a container's figures.
type Container struct {
	ID         string
	Attributes *runtimeapi.ContainerAttributes
	Alive      bool      // it has been created and has not exited
	StartedAt  time.Time // zero if it has not been started
	Pid        int       // of its first process
	Cgroup     string    // below the root of every hierarchy
	Writable   string    // the directory with what it has written
	Image      string    // by name, for metrics
	Resources  *runtimeapi.LinuxContainerResources
}

// Pod is where to look for a pod's figures.
type Pod struct {
	ID         string
	Attributes *runtimeapi.PodSandboxAttributes
	Alive      bool // it has not been stopped
	CreatedAt  time.Time
	Cgroup     string // of all its containers together
	NetNS      string // the file that pins its network namespace; empty on the host's network
	Containers []Container
}

// Config is what a Collector is made of.
type Config struct {
	Cgroups    map[string]string // roots of the hierarchies, see host.CgroupRoots
	Filesystem string            // a directory that names the file system of writable layers
	Logger     *slog.Logger
}

// Collector reads figures. Its methods may be called at the same time.
type Collector struct {
	cgroups *cgroups
	sys     string // where sysfs is
	proc    string // where procfs is
	log     *slog.Logger
	layers  layers
	links   links
	blocks  blockDevices

	mu  sync.Mutex
	cpu map[string]*cpuSamples // by id of a container or pod
}

// New returns a Collector that reads the given hierarchies.
func New(cfg Config) *Collector {
	c := &Collector{cgroups: newCgroups(cfg.Cgroups), sys: "/sys", proc: "/proc", log: cfg.Logger, cpu: make(map[string]*cpuSamples)}
	c.layers.start(cfg.Filesystem, cfg.Logger)
	return c
}

// Close ends what goes on in the background.
func (c *Collector) Close() {
	c.layers.stop()
	c.cgroups.release(time.Now())
	c.links.close()
}

// Forget drops what is remembered of all that is not live. It does nothing
// while there is no more than the number of live ones.
func (c *Collector) Forget(number int, live func(id string) bool) {
	c.mu.Lock()
	if len(c.cpu) > number {
		for id := range c.cpu {
			if !live(id) {
				delete(c.cpu, id)
			}
		}
	}
	c.mu.Unlock()
	c.layers.forget(number, live)
}

// Container returns a container's figures. What cannot be read, as all of its
// cgroup when it has exited, is absent. It does not wait for anybody.
func (c *Collector) Container(ctr Container) *runtimeapi.ContainerStats {
	st := &runtimeapi.ContainerStats{Attributes: ctr.Attributes, WritableLayer: c.layers.usage(ctr.ID, ctr.Writable)}
	if !ctr.Alive {
		return st
	}
	u := c.cgroups.usage(ctr.Cgroup)
	st.Cpu, st.Memory, st.Swap, st.Io = c.cpuUsage(ctr.ID, ctr.StartedAt, u), u.memoryUsage(), u.swapUsage(), u.ioUsage()
	return st
}

// Pod returns a pod's figures with those of its containers.
func (c *Collector) Pod(p Pod) *runtimeapi.PodSandboxStats {
	st := &runtimeapi.LinuxPodSandboxStats{}
	for _, ctr := range p.Containers {
		st.Containers = append(st.Containers, c.Container(ctr))
	}
	if p.Alive {
		u := c.cgroups.usage(p.Cgroup)
		st.Cpu, st.Memory, st.Io = c.cpuUsage(p.ID, p.CreatedAt, u), u.memoryUsage(), u.ioUsage()
		st.Process = c.processUsage(p)
		st.Network = c.networkUsage(p)
	}
	return &runtimeapi.PodSandboxStats{Attributes: p.Attributes, Linux: st}
}

func (c *Collector) processUsage(p Pod) *runtimeapi.ProcessUsage {
	procs, err := c.cgroups.processes(p.Cgroup)
	if err != nil {
		return nil
	}
	return &runtimeapi.ProcessUsage{Timestamp: time.Now().UnixNano(), ProcessCount: number(uint64(len(procs)))}
}

func (c *Collector) cpuUsage(id string, since time.Time, u usage) *runtimeapi.CpuUsage {
	if !u.hasCPU {
		return nil
	}
	cpu := &runtimeapi.CpuUsage{Timestamp: u.at.UnixNano(), UsageCoreNanoSeconds: number(u.cpu), Psi: u.cpuPressure}
	if rate, ok := c.cpuRate(id, since, cpuSample{u.at, u.cpu}); ok {
		cpu.UsageNanoCores = number(rate)
	}
	return cpu
}

func (u usage) memoryUsage() *runtimeapi.MemoryUsage {
	if !u.hasMemory {
		return nil
	}
	working := minus(u.memory, u.inactiveFile)
	m := &runtimeapi.MemoryUsage{
		Timestamp: u.at.UnixNano(), WorkingSetBytes: number(working), UsageBytes: number(u.memory), RssBytes: number(u.anonymous),
		PageFaults: number(u.faults), MajorPageFaults: number(u.majorFaults), Psi: u.memoryPressure,
	}
	if u.memoryLimit != unlimited {
		m.AvailableBytes = number(minus(u.memoryLimit, working))
	}
	return m
}

func (u usage) swapUsage() *runtimeapi.SwapUsage {
	if !u.hasSwap {
		return nil
	}
	s := &runtimeapi.SwapUsage{Timestamp: u.at.UnixNano(), SwapUsageBytes: number(u.swap)}
	if u.swapLimit != unlimited {
		s.SwapAvailableBytes = number(minus(u.swapLimit, u.swap))
	}
	return s
}

func (u usage) ioUsage() *runtimeapi.IoUsage {
	if u.ioPressure == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: u.at.UnixNano(), Psi: u.ioPressure}
}

func number(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

// unlimited is the limit of what has none.
const unlimited = math.MaxUint64

// minus is a-b, or 0 if b is more: figures read one after the other need not fit.
func minus(a, b uint64) uint64 { return a - min(a, b) }
