package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestManual: each command that people see has a page, with its options.
func TestManual(t *testing.T) {
	dir := t.TempDir()
	cmd := newCommand()
	if err := writeManual(cmd, dir); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(dir, "sampan-serve.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{".TH SAMPAN-SERVE 1", `sampan\-serve \- Run the daemon`, `\-\-config FILE`, `sampan(1)`} {
		if !strings.Contains(string(page), want) {
			t.Errorf("sampan-serve.1 lacks %q:\n%s", want, page)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "sampan-image-pull.1")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "sampan-man.1")); err == nil {
		t.Error("a hidden command has a page")
	}
}

func TestRoff(t *testing.T) {
	if got := roff(".a\n'b-c\\d"); got != "\\&.a\n\\&'b\\-c\\ed" {
		t.Errorf("%q", got)
	}
}
