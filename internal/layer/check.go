package layer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/state"
)

// contentSum stands for what is in all regular files of a layer, in whatever
// order: it is there to find what a disk or a stranger has changed, not to prove
// anything. The sum of the sums of files costs unpacking nothing that can be
// measured.
type contentSum uint64

// fileSum stands for what is in one file.
type fileSum struct {
	crc  uint32
	size uint64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (f *fileSum) add(p []byte) {
	f.crc = crc32.Update(f.crc, castagnoli, p)
	f.size += uint64(len(p))
}

// add mixes the file's bits well, so that two changes do not make up for each other.
func (s *contentSum) add(f fileSum) {
	x := uint64(f.crc)<<32 ^ f.size + 1
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	*s += contentSum(x ^ x>>31)
}

func (s contentSum) String() string { return fmt.Sprintf("%016x", uint64(s)) }

// Finding is something wrong with the store's files.
type Finding struct {
	Name   string        // of the layer's files, see Store
	DiffID digest.Digest // empty if nobody can tell
	What   string
	// Lost says that the layer is none any more: it has to be fetched again.
	Lost bool
	// Sweep says that it is something of no layer, which the next Open removes.
	Sweep bool
}

// Check compares the layers under root with their records, and reads nothing else.
// With content it reads every file too. It changes nothing and needs no Store.
func Check(ctx context.Context, root string, content bool) ([]Finding, map[digest.Digest]bool, error) {
	var found []Finding
	sound, named := make(map[digest.Digest]bool), make(map[string]bool)
	records, err := readDir(filepath.Join(root, "record"))
	if err != nil {
		return nil, nil, err
	}
	for _, name := range records {
		if strings.HasPrefix(name, ".tmp-") {
			found = append(found, Finding{Name: name, What: "a record that was never finished", Sweep: true})
			continue
		}
		named[name] = true
		f, err := checkOne(ctx, root, name, content)
		if err != nil {
			return nil, nil, err
		}
		if f.What == "" {
			sound[f.DiffID] = true
			continue
		}
		found = append(found, f)
	}
	used, err := usedNames()
	if err != nil {
		return nil, nil, err
	}
	for _, dir := range []string{"tree", "tmp"} {
		names, err := readDir(filepath.Join(root, dir))
		if err != nil {
			return nil, nil, err
		}
		for _, name := range names {
			if (dir == "tmp" || !named[name]) && !used(name) {
				found = append(found, Finding{Name: dir + "/" + name, What: "files of no layer", Sweep: true})
			}
		}
	}
	return found, sound, nil
}

// checkOne looks at one layer. What is empty if all is well.
func checkOne(ctx context.Context, root, name string, content bool) (Finding, error) {
	var r record
	f := Finding{Name: name}
	err := state.Read(filepath.Join(root, "record", name), recordKind, &r)
	switch {
	case errors.Is(err, state.ErrVersion):
		f.What = err.Error()
		return f, nil
	case err != nil:
		f.What, f.Lost = err.Error(), true
		return f, nil
	}
	f.DiffID = r.DiffID
	tree := filepath.Join(root, "tree", name)
	if _, err := os.Lstat(tree); errors.Is(err, fs.ErrNotExist) {
		f.What, f.Lost = "its files are gone", true
		return f, nil
	}
	if !r.Synced && r.Boot != host.BootID() {
		f.What, f.Lost = "the machine went down before its files were on disk", true
		return f, nil
	}
	f.What, err = compare(ctx, tree, r, content)
	f.Lost = f.What != ""
	return f, err
}

// compare counts a layer's files, and reads them if content is set.
func compare(ctx context.Context, tree string, r record, content bool) (what string, err error) {
	var bytes, inodes uint64
	var sum contentSum
	seen := make(map[uint64]bool)
	err = filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st := info.Sys().(*syscall.Stat_t); seen[st.Ino] {
			return nil
		} else if !d.IsDir() && st.Nlink > 1 {
			seen[st.Ino] = true
		}
		inodes++
		if !info.Mode().IsRegular() {
			return nil
		}
		bytes += uint64(info.Size())
		if !content || r.Sum == "" {
			return nil
		}
		one, err := sumFile(path)
		sum.add(one)
		return err
	})
	switch {
	case err != nil && ctx.Err() == nil:
		return "its files cannot be read: " + err.Error(), nil
	case err != nil:
		return "", err
	case inodes != r.Inodes:
		return fmt.Sprintf("it has %d files and directories, not %d", inodes, r.Inodes), nil
	case bytes != r.Bytes:
		return fmt.Sprintf("its files have %d bytes, not %d", bytes, r.Bytes), nil
	case content && r.Sum != "" && sum.String() != r.Sum:
		return "the content of its files has changed", nil
	}
	return "", nil
}

func sumFile(path string) (fileSum, error) {
	f, err := os.Open(path)
	if err != nil {
		return fileSum{}, err
	}
	defer f.Close()
	var sum fileSum
	_, err = io.CopyBuffer(&summer{&sum}, onlyReader{f}, make([]byte, blockSize))
	return sum, err
}

type summer struct{ *fileSum }

func (s *summer) Write(p []byte) (int, error) {
	s.add(p)
	return len(p), nil
}

type onlyReader struct{ io.Reader }

// Drop makes a layer one that is to be fetched again: its record goes. Its files
// go with the next Open, so nothing may be mounted on them.
func Drop(root string, f Finding) error {
	return state.Remove(filepath.Join(root, "record", f.Name))
}

func readDir(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}
