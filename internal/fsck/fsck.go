// Package fsck is what a check of Sampan's files and of what it has made says: one
// Problem for each thing that is not as it should be. The packages whose things
// they are find them; this one has the words and the order.
package fsck

import (
	"cmp"
	"fmt"
	"io"
	"slices"
)

// NewerWrote is the remedy for a record that a newer sampan has written.
const NewerWrote = "the daemon does not start, and nothing is touched"

// Problem is one thing that is wrong.
type Problem struct {
	Object string // what it is about: "pod 0123456789abc", "layer sha256:..."
	What   string // what is wrong with it
	Remedy string // what to do
	// Repair does it; nil if only somebody else can. It is called with no daemon
	// running.
	Repair func() error
}

func (p Problem) key() string { return p.Object + "\x00" + p.What }

// Print writes problems for people to read, ordered by object.
func Print(w io.Writer, problems []Problem) {
	slices.SortStableFunc(problems, func(a, b Problem) int { return cmp.Compare(a.Object, b.Object) })
	for _, p := range problems {
		fmt.Fprintf(w, "%s: %s\n", p.Object, p.What)
		if p.Remedy != "" {
			fmt.Fprintf(w, "    %s\n", p.Remedy)
		}
	}
}

// Lasting returns those of the later problems that were there before already: what
// comes and goes while a daemon works is none.
func Lasting(before, now []Problem) []Problem {
	return slices.DeleteFunc(now, func(p Problem) bool {
		return !slices.ContainsFunc(before, func(b Problem) bool { return b.key() == p.key() })
	})
}
