package worker

import (
	"testing"
	"time"
)

// TestNotBefore looks at a container's end while the clock is set back, which a
// time with a monotonic reading would not show.
func TestNotBefore(t *testing.T) {
	now := time.Now()
	started := time.Unix(0, now.Add(time.Hour).UnixNano()) // by the clock as it was
	for _, tt := range []struct{ started, want time.Time }{
		{started, started},
		{now.Add(-time.Second), now},
		{time.Time{}, now},
	} {
		if got := notBefore(now, tt.started); !got.Equal(tt.want) {
			t.Errorf("started at %v, ended at %v: told %v, want %v", tt.started, now, got, tt.want)
		}
	}
}
