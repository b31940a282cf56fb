package link

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// SaveHeld writes a list of descriptors, as they will be in the program that is
// started with them, into a file in memory.
func SaveHeld(held []HeldFD) (*os.File, error) {
	data, err := json.Marshal(held)
	if err != nil {
		return nil, fmt.Errorf("list held files: %w", err)
	}
	fd, err := unix.MemfdCreate("sampan-held", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("list held files: memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "held")
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("list held files: %w", err)
	}
	return f, nil
}

// LoadHeld reads what SaveHeld wrote, closes fd, and makes sure that no process
// started from now on inherits anything.
func LoadHeld(fd int) ([]HeldFD, error) {
	f := os.NewFile(uintptr(fd), "held")
	defer f.Close()
	var held []HeldFD
	data, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err == nil {
		err = json.Unmarshal(data, &held)
	}
	if err != nil {
		return nil, fmt.Errorf("read list of held files: %w", err)
	}
	for _, h := range held {
		unix.CloseOnExec(h.FD)
		// Starting a program with a file makes it block.
		if err := unix.SetNonblock(h.FD, true); err != nil {
			return nil, fmt.Errorf("take held file %s of %s: %w", h.Name, h.ID, err)
		}
	}
	return held, nil
}

func (h Handover) fds() []int {
	fds := []int{h.Listener, h.ExecListener, h.Lock}
	for _, f := range h.Held {
		fds = append(fds, f.FD)
	}
	return fds
}
