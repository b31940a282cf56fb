package state

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type thing struct {
	Name string `json:"name"`
	N    int    `json:"n"`
}

var kind = Kind{Name: "thing", Version: 2, Reads: []int{1}}

func TestRoundTrip(t *testing.T) {
	for _, d := range []Durability{Volatile, Durable} {
		path := filepath.Join(t.TempDir(), "r")
		want := thing{"a", 7}
		if err := Write(path, kind, want, d); err != nil {
			t.Fatal(err)
		}
		if err := Write(path, kind, want, d); err != nil {
			t.Fatalf("replace: %v", err)
		}
		var got thing
		if err := Read(path, kind, &got); err != nil || got != want {
			t.Fatalf("got %+v, %v; want %+v", got, err, want)
		}
		if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
			t.Fatalf("left behind: %v", entries)
		}
	}
}

func TestReadErrors(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	if err := Write(good, kind, thing{"a", 7}, Volatile); err != nil {
		t.Fatal(err)
	}
	data, _ := os.ReadFile(good)
	flipped := []byte(strings.Replace(string(data), `"a"`, `"b"`, 1))
	tests := map[string]struct {
		data []byte
		kind Kind
		want error
	}{
		"empty":       {nil, kind, ErrDamaged},
		"truncated":   {data[:len(data)-2], kind, ErrDamaged},
		"flipped":     {flipped, kind, ErrDamaged},
		"garbage":     {[]byte("hello\nworld"), kind, ErrDamaged},
		"other kind":  {data, Kind{Name: "other", Version: 2}, ErrDamaged},
		"old version": {[]byte(strings.Replace(string(data), " v2 ", " v1 ", 1)), kind, nil},
		"new version": {[]byte(strings.Replace(string(data), " v2 ", " v3 ", 1)), kind, ErrVersion},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "r")
			if err := os.WriteFile(path, tt.data, 0o600); err != nil {
				t.Fatal(err)
			}
			var got thing
			if err := Read(path, tt.kind, &got); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
		})
	}
	var got thing
	if err := Read(filepath.Join(dir, "absent"), kind, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("absent record: %v", err)
	}
}

func TestWriteFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "r")
	// A directory in the record's place makes the rename fail, for root too.
	if err := os.MkdirAll(filepath.Join(target, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Write(target, kind, thing{}, Volatile); err == nil {
		t.Fatal("no error")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Fatalf("left behind: %v", entries)
	}
}

func TestSweepTemporary(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".tmp-r-1", "r"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := SweepTemporary(dir); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != "r" {
		t.Fatalf("got %v", entries)
	}
}

func FuzzDecode(f *testing.F) {
	path := filepath.Join(f.TempDir(), "r")
	if err := Write(path, kind, thing{"a", 7}, Volatile); err != nil {
		f.Fatal(err)
	}
	data, _ := os.ReadFile(path)
	f.Add(data)
	f.Add([]byte("sampan thing v2 crc32c:00000000 0\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got thing
		if err := Decode(data, kind, &got); err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
			t.Fatalf("unclassified error: %v", err)
		}
	})
}
