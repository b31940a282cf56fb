package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckLines shows that the check the kill tests stand on can fail.
func TestCheckLines(t *testing.T) {
	const stamp = "2026-01-02T03:04:05.000000006Z stdout "
	for _, tt := range []struct {
		name  string
		rows  []string
		lines int
		wrong string // part of the error, empty for none
	}{
		{"complete", []string{"F line 00000001", "F line 00000002xx"}, 2, ""},
		{"in two parts", []string{"P line 000", "F 00001", "F line 00000002"}, 2, ""},
		{"twice", []string{"F line 00000001", "F line 00000001", "F line 00000002"}, 2, "out of order"},
		{"one missing", []string{"F line 00000001", "F line 00000003"}, 3, "out of order"},
		{"last missing", []string{"F line 00000001"}, 2, "line 1 of 2"},
		{"one too many", []string{"F line 00000001", "F line 00000002"}, 1, "line 2 of 1"},
		{"torn", []string{"F line 00000001", "line 00000002"}, 2, "not a line"},
		{"joined", []string{"F line 00000001line 00000002"}, 2, "line 1 of 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(log, []byte(stamp+strings.Join(tt.rows, "\n"+stamp)+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			err := checkLines(log, tt.lines)
			if tt.wrong == "" && err != nil || tt.wrong != "" && (err == nil || !strings.Contains(err.Error(), tt.wrong)) {
				t.Errorf("%v, want an error with %q", err, tt.wrong)
			}
		})
	}
}
