package fault

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// hungFS is a FUSE file system with one file, "file", whose server stops
// answering at some request and for ever, as that of a volume on a dead network
// does. Who asks cannot even be killed.
type hungFS struct {
	dir  string
	fd   int
	hang map[uint32]bool // opcodes that get no answer

	released bool
}

// Opcodes of FUSE, from <linux/fuse.h>.
const (
	fuseLookup  = 1
	fuseGetattr = 3
	fuseOpen    = 14
	fuseRead    = 15
	fuseStatfs  = 17
	fuseInit    = 26
	fuseOpendir = 27
)

// newHungFS mounts one that does not answer the requests of the kinds given.
func newHungFS(t *testing.T, hang ...uint32) *hungFS {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("the kernel has no FUSE: %v", err)
	}
	h := &hungFS{dir: t.TempDir(), fd: fd, hang: map[uint32]bool{}}
	for _, op := range hang {
		h.hang[op] = true
	}
	must(t, unix.Mount("hung", h.dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)))
	served := make(chan struct{})
	go func() {
		defer close(served)
		h.serve()
	}()
	t.Cleanup(func() {
		h.release(t)
		<-served
		unix.Close(fd)
	})
	return h
}

// release lets go of all who wait: what they asked for fails.
func (h *hungFS) release(t *testing.T) {
	t.Helper()
	if h.released {
		return
	}
	h.released = true
	// By force, which ends the connection for all who have the file system mounted.
	if err := unix.Unmount(h.dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
		t.Error(err)
	}
}

// serve answers until the connection ends.
func (h *hungFS) serve() {
	buf := make([]byte, 1<<17)
	for {
		n, err := unix.Read(h.fd, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return
		}
		op, unique := binary.NativeEndian.Uint32(buf[4:]), binary.NativeEndian.Uint64(buf[8:])
		if h.hang[op] {
			continue
		}
		answer, errno := h.answer(op, binary.NativeEndian.Uint64(buf[16:]), buf[40:n])
		head := binary.NativeEndian.AppendUint32(nil, uint32(16+len(answer)))
		head = binary.NativeEndian.AppendUint32(head, uint32(-int32(errno)))
		head = binary.NativeEndian.AppendUint64(head, unique)
		if _, err := unix.Write(h.fd, append(head, answer...)); errors.Is(err, unix.ENODEV) {
			return
		}
	}
}

func (h *hungFS) answer(op uint32, node uint64, body []byte) ([]byte, unix.Errno) {
	var b bytes.Buffer
	put := func(fields ...any) []byte {
		for _, f := range fields {
			_ = binary.Write(&b, binary.NativeEndian, f) // to memory
		}
		return b.Bytes()
	}
	switch op {
	case fuseInit:
		return put(uint32(7), uint32(31), uint32(0), uint32(0), uint16(0), uint16(0), uint32(4096), uint32(1), uint16(1), uint16(0), [8]uint32{}), 0
	case fuseGetattr:
		return put(uint64(0), uint32(0), uint32(0), attributes(node)), 0
	case fuseLookup:
		if string(bytes.TrimRight(body, "\x00")) != "file" {
			return nil, unix.ENOENT
		}
		return put(uint64(2), uint64(0), uint64(0), uint64(0), uint32(0), uint32(0), attributes(2)), 0
	case fuseOpen, fuseOpendir:
		return put(uint64(1), uint32(0), uint32(0)), 0
	case fuseRead:
		return []byte("text"), 0
	case fuseStatfs:
		return make([]byte, 80), 0
	}
	return nil, unix.ENOSYS
}

// attributes is struct fuse_attr of the directory, node 1, or its file.
func attributes(node uint64) []byte {
	mode, size := uint32(unix.S_IFDIR|0o755), uint64(0)
	if node != 1 {
		mode, size = unix.S_IFREG|0o644, 4
	}
	var b bytes.Buffer
	for _, f := range []any{node, size, uint64(0), [3]uint64{}, [3]uint32{}, mode, uint32(1), uint32(0), uint32(0), uint32(0), uint32(4096), uint32(0)} {
		_ = binary.Write(&b, binary.NativeEndian, f) // to memory
	}
	return b.Bytes()
}
