package link

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
)

// WriteStatus writes down how p exited. When path's directory is gone nobody
// wants to know, and that is no error.
func WriteStatus(path string, p host.Process, status unix.WaitStatus) error {
	tmp := filepath.Join(filepath.Dir(path), ".tmp-"+filepath.Base(path))
	err := os.WriteFile(tmp, fmt.Appendf(nil, "%d %d %d\n", p.Pid, p.Start, uint32(status)), 0o600)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write status: %w", err)
	}
	fault.Point("supervisor.status-temporary")
	if err := os.Rename(tmp, path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// ReadStatus returns how p exited, if that was written to path.
func ReadStatus(path string, p host.Process) (unix.WaitStatus, bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	var (
		pid    int
		start  uint64
		status uint32
	)
	if n, err := fmt.Sscanf(string(data), "%d %d %d\n", &pid, &start, &status); n != 3 || err != nil {
		return 0, false
	}
	return unix.WaitStatus(status), pid == p.Pid && start == p.Start
}
