package stats

import "time"

// A CPU rate is an average over a window that is long enough to say something
// about, and not so long that it says nothing about now.
const (
	minWindow = time.Second
	maxWindow = 5 * time.Minute
)

type cpuSample struct {
	at   time.Time
	used uint64 // CPU time in ns
}

// cpuSamples are two earlier samples at least minWindow apart. Whoever asks how
// often, the window from older to now is between one and two times what it should
// be: a client that asks twice in a row does not get the noise of a millisecond.
type cpuSamples struct {
	older, newer cpuSample // older may be zero
}

// cpuRate remembers a sample and returns the CPU time used per second, in ns. The
// first time, the rate is that since the beginning, when nothing was used, unless
// that is long ago.
func (c *Collector) cpuRate(id string, since time.Time, now cpuSample) (uint64, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.cpu[id]
	if s == nil {
		s = &cpuSamples{newer: now}
		if !since.IsZero() {
			s.older = cpuSample{at: since}
		}
		c.cpu[id] = s
	} else if now.at.Sub(s.newer.at) >= minWindow {
		s.older, s.newer = s.newer, now
	}
	from := s.older
	if from.at.IsZero() {
		from = s.newer
	}
	window := now.at.Sub(from.at)
	if window <= 0 || window > maxWindow || now.used < from.used {
		return 0, false
	}
	return uint64(float64(now.used-from.used) / window.Seconds()), true
}
