package host

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"
)

// quietTime without a garbage collection, after there was one, is the end of a
// burst.
const quietTime = 2 * time.Second

// ReturnMemory gives memory back to the system after every burst of work, until
// ctx ends: what the heap has free, and the pages of the program that only its
// start, or only that burst, has touched. It sleeps while nothing is collected.
func ReturnMemory(ctx context.Context) {
	collected := make(chan struct{}, 1)
	watchCollections(collected)
	trim()
	for {
		select {
		case <-collected:
		case <-ctx.Done():
			return
		}
		for quiet := false; !quiet; {
			select {
			case <-collected:
			case <-time.After(quietTime):
				quiet = true
			case <-ctx.Done():
				return
			}
		}
		trim()
		select { // the collection that trim itself has made
		case <-collected:
		case <-time.After(quietTime):
		case <-ctx.Done():
			return
		}
	}
}

// watchCollections sends to a channel after every garbage collection, unless it
// is full: an object that nobody holds is cleaned up, and leaves another.
func watchCollections(collected chan<- struct{}) {
	runtime.AddCleanup(new([16]byte), func(c chan<- struct{}) {
		select {
		case c <- struct{}{}:
		default:
		}
		watchCollections(c)
	}, collected)
}

func trim() {
	debug.FreeOSMemory()
	ShedCode()
}
