package host

import (
	"context"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestShedCode: it makes the process smaller, and it still runs.
func TestShedCode(t *testing.T) {
	if len(codeSpans()) == 0 {
		t.Fatal("no code is found")
	}
	for _, s := range codeSpans() {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, s.start, s.end-s.start, unix.MADV_POPULATE_READ); errno != 0 {
			t.Skipf("probe: populate: %v", errno) // before Linux 5.14
		}
	}
	before := residentFile(t)
	ShedCode()
	after := residentFile(t)
	if after >= before*3/4 {
		t.Errorf("%d kB of files before, %d kB after", before, after)
	}
	if _, err := os.Stat("/"); err != nil {
		t.Error(err)
	}
}

// residentFile returns how much of files is in the process' memory, in kB.
func residentFile(t *testing.T) int {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "RssFile:")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestReturnMemory: memory is given back at once, and again after every burst of work.
func TestReturnMemory(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var returning sync.WaitGroup
	returning.Go(func() { ReturnMemory(ctx) })
	defer returning.Wait()
	defer cancel()
	deadline := time.Now().Add(time.Minute)
	for given := 0; given < 2; {
		for _, s := range codeSpans() {
			if _, _, errno := unix.Syscall(unix.SYS_MADVISE, s.start, s.end-s.start, unix.MADV_POPULATE_READ); errno != 0 {
				t.Skipf("probe: populate: %v", errno) // before Linux 5.14
			}
		}
		before := residentFile(t)
		runtime.GC()
		for range 50 { // it may have been given back before it was measured
			if residentFile(t) < before*3/4 {
				given++
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if time.Now().After(deadline) {
			t.Fatalf("given back %d times in a minute; %d kB of files before, %d kB after", given, before, residentFile(t))
		}
	}
}
