package main

import (
	"bytes"
	"log/slog"
	"testing"
)

func TestJournalHandler(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(newJournalHandler(&out, slog.LevelInfo)).With("pod", "p")
	log.Debug("unheard")
	log.Info("hello", "dur", 3)
	log.Warn("look")
	log.WithGroup("g").Error("bad", "level", "mine")
	want := "<6>msg=hello pod=p dur=3\n<4>msg=look pod=p\n<3>msg=bad pod=p g.level=mine\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

// TestIsJournal: only the very pipe that systemd names counts; a log that was
// redirected has its times.
func TestIsJournal(t *testing.T) {
	t.Setenv("JOURNAL_STREAM", "1:2")
	if isJournal(&bytes.Buffer{}) {
		t.Error("a buffer is taken for the journal")
	}
}
