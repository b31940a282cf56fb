package vm

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// bootModules are what it takes to mount the root file system and to talk to
// the host; the guest's udev and the kernel load all others. The generic
// checksum is asked for by ext4 through a program that is not there yet.
var bootModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4"}

// moduleArchive is a cpio archive of the modules for booting, below /modules in
// the order in which they have to be loaded. What the kernel has built in is
// left out.
func moduleArchive(ctx context.Context, dir string) ([]byte, error) {
	needs, err := readDependencies(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	var order []string
	seen := map[string]bool{}
	for _, name := range bootModules {
		path, ok := needs.find(name)
		if !ok {
			continue
		}
		// The list begins with what has to be loaded last.
		for i := len(needs[path]) - 1; i >= -1; i-- {
			module := path
			if i >= 0 {
				module = needs[path][i]
			}
			if !seen[module] {
				seen[module] = true
				order = append(order, module)
			}
		}
	}
	var archive bytes.Buffer
	writeEntry(&archive, "modules", 0o40755, nil)
	for i, module := range order {
		data, err := readModule(ctx, filepath.Join(dir, module))
		if err != nil {
			return nil, err
		}
		name, _, _ := strings.Cut(filepath.Base(module), ".ko")
		writeEntry(&archive, fmt.Sprintf("modules/%02d-%s.ko", i, name), 0o100644, data)
	}
	endArchive(&archive)
	return archive.Bytes(), nil
}

// dependencies are modules.dep: of each module, all that must be loaded before.
type dependencies map[string][]string

func readDependencies(path string) (dependencies, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	needs := dependencies{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if module, list, ok := strings.Cut(lines.Text(), ":"); ok {
			needs[module] = strings.Fields(list)
		}
	}
	return needs, lines.Err()
}

func (d dependencies) find(name string) (string, bool) {
	for path := range d {
		if base, _, _ := strings.Cut(filepath.Base(path), ".ko"); strings.ReplaceAll(base, "-", "_") == name {
			return path, true
		}
	}
	return "", false
}

func readModule(ctx context.Context, path string) ([]byte, error) {
	if strings.HasSuffix(path, ".xz") {
		return exec.CommandContext(ctx, "xz", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// writeEntry adds a file to a cpio archive of the kind that the kernel unpacks
// ("newc"). The mode includes the type.
func writeEntry(b *bytes.Buffer, name string, mode uint32, data []byte) {
	const owner, group, links, mtime, device = 0, 0, 1, 0, 0
	fmt.Fprintf(b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		b.Len()+1, mode, owner, group, links, mtime, len(data), device, device, device, device, len(name)+1, 0)
	b.WriteString(name)
	b.WriteByte(0)
	pad(b)
	b.Write(data)
	pad(b)
}

func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

func endArchive(b *bytes.Buffer) { writeEntry(b, "TRAILER!!!", 0, nil) }
