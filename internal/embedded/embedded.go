// Package embedded owns the programs that the sampan binary carries: the
// keeper, the pods' init, and the web server of the first image. `make` builds
// them into the directory files; a binary built without them says so when one
// is needed, so that the packages can be compiled and tested on their own.
//
// It must not run the programs or know what they do.
package embedded

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"sampan.dev/sampan/internal/fault"
)

// Program is one embedded program.
type Program struct {
	Name   string // "keeper"
	Digest string // SHA-256 in hex, of the content, taken when it was built
	path   string
}

// Keeper is the parent of every container: cmd/sampan-keeper.
func Keeper() (Program, error) { return find("keeper") }

// Init is PID 1 of pods that share a PID namespace: cmd/sampan-init.
func Init() (Program, error) { return find("init") }

// Hello is the web server of the first image: cmd/sampan-hello.
func Hello() (Program, error) { return find("hello") }

// find reads the digest only. The programs' own pages stay on disk until they
// are needed, which after the first start of a build is never.
func find(name string) (Program, error) {
	sum, err := files.ReadFile(dir + "/" + name + ".sha256")
	if err != nil {
		return Program{}, fmt.Errorf("program %s: this binary was built without it, build with `make`: %w", name, errdefs.ErrNotFound)
	}
	digest, _, _ := strings.Cut(strings.TrimSpace(string(sum)), " ")
	if b, err := hex.DecodeString(digest); err != nil || len(b) != sha256.Size {
		return Program{}, fmt.Errorf("program %s: digest %q: %w", name, digest, errdefs.ErrDataLoss)
	}
	return Program{Name: name, Digest: digest, path: dir + "/" + name}, nil
}

// Bytes returns the program.
func (p Program) Bytes() ([]byte, error) {
	b, err := files.ReadFile(p.path)
	if err != nil {
		return nil, fmt.Errorf("program %s: %w", p.Name, err)
	}
	sum := sha256.Sum256(b)
	return b, p.check(sum[:])
}

func (p Program) check(sum []byte) error {
	if hex.EncodeToString(sum) != p.Digest {
		return fmt.Errorf("program %s: content does not match its digest, build again with `make`: %w", p.Name, errdefs.ErrDataLoss)
	}
	return nil
}

// Unpack makes sure that the program stands in dir, under a name that changes
// with its content, and returns its path. A file that is there with the right
// size is taken to be right: it was renamed into place when it was on disk.
func (p Program) Unpack(dir string) (string, error) {
	target := filepath.Join(dir, p.Name+"-"+p.Digest[:12])
	f, err := files.Open(p.path)
	if err != nil {
		return "", fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	want, err := f.Stat()
	f.Close()
	if err != nil {
		return "", fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	if got, err := os.Lstat(target); err == nil && got.Mode().IsRegular() && got.Mode().Perm() == 0o755 && got.Size() == want.Size() {
		return target, nil
	}
	content, err := files.Open(p.path)
	if err != nil {
		return "", err
	}
	defer content.Close()
	if err := install(target, content, p.check); err != nil {
		return "", fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	return target, nil
}

// install writes an executable file, all of it or nothing, onto the disk, if
// check agrees with the SHA-256 of its content. It goes there in small pieces: the
// whole would stay in the heap for long.
func install(target string, content io.Reader, check func(sum []byte) error) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(target), ".tmp-"+filepath.Base(target)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone after the rename
	defer f.Close()           // closed before the rename
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, sum), content); err != nil {
		return err
	}
	if err := check(sum.Sum(nil)); err != nil {
		return err
	}
	if err := f.Chmod(0o755); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	fault.Point("program.written")
	return os.Rename(f.Name(), target)
}

// Sweep removes the programs of earlier builds from dir, and files half written,
// but what is named in keep and what a process executes.
func Sweep(dir string, keep ...string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep programs: %w", err)
	}
	var old []string
	for _, e := range entries {
		if path := filepath.Join(dir, e.Name()); !slices.Contains(keep, path) {
			old = append(old, path)
		}
	}
	if len(old) == 0 {
		return nil
	}
	executed, err := executed()
	if err != nil {
		return fmt.Errorf("sweep programs: %w", err)
	}
	var errs []error
	for _, path := range old {
		if !executed[path] {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// executed returns the programs of all processes.
func executed() (map[string]bool, error) {
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	programs := make(map[string]bool)
	for _, link := range links {
		if path, err := os.Readlink(link); err == nil {
			programs[path] = true
		}
	}
	return programs, err
}
