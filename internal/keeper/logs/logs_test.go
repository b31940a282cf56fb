package logs

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pumpArg makes the test's binary a process that moves output until it is killed.
const pumpArg = "pump-until-killed"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == pumpArg {
		if err := pumpUntilKilled(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func pumpUntilKilled(dir, noMarks string) error {
	w, err := NewWriter(dir, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	w.marks = noMarks == ""
	cfg := Config{ID: "c", Path: filepath.Join(dir, "log"), Journal: filepath.Join(dir, "journal")}
	for s := range cfg.FIFOs {
		if cfg.FIFOs[s], err = OpenFIFO(filepath.Join(dir, Stream(s).String())); err != nil {
			return err
		}
	}
	if _, err := w.Open(cfg); err != nil {
		return err
	}
	time.Sleep(time.Minute)
	return nil
}

// fixture is a container without the container: two FIFOs.
type fixture struct {
	t      testing.TB
	dir    string
	w      *Writer
	fifos  [streams]*os.File // reading ends
	output [streams]*os.File // the container's ends
}

func newFixture(t testing.TB) *fixture {
	f := &fixture{t: t, dir: t.TempDir()}
	var err error
	if f.w, err = NewWriter(f.dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for s := range f.fifos {
		path := filepath.Join(f.dir, Stream(s).String())
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if f.fifos[s], err = OpenFIFO(path); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.output[s] = os.NewFile(uintptr(fd), path)
	}
	t.Cleanup(func() {
		for s := range f.fifos {
			f.fifos[s].Close()
			f.output[s].Close()
		}
	})
	return f
}

func (f *fixture) config() Config {
	return Config{ID: "c", Path: filepath.Join(f.dir, "log"), Journal: filepath.Join(f.dir, "journal"), FIFOs: f.fifos}
}

func (f *fixture) open() *Log {
	f.t.Helper()
	l, err := f.w.Open(f.config())
	if err != nil {
		f.t.Fatal(err)
	}
	return l
}

func (f *fixture) write(s Stream, text string) {
	f.t.Helper()
	if _, err := f.output[s].WriteString(text); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) drain(l *Log) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := l.Drain(ctx); err != nil {
		f.t.Fatal(err)
	}
	l.Close()
}

// line is a line of a log file.
type line struct{ stream, tag, text string }

// parse checks that every line is well formed, and returns them.
func parse(t testing.TB, path string) []line {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := parseLines(data)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return lines
}

func parseLines(data []byte) ([]line, error) {
	var lines []line
	for n, text := range strings.Split(string(data), "\n") {
		if text == "" && n == strings.Count(string(data), "\n") {
			break
		}
		f := strings.SplitN(text, " ", 4)
		if len(f) != 4 || f[2] != "F" && f[2] != "P" || f[1] != "stdout" && f[1] != "stderr" {
			return nil, fmt.Errorf("line %d is malformed: %.80q", n+1, text)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			return nil, fmt.Errorf("line %d: %v", n+1, err)
		}
		if len(f[3]) > maxChunk {
			return nil, fmt.Errorf("line %d has %d bytes", n+1, len(f[3]))
		}
		lines = append(lines, line{f[1], f[2], f[3]})
	}
	return lines, nil
}

// join puts the output of a stream together again.
func join(lines []line, s Stream) string {
	var b strings.Builder
	for _, l := range lines {
		if l.stream == s.String() {
			b.WriteString(l.text)
			if l.tag == "F" {
				b.WriteByte('\n')
			}
		}
	}
	return b.String()
}

func TestOutput(t *testing.T) {
	long := strings.Repeat("x", maxChunk)
	tests := map[string]struct {
		output []string // written one after the other, with a pause for P lines
		want   []line
	}{
		"lines":          {[]string{"a\nb\n", "c\n"}, []line{{"stdout", "F", "a"}, {"stdout", "F", "b"}, {"stdout", "F", "c"}}},
		"empty line":     {[]string{"\n"}, []line{{"stdout", "F", ""}}},
		"no newline":     {[]string{"a"}, []line{{"stdout", "F", "a"}}},
		"full chunk":     {[]string{long + "\n"}, []line{{"stdout", "F", long}}},
		"long line":      {[]string{long + "y\n"}, []line{{"stdout", "P", long}, {"stdout", "F", "y"}}},
		"longer line":    {[]string{long + long + "y\nz\n"}, []line{{"stdout", "P", long}, {"stdout", "P", long}, {"stdout", "F", "y"}, {"stdout", "F", "z"}}},
		"slow line":      {[]string{"a", "wait", "b\n"}, []line{{"stdout", "P", "a"}, {"stdout", "F", "b"}}},
		"unfinished":     {[]string{"a", "wait"}, []line{{"stdout", "P", "a"}, {"stdout", "F", ""}}},
		"slow newline":   {[]string{"a", "wait", "\n"}, []line{{"stdout", "P", "a"}, {"stdout", "F", ""}}},
		"carriage":       {[]string{"a\r\n\x00\xff\n"}, []line{{"stdout", "F", "a\r"}, {"stdout", "F", "\x00\xff"}}},
		"quick remnants": {[]string{"a", "b", "c\n"}, []line{{"stdout", "F", "abc"}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			l := f.open()
			for _, o := range tt.output {
				if o == "wait" {
					time.Sleep(3 * flushAfter)
					continue
				}
				f.write(Stdout, o)
			}
			f.drain(l)
			got := parse(t, f.config().Path)
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Fatalf("got %.200q, want %.200q", fmt.Sprint(got), fmt.Sprint(tt.want))
			}
		})
	}
}

func TestStreamsShareLog(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	var want [streams]strings.Builder
	for i := range 500 {
		for s := range Stream(streams) {
			text := fmt.Sprintf("%s %d\n", s, i)
			want[s].WriteString(text)
			f.write(s, text)
		}
	}
	f.drain(l)
	lines := parse(t, f.config().Path)
	for s := range Stream(streams) {
		if join(lines, s) != want[s].String() {
			t.Errorf("%s differs", s)
		}
	}
}

func TestReopen(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	path := f.config().Path
	for i := range 3 {
		f.write(Stdout, fmt.Sprintf("%d\n", i))
		waitFor(t, func() bool { return len(parse(t, path)) == 1 })
		if err := os.Rename(path, fmt.Sprintf("%s.%d", path, i)); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
	}
	// An error makes no file, and output goes where it went.
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err == nil {
		t.Fatal("no error")
	}
	f.write(Stdout, "last\n")
	f.drain(l)
	if got := parse(t, path+".old"); len(got) != 1 || got[0].text != "last" {
		t.Fatalf("got %v", got)
	}
}

func TestTruncatedByOthers(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	path := f.config().Path
	f.write(Stdout, "a\n")
	waitFor(t, func() bool { return len(parse(t, path)) == 1 })
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	f.write(Stdout, "b\n")
	f.drain(l)
	if got := parse(t, path); len(got) != 1 || got[0].text != "b" {
		t.Fatalf("got %v", got)
	}
}

func TestDrainDoesNotWaitForHolders(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	text := strings.Repeat("0123456789\n", 20000) // more than the FIFO holds at first
	done := make(chan struct{})
	go func() { defer close(done); f.write(Stdout, text) }()
	<-done
	f.write(Stderr, "tail")
	begin := time.Now()
	f.drain(l) // the fixture has both FIFOs open still
	if d := time.Since(begin); d > 5*time.Second {
		t.Fatalf("took %v", d)
	}
	lines := parse(t, f.config().Path)
	if join(lines, Stdout) != text || join(lines, Stderr) != "tail\n" {
		t.Fatal("output differs")
	}
}

// TestFullDisk has a log on a file system without space: output waits, none is
// lost, and a reopened log may go elsewhere meanwhile.
func TestFullDisk(t *testing.T) {
	f := newFixture(t)
	mnt := filepath.Join(f.dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", mnt, "tmpfs", 0, "size=64k"); err == unix.EPERM {
		t.Skip("probe: mount(2) is not permitted here")
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
	ballast := filepath.Join(mnt, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 40<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := f.config()
	cfg.Path = filepath.Join(mnt, "log")
	l, err := f.w.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range 400 {
		fmt.Fprintf(&want, "line %05d of the log on a full disk\n", i)
	}
	f.write(Stdout, want.String())
	time.Sleep(5 * retryMin)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Drain(ctx); err == nil {
		t.Fatal("drained to a full disk")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	f.drain(l)
	if got := join(parse(t, cfg.Path), Stdout); got != want.String() {
		t.Fatal("output differs")
	}
}

// TestKilled kills the process that moves output at random instants, again and
// again, while both streams are written at full speed.
func TestKilled(t *testing.T) {
	for name, arg := range map[string]string{"marks": "", "no marks": "x"} {
		t.Run(name, func(t *testing.T) { testKilled(t, arg) })
	}
}

func testKilled(t *testing.T, arg string) {
	kills := 60
	if testing.Short() {
		kills = 15
	}
	f := newFixture(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, %d kills", seed, kills)
	rnd := rand.New(rand.NewPCG(seed, 0))
	stop := make(chan struct{})
	var want [streams]bytes.Buffer
	done := make(chan struct{}, streams)
	for s := range Stream(streams) {
		rnd := rand.New(rand.NewPCG(seed, uint64(s)+1))
		go func() {
			defer func() { done <- struct{}{} }()
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				text := fmt.Sprintf("%d %s", n, strings.Repeat("x", rnd.IntN(200)))
				if rnd.IntN(500) == 0 {
					text += strings.Repeat("y", rnd.IntN(100000))
				}
				if rnd.IntN(20) != 0 {
					text += "\n"
				}
				f.output[s].WriteString(text)
				want[s].WriteString(text)
			}
		}()
	}
	path := f.config().Path
	rotations := 0
	for range kills {
		cmd := exec.Command(os.Args[0], pumpArg, f.dir, arg)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rnd.IntN(40_000)) * time.Microsecond)
		cmd.Process.Kill()
		cmd.Wait()
		if rnd.IntN(3) == 0 { // a rotation whose reopening fails for want of a keeper
			if os.Rename(path, fmt.Sprintf("%s.%04d", path, rotations)) == nil {
				rotations++
			}
		}
	}
	close(stop)
	l := f.open()
	for range streams {
		<-done
	}
	f.drain(l)
	var lines []line
	files, _ := filepath.Glob(path + ".*")
	for _, p := range append(files, path) {
		lines = append(lines, parse(t, p)...)
	}
	for s := range Stream(streams) {
		got, text := join(lines, s), want[s].String()
		if got != text && got != text+"\n" {
			i := 0
			for i < min(len(got), len(text)) && got[i] == text[i] {
				i++
			}
			t.Errorf("%s: %d bytes became %d, the first difference is at %d: %.60q instead of %.60q", s, len(text), len(got), i, got[i:], text[i:])
		}
	}
	t.Logf("%d MB in %d files", (want[0].Len()+want[1].Len())>>20, rotations+1)
}

func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatal("condition is not met in time")
}

func FuzzEncode(f *testing.F) {
	f.Add([]byte("a\nb"), uint16(100), uint8(0))
	f.Add(bytes.Repeat([]byte("x"), 3*maxChunk), uint16(60000), uint8(1))
	f.Fuzz(func(t *testing.T, raw []byte, room uint16, kind uint8) {
		at := time.Unix(1e9, 5)
		dst := make([]byte, 0, prefixLen+maxChunk+2+int(room))
		mode := tail(kind % 3)
		out, used := encode(dst, raw, at, Stderr, mode)
		lines, err := parseLines(out)
		if err != nil {
			t.Fatal(err)
		}
		text := join(lines, Stderr)
		if mode == full && used > 0 && used == len(raw) && raw[used-1] != '\n' {
			text = strings.TrimSuffix(text, "\n")
		}
		if text != string(raw[:used]) {
			t.Fatalf("%.60q became %.60q", raw[:used], text)
		}
		if used == 0 && len(raw) > 0 && (mode != hold || len(raw) > maxChunk) {
			t.Fatal("no progress")
		}
		if mode != full {
			again, n := encode(make([]byte, 0, maxOut+len(raw)*50), raw[:used], at, Stderr, partial)
			if n != used || !bytes.Equal(again, out) {
				t.Fatal("encoding again differs")
			}
		}
	})
}

func FuzzDecodeEntry(f *testing.F) {
	e := entry{seq: 7, stream: Stderr, offset: 9, length: 3, at: time.Unix(5, 6)}
	b := e.encode()
	f.Add(b[:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := decodeEntry(b); err == nil {
			if again := e.encode(); !bytes.Equal(again[:7], b[:7]) && b[6] < 16 {
				t.Fatal("encoding again differs")
			}
		}
	})
}

// BenchmarkPump measures from a process that writes into the FIFO to the file.
func BenchmarkPump(b *testing.B) {
	for _, bb := range []struct {
		name        string
		line, write int
	}{
		{"lines=100B/writes=64KiB", 100, 64 << 10},
		{"lines=16KiB/writes=64KiB", 16 << 10, 64 << 10},
		{"lines=100B/writes=4KiB", 100, 4 << 10},
		{"lines=100B/writes=100B", 100, 100},
	} {
		b.Run(bb.name, func(b *testing.B) {
			f := newFixture(b)
			l := f.open()
			text := bytes.Repeat([]byte(strings.Repeat("x", bb.line-1)+"\n"), max(1, bb.write/bb.line))
			total := 256 << 20
			b.SetBytes(int64(total))
			for b.Loop() {
				w := bufio.NewWriterSize(f.output[Stdout], len(text))
				for n := 0; n < total; n += len(text) {
					w.Write(text)
				}
				w.Flush()
				waitFor(b, func() bool {
					n := 0
					control(f.fifos[Stdout], func(fd int) (err error) { n, err = waiting(fd); return })
					return n == 0
				})
				b.StopTimer()
				os.Truncate(f.config().Path, 0)
				b.StartTimer()
			}
			f.drain(l)
		})
	}
}
