// Package abuse treats a daemon badly: random requests, images and containers
// that try to reach the host, clients by the thousand. Whatever comes, the daemon
// stays, answers with an error that fits, and leaves nothing behind.
package abuse

import (
	"os"
	"strconv"
	"testing"

	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// amount is how much of something a test does: a number from the environment, or
// what a run of all tests has time for.
func amount(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a positive number", variable, text)
	}
	return n
}
