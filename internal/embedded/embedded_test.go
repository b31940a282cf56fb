package embedded

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestInstall(t *testing.T) {
	target := filepath.Join(t.TempDir(), "bin", "keeper-0123")
	for _, content := range []string{"one", "another"} {
		if err := install(target, strings.NewReader(content), func([]byte) error { return nil }); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(target)
		if err != nil || string(got) != content {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	damaged := errors.New("damaged")
	if err := install(target, strings.NewReader("damaged"), func([]byte) error { return damaged }); !errors.Is(err, damaged) {
		t.Errorf("content with another digest: %v", err)
	}
	if got, err := os.ReadFile(target); err != nil || string(got) != "another" {
		t.Errorf("content with another digest was written: %q, %v", got, err)
	}
	entries, err := os.ReadDir(filepath.Dir(target))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if info, _ := os.Stat(target); info.Mode().Perm() != 0o755 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestFindOfAnUnknownProgram(t *testing.T) {
	if _, err := find("nothing"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// With the programs built in, each unpacks to its own content, and a file that
// was cut short is replaced. Without them each says that they are missing.
func TestPrograms(t *testing.T) {
	for _, program := range []func() (Program, error){Keeper, Init, Hello} {
		p, err := program()
		if errors.Is(err, errdefs.ErrNotFound) {
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		dir := t.TempDir()
		want, err := p.Bytes()
		if err != nil {
			t.Error(err)
			continue
		}
		path, err := p.Unpack(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 10); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if path, err = p.Unpack(dir); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: unpacked %d bytes of %d, %v", p.Name, len(got), len(want), err)
		}
	}
}
