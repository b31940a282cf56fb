package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
)

// Usage is what files take on disk.
type Usage struct{ Bytes, Inodes uint64 }

// ErrTooMany is returned when there is more to count than was allowed.
var ErrTooMany = errors.New("too many files to count")

// Measure counts what the files below dir take on disk. Files with several names
// count once. What disappears while it looks is not counted. An absent dir takes
// nothing. If limit is positive and there are more files than that, the error is
// ErrTooMany.
func Measure(ctx context.Context, dir string, limit int) (Usage, error) {
	var u Usage
	linked := make(map[uint64]bool)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if st.Nlink > 1 && !d.IsDir() {
			if linked[st.Ino] {
				return nil
			}
			linked[st.Ino] = true
		}
		u.Bytes += uint64(st.Blocks) * 512
		u.Inodes++
		if limit > 0 && u.Inodes > uint64(limit) {
			return ErrTooMany
		}
		return nil
	})
	if err != nil {
		return Usage{}, fmt.Errorf("measure %s: %w", dir, err)
	}
	return u, nil
}
