package backlog

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

func TestCopies(t *testing.T) {
	p := New(100, Patience{Most: time.Second})
	want := bytes.Repeat([]byte("0123456789"), 10_000)
	go func() {
		for rest := want; len(rest) > 0; {
			n := min(len(rest), 333)
			if _, err := p.Write(rest[:n]); err != nil {
				t.Error(err)
			}
			rest = rest[n:]
		}
		p.Close(nil)
	}()
	got, err := io.ReadAll(p)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes became %d, %v", len(want), len(got), err)
	}
	if _, err := p.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("writing to a closed pipe: %v", err)
	}
}

func TestBehind(t *testing.T) {
	for _, patience := range []time.Duration{0, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			p := New(4, Patience{Most: patience})
			if _, err := p.Write([]byte("abcd")); err != nil {
				t.Fatal(err)
			}
			if n, err := p.Write([]byte("ef")); n != 0 || !errors.Is(err, ErrBehind) {
				t.Errorf("writing to a full pipe: %d, %v", n, err)
			}
			if took := time.Since(start); took != patience {
				t.Errorf("the writer waited %v, not %v", took, patience)
			}
			got, err := io.ReadAll(p)
			if string(got) != "abcd" || !errors.Is(err, ErrBehind) {
				t.Errorf("read %q, %v", got, err)
			}
		})
	}
}

// TestPaced shows that a reader which takes a little now and then is waited for.
func TestPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(4, Patience{Most: time.Second, Paced: true})
		done := make(chan error, 1)
		go func() {
			_, err := p.Write([]byte("0123456789"))
			p.Close(nil)
			done <- err
		}()
		var got []byte
		for len(got) < 10 {
			time.Sleep(900 * time.Millisecond)
			b := make([]byte, 2)
			n, err := p.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, b[:n]...)
		}
		if err := <-done; err != nil || string(got) != "0123456789" {
			t.Errorf("read %q, %v", got, err)
		}
	})
}

// TestPatience shows how long a reader is waited for in all that takes a little
// now and then: as long as the patience lasts, and a tenth of the time.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(1, Patience{Most: time.Second})
		go func() {
			for b := make([]byte, 1); ; time.Sleep(300 * time.Millisecond) {
				if _, err := p.Read(b); err != nil {
					return
				}
			}
		}()
		var waited time.Duration
		for rest := 5; ; rest-- {
			begin := time.Now()
			_, err := p.Write([]byte("x"))
			waited += time.Since(begin)
			if err != nil {
				if waited < time.Second || waited > 1200*time.Millisecond {
					t.Errorf("the writer waited %v", waited)
				}
				break
			}
			if rest == 0 {
				t.Fatal("the writer has lost no patience")
			}
		}
		time.Sleep(time.Second)

		q := New(1, Patience{Most: time.Second})
		for range 100 { // a tenth of the time
			q.Write([]byte("x"))
			time.AfterFunc(100*time.Millisecond, func() { q.Read(make([]byte, 1)) })
			if _, err := q.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			q.Read(make([]byte, 1))
			time.Sleep(time.Second)
		}
	})
}

func TestCloseWakesWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(1, Patience{Most: time.Hour})
		done := make(chan error, 1)
		go func() {
			_, err := p.Write([]byte("ab"))
			done <- err
		}()
		synctest.Wait()
		p.Close(nil)
		if err := <-done; !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
	})
}
