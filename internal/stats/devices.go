package stats

import (
	"bytes"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// traffic is what a cgroup has read from and written to a block device.
type traffic struct {
	major, minor          uint64
	readBytes, writeBytes uint64
	reads, writes         uint64
}

// traffic returns the devices that a cgroup has used.
func (g *cgroups) traffic(r *reader, cgroup string) []traffic {
	if !g.v1() {
		return trafficV2(r.read(g.dir("io", cgroup), "io.stat"))
	}
	dir := g.dir("blkio", cgroup)
	var all []traffic
	for line := range bytes.Lines(r.read(dir, "blkio.throttle.io_service_bytes_recursive")) {
		all = addV1(all, line, func(t *traffic) (read, write *uint64) { return &t.readBytes, &t.writeBytes })
	}
	for line := range bytes.Lines(r.read(dir, "blkio.throttle.io_serviced_recursive")) {
		all = addV1(all, line, func(t *traffic) (read, write *uint64) { return &t.reads, &t.writes })
	}
	return all
}

// addV1 reads a line such as "259:0 Read 4096".
func addV1(all []traffic, line []byte, which func(*traffic) (read, write *uint64)) []traffic {
	fields := bytes.Fields(line)
	if len(fields) != 3 {
		return all
	}
	major, minor, ok := deviceNumber(fields[0])
	v, okV := parseUint(fields[2])
	if !ok || !okV {
		return all
	}
	i := 0
	for i < len(all) && (all[i].major != major || all[i].minor != minor) {
		i++
	}
	if i == len(all) {
		all = append(all, traffic{major: major, minor: minor})
	}
	read, write := which(&all[i])
	switch string(fields[1]) {
	case "Read":
		*read = v
	case "Write":
		*write = v
	}
	return all
}

// trafficV2 reads lines such as "259:0 rbytes=1 wbytes=2 rios=3 wios=4".
func trafficV2(data []byte) []traffic {
	var all []traffic
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if len(fields) < 2 {
			continue // a device that is known, but was not used
		}
		major, minor, ok := deviceNumber(fields[0])
		if !ok {
			continue
		}
		t := traffic{major: major, minor: minor}
		for _, f := range fields[1:] {
			key, text, _ := bytes.Cut(f, []byte{'='})
			v, _ := parseUint(text)
			switch string(key) {
			case "rbytes":
				t.readBytes = v
			case "wbytes":
				t.writeBytes = v
			case "rios":
				t.reads = v
			case "wios":
				t.writes = v
			}
		}
		all = append(all, t)
	}
	return all
}

func deviceNumber(text []byte) (major, minor uint64, ok bool) {
	a, b, _ := bytes.Cut(text, []byte{':'})
	major, okA := parseUint(a)
	minor, okB := parseUint(b)
	return major, minor, okA && okB
}

func (c *Collector) addDevices(m *metrics, r *reader, cgroup string) {
	for _, t := range c.cgroups.traffic(r, cgroup) {
		device := c.blocks.name(c.sys, t.major, t.minor)
		m.add("container_fs_reads_bytes_total", t.readBytes, device)
		m.add("container_fs_reads_total", t.reads, device)
		m.add("container_fs_writes_bytes_total", t.writeBytes, device)
		m.add("container_fs_writes_total", t.writes, device)
		major, minor := strconv.FormatUint(t.major, 10), strconv.FormatUint(t.minor, 10)
		m.add("container_blkio_device_usage_total", t.readBytes, device, major, minor, "Read")
		m.add("container_blkio_device_usage_total", t.writeBytes, device, major, minor, "Write")
	}
}

// addFilesystem adds what the container has written, and the file system that it
// is in.
func (c *Collector) addFilesystem(m *metrics, ctr Container) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if unix.Stat(ctr.Writable, &st) != nil || unix.Statfs(ctr.Writable, &fs) != nil {
		return
	}
	device := c.blocks.name(c.sys, uint64(unix.Major(st.Dev)), uint64(unix.Minor(st.Dev)))
	m.add("container_fs_limit_bytes", fs.Blocks*uint64(fs.Bsize), device)
	m.add("container_fs_inodes_total", fs.Files, device)
	m.add("container_fs_inodes_free", fs.Ffree, device)
	if u := c.layers.usage(ctr.ID, ctr.Writable); u != nil {
		m.add("container_fs_usage_bytes", u.GetUsedBytes().GetValue(), device)
		m.list[len(m.list)-1].Timestamp = u.GetTimestamp()
	}
}

// blockDevices knows the names of block devices. A file system may be on none.
type blockDevices struct {
	mu    sync.Mutex
	names map[[2]uint64]string
}

func (b *blockDevices) name(sys string, major, minor uint64) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if name, ok := b.names[[2]uint64{major, minor}]; ok {
		return name
	}
	var name string
	r := &reader{}
	for line := range bytes.Lines(r.read(fmt.Sprintf("%s/dev/block/%d:%d", sys, major, minor), "uevent")) {
		if device, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("DEVNAME=")); ok {
			name = "/dev/" + string(device)
		}
	}
	if b.names == nil {
		b.names = make(map[[2]uint64]string)
	}
	b.names[[2]uint64{major, minor}] = name
	return name
}
