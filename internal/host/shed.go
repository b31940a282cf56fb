package host

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ShedCode lets go of this program's code and constants that are in its memory.
// They are in the page cache all the same, and what is used comes back at once;
// what only the start has used, which of a large program is most, does not.
// It takes some 50 µs.
func ShedCode() {
	for _, s := range codeSpans() {
		// Where it does not work, there is only more memory in use.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, s.start, s.end-s.start, unix.MADV_DONTNEED)
	}
}

type span struct{ start, end uintptr }

// codeSpans are the mappings of the program's file that nobody can have written
// to: what was changed in memory would be lost.
var codeSpans = sync.OnceValue(func() []span {
	var exe unix.Stat_t
	f, err := os.Open("/proc/self/smaps")
	if err != nil || unix.Stat("/proc/self/exe", &exe) != nil {
		return nil
	}
	defer f.Close()
	var spans []span
	var last span // of the program's file, read-only
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var s span
		var perms, offset, device string
		var inode uint64
		line := lines.Text()
		if n, _ := fmt.Sscanf(line, "%x-%x %s %s %s %d", &s.start, &s.end, &perms, &offset, &device, &inode); n == 6 {
			last = span{}
			if inode == exe.Ino && (perms == "r-xp" || perms == "r--p") {
				last = s
			}
		} else if rest, ok := strings.CutPrefix(line, "Anonymous:"); ok && last.end != 0 && strings.TrimSpace(rest) == "0 kB" {
			spans = append(spans, last)
		}
	}
	return spans
})
