package host

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestReadNow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, size := range []int{0, 1, 511, 512, 513, 100000} {
		want := bytes.Repeat([]byte("x"), size)
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readNow(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("of %d bytes: %d, error %v", size, len(got), err)
		}
	}
	if _, err := readNow(path + "-not"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	if _, err := readNow(filepath.Dir(path)); err == nil {
		t.Error("a directory: no error")
	}
}
