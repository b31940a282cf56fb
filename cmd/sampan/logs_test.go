package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestPrintLog(t *testing.T) {
	const log = "" +
		"2026-01-02T03:04:05.000000006Z stdout F one\n" +
		"2026-01-02T03:04:05.000000007Z stderr F oops\n" +
		"2026-01-02T03:04:05.000000008Z stdout P tw\n" +
		"2026-01-02T03:04:05.000000008Z stdout P o\n" +
		"2026-01-02T03:04:05.000000008Z stdout F  \n" +
		"2026-01-02T03:04:05.000000009Z stdout F \n" +
		"not an entry\n" +
		"2026-01-02T03:04:05.000000010Z stdout F:x cut"
	path := filepath.Join(t.TempDir(), "0.log")
	if err := os.WriteFile(path, []byte(log), 0o640); err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	if err := printLog(path, &logPrinter{out: &out, err: &errOut}); err != nil {
		t.Fatal(err)
	}
	if want := "one\ntwo \n\nnot an entry\ncut\n"; out.String() != want || errOut.String() != "oops\n" {
		t.Errorf("got %q and %q, want %q", out.String(), errOut.String(), want)
	}
	out.Reset()
	if err := printLog(path, &logPrinter{out: &out, err: &errOut, timestamps: true}); err != nil {
		t.Fatal(err)
	}
	mustContain(t, out.String(), "2026-01-02T03:04:05.000000008Z two \n", "0009Z \n")
}

// A log that is rotated under the reader comes out whole and once, and the
// reader ends when the container has.
func TestFollowLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	write := func(s string) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if _, err := f.WriteString(s); err != nil {
			t.Error(err)
		}
	}
	write("t stdout F 1\n")
	var exited atomic.Bool
	written := make(chan struct{})
	go func() {
		defer close(written)
		write("t stdout F 2\nt stdout F ")
		time.Sleep(2 * followEvery)
		write("3\n")
		if err := os.Rename(path, path+".old"); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * followEvery)
		write("t stdout F 4\n")
		exited.Store(true)
	}()
	var out, errOut bytes.Buffer
	err := followLog(t.Context(), path, &logPrinter{out: &out, err: &errOut}, func() (bool, error) { return !exited.Load(), nil })
	<-written
	if err != nil || out.String() != "1\n2\n3\n4\n" {
		t.Errorf("got %q, %v", out.String(), err)
	}
}

func FuzzLogPrinter(f *testing.F) {
	f.Add([]byte("t stdout F x\nt stderr P y\n"), 3)
	f.Add([]byte("\n\n  \nt stdout :F x"), 1)
	f.Fuzz(func(t *testing.T, log []byte, cut int) {
		if cut < 0 || cut > len(log) {
			cut = len(log) / 2
		}
		var whole, pieces bytes.Buffer
		one := &logPrinter{out: &whole, err: &whole}
		two := &logPrinter{out: &pieces, err: &pieces}
		for _, step := range []struct {
			p    *logPrinter
			part []byte
		}{{one, log}, {two, log[:cut]}, {two, log[cut:]}} {
			if _, err := step.p.copy(bytes.NewReader(step.part)); err != nil {
				t.Fatal(err)
			}
		}
		if err := one.flush(); err != nil {
			t.Fatal(err)
		}
		if err := two.flush(); err != nil {
			t.Fatal(err)
		}
		if whole.String() != pieces.String() {
			t.Errorf("read at once: %q, read in two pieces: %q", whole.String(), pieces.String())
		}
	})
}

func TestLogsVerb(t *testing.T) {
	f, endpoint := startFake(t)
	namespace := ownNamespace(t)
	if _, errOut, code := sampan(t, "", "run", "--endpoint", endpoint, "--namespace", namespace, "app"); code != 0 {
		t.Fatal(errOut)
	}
	_, errOut, _ := sampan(t, "", "logs", "--endpoint", endpoint, "app")
	mustContain(t, errOut, "without a log")
	f.logPath = filepath.Join(t.TempDir(), "0.log")
	if err := os.WriteFile(f.logPath, []byte("t stdout F hello\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	out, errOut, code := sampan(t, "", "logs", "--endpoint", endpoint, "app/app")
	if code != 0 || strings.TrimSpace(out) != "hello" {
		t.Errorf("%d %q %q", code, out, errOut)
	}
}
