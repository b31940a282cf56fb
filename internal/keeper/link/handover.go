package link

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Handover is what a worker that becomes the supervisor, by executing itself,
// leaves to its next life: descriptors, which stay open across it, and what they
// are.
type Handover struct {
	Listener     int       `json:"listener"`
	ExecListener int       `json:"execListener"`
	Lock         int       `json:"lock"`
	Held         []HeldFD  `json:"held"`
	Watched      []Message `json:"watched"` // Watch messages
}

// HeldFD is a held file.
type HeldFD struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	FD   int    `json:"fd"`
}

// Save writes h into a file in memory and returns its descriptor. It, and all
// that h names, stay open in the program executed next.
func (h Handover) Save() (int, error) {
	data, err := json.Marshal(h)
	if err != nil {
		return -1, fmt.Errorf("hand over: %w", err)
	}
	fd, err := unix.MemfdCreate("sampan-handover", 0)
	if err != nil {
		return -1, fmt.Errorf("hand over: memfd: %w", err)
	}
	if _, err := unix.Pwrite(fd, data, 0); err != nil {
		return -1, fmt.Errorf("hand over: %w", err)
	}
	for _, n := range h.fds() {
		if _, err := unix.FcntlInt(uintptr(n), unix.F_SETFD, 0); err != nil {
			return -1, fmt.Errorf("hand over: descriptor %d: %w", n, err)
		}
	}
	return fd, nil
}

// LoadHandover reads what Save wrote, closes fd, and makes sure that no process
// started from now on inherits anything.
func LoadHandover(fd int) (Handover, error) {
	f := os.NewFile(uintptr(fd), "handover")
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Handover{}, fmt.Errorf("take over: %w", err)
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return Handover{}, fmt.Errorf("take over: %w", err)
	}
	var h Handover
	if err := json.Unmarshal(data, &h); err != nil {
		return Handover{}, fmt.Errorf("take over: %w", err)
	}
	var errs []error
	for _, n := range h.fds() {
		_, err := unix.FcntlInt(uintptr(n), unix.F_SETFD, unix.FD_CLOEXEC)
		errs = append(errs, err)
	}
	return h, errors.Join(errs...)
}

func (h Handover) fds() []int {
	fds := []int{h.Listener, h.ExecListener, h.Lock}
	for _, f := range h.Held {
		fds = append(fds, f.FD)
	}
	return fds
}
