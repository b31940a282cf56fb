package stats

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// Reading figures is all system calls: a long list is shared out to a few
// goroutines.
const (
	maxReaders = 4
	minShare   = 16 // for which a goroutine is worth while
)

// Map returns what read, a method of Collector, returns for each of the list.
func Map[T, R any](list []T, read func(T) R) []R {
	out := make([]R, len(list))
	var next atomic.Int64
	work := func() {
		for i := int(next.Add(1)) - 1; i < len(list); i = int(next.Add(1)) - 1 {
			out[i] = read(list[i])
		}
	}
	var others sync.WaitGroup
	for range min(maxReaders, runtime.GOMAXPROCS(0), len(list)/minShare) - 1 {
		others.Go(work)
	}
	work()
	others.Wait()
	return out
}
