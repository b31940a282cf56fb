package flight

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, int]
		var runs atomic.Int32
		release := make(chan struct{})
		work := func(context.Context) (int, error) {
			runs.Add(1)
			<-release
			return 42, nil
		}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if v, err := g.Do(t.Context(), "k", work); v != 42 || err != nil {
					t.Errorf("Do = %d, %v", v, err)
				}
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if n := runs.Load(); n != 1 {
			t.Errorf("work ran %d times, want once", n)
		}
		if len(g.calls) != 0 {
			t.Errorf("%d calls left in the table", len(g.calls))
		}
	})
}

// The work outlives the caller who started it, as long as another one waits.
func TestStarterLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, int]
		release := make(chan struct{})
		work := func(ctx context.Context) (int, error) {
			select {
			case <-release:
				return 1, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		first, cancel := context.WithCancel(t.Context())
		firstErr := make(chan error)
		go func() {
			_, err := g.Do(first, "k", work)
			firstErr <- err
		}()
		synctest.Wait()
		second := make(chan int)
		go func() {
			v, _ := g.Do(t.Context(), "k", func(context.Context) (int, error) { return 2, nil })
			second <- v
		}()
		synctest.Wait()
		cancel()
		if err := <-firstErr; !errors.Is(err, context.Canceled) {
			t.Errorf("starter got %v, want its cancellation", err)
		}
		close(release)
		if v := <-second; v != 1 {
			t.Errorf("the one who joined got %d, want the first work's 1", v)
		}
	})
}

// When the last caller leaves, the work is cancelled and forgotten.
func TestAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Group[string, int]
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		result := make(chan error)
		go func() {
			_, err := g.Do(ctx, "k", func(ctx context.Context) (int, error) {
				<-ctx.Done()
				close(ended)
				return 0, ctx.Err()
			})
			result <- err
		}()
		synctest.Wait()
		cancel()
		<-result
		<-ended
		if v, err := g.Do(t.Context(), "k", func(context.Context) (int, error) { return 3, nil }); v != 3 || err != nil {
			t.Errorf("Do after an abandoned one = %d, %v; want 3", v, err)
		}
	})
}

func TestPanic(t *testing.T) {
	var g Group[string, int]
	_, err := g.Do(t.Context(), "k", func(context.Context) (int, error) { panic("boom") })
	if err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("err = %v, want the panic", err)
	}
}

// With a Limit the work outlives everybody who waits, but not the limit.
func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := Group[string, int]{Limit: time.Minute}
		work := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := g.Do(ctx, "k", work); !errors.Is(err, context.Canceled) {
			t.Fatalf("the caller who leaves gets %v", err)
		}
		begin := time.Now()
		if _, err := g.Do(t.Context(), "k", nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("the caller who joins gets %v", err)
		}
		if took := time.Since(begin); took != time.Minute {
			t.Errorf("the work ended after %v", took)
		}
	})
}

func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := Group[string, int]{Linger: true}
		ctx, cancel := context.WithCancel(t.Context())
		var ended atomic.Bool
		time.AfterFunc(time.Second, cancel)
		_, err := g.Do(ctx, "k", func(ctx context.Context) (int, error) {
			<-ctx.Done()
			time.Sleep(time.Second)
			ended.Store(true)
			return 0, ctx.Err()
		})
		if !errors.Is(err, context.Canceled) || !ended.Load() {
			t.Errorf("Do returned %v; the work had ended: %v", err, ended.Load())
		}
	})
}
