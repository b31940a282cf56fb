// Package state reads and writes records: small files, one writer each, that
// together are everything Sampan knows. A record is replaced atomically, names
// its kind and version, and carries a checksum, so that a reader sees the old
// content, the new content, or an error that says the file is damaged.
//
// A record is one header line followed by indented JSON, made to be read with
// cat:
//
//	sampan pod-config v1 crc32c:9a3f00d1 412
//	{ ...412 bytes... }
//
// The package knows nothing of what the records mean.
package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sampan.dev/sampan/internal/fault"
)

// ErrDamaged marks a record whose content does not match its header.
var ErrDamaged = errors.New("record is damaged")

// ErrVersion marks a record written in a version this build does not know.
var ErrVersion = errors.New("record has an unknown version")

// maxRecord bounds what Read loads into memory, in bytes.
const maxRecord = 64 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Kind names one type of record and the version this build writes. Older
// versions that this build still reads are listed in Reads.
type Kind struct {
	Name    string // e.g. "pod-config"; no spaces
	Version int    // the version Write writes
	Reads   []int  // further versions Read accepts
}

// Durability says what a Write waits for.
type Durability int

const (
	// Volatile returns when the record is in the page cache: it survives the
	// death of every process, but perhaps not a power loss. After a power
	// loss the record is the old one, the new one, absent or damaged.
	Volatile Durability = iota
	// Durable returns when the record and its name are on disk.
	Durable
)

// Write replaces the record at path with v as JSON. The directory must exist.
// On error the old record, if any, is untouched and no temporary file stays.
func Write(path string, kind Kind, v any, d Durability) error {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode record %s: %w", path, err)
	}
	body = append(body, '\n')
	header := fmt.Sprintf("sampan %s v%d crc32c:%08x %d\n", kind.Name, kind.Version, crc32.Checksum(body, castagnoli), len(body))
	fault.Record(kind.Name, "begin")
	if err := replace(path, kind, append([]byte(header), body...), d); err != nil {
		return fmt.Errorf("write record %s: %w", path, err)
	}
	fault.Record(kind.Name, "written")
	return nil
}

// Read loads the record at path into v. The error wraps fs.ErrNotExist,
// ErrDamaged or ErrVersion where that is the cause.
func Read(path string, kind Kind, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	if info.Size() > maxRecord {
		return fmt.Errorf("read record %s: %w: %d bytes is more than a record can have", path, ErrDamaged, info.Size())
	}
	data := make([]byte, info.Size())
	if _, err := io.ReadFull(f, data); err != nil {
		return fmt.Errorf("read record %s: %w", path, err)
	}
	if err := Decode(data, kind, v); err != nil {
		return fmt.Errorf("read record %s: %w", path, err)
	}
	return nil
}

// Decode parses the bytes of a record into v; see Read for its errors.
func Decode(data []byte, kind Kind, v any) error {
	header, body, ok := bytes.Cut(data, []byte("\n"))
	if !ok {
		return fmt.Errorf("%w: no header line", ErrDamaged)
	}
	var (
		name            string
		version, length int
		sum             uint32
	)
	if n, err := fmt.Sscanf(string(header), "sampan %s v%d crc32c:%x %d", &name, &version, &sum, &length); n != 4 || err != nil {
		return fmt.Errorf("%w: the header line is not a record's", ErrDamaged)
	}
	if name != kind.Name {
		return fmt.Errorf("%w: it is a %q record, not a %q record", ErrDamaged, name, kind.Name)
	}
	if len(body) != length || crc32.Checksum(body, castagnoli) != sum {
		return fmt.Errorf("%w: content does not match its checksum", ErrDamaged)
	}
	if !kind.knows(version) {
		return fmt.Errorf("%w: v%d of %s, and this sampan knows v%d: start the one that wrote it; it is not touched", ErrVersion, version, name, kind.Version)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

func (k Kind) knows(version int) bool {
	if version == k.Version {
		return true
	}
	for _, v := range k.Reads {
		if v == version {
			return true
		}
	}
	return false
}

// Exists reports whether a record stands at path, damaged or not.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Remove deletes the record at path; it is no error if there is none.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// tmpPrefix marks files that a killed Write left behind; see SweepTemporary.
const tmpPrefix = ".tmp-"

func replace(path string, kind Kind, data []byte, d Durability) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), tmpPrefix+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if d == Durable {
		if err = f.Sync(); err != nil {
			return err
		}
	}
	if err = f.Close(); err != nil {
		return err
	}
	fault.Record(kind.Name, "temporary")
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	if d == Durable {
		return SyncDir(filepath.Dir(path))
	}
	return nil
}

// SyncDir puts the names in dir on disk.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// SweepTemporary removes what killed Writes left in dir. The caller makes sure
// that nobody writes there at the same time.
func SweepTemporary(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			if err := Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
