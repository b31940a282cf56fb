package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newLogsCommand() *cobra.Command {
	var follow, timestamps bool
	cmd := &cobra.Command{
		Use:   "logs POD[/CONTAINER]",
		Short: "Print what a container has written",
		Args:  cobra.ExactArgs(1),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the container exits")
	cmd.Flags().BoolVarP(&timestamps, "timestamps", "t", false, "print the time of each line")
	return daemon{}.verb(cmd, func(ctx context.Context, c *client, cmd *cobra.Command, args []string) error {
		container, err := c.findContainer(ctx, args[0])
		if err != nil {
			return err
		}
		answer, err := c.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: container.GetId()})
		if err != nil {
			return fmt.Errorf("container %s: %w", args[0], err)
		}
		path := answer.GetStatus().GetLogPath()
		if path == "" {
			return fmt.Errorf("container %s: it was made without a log", args[0])
		}
		p := &logPrinter{out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), timestamps: timestamps}
		if follow {
			return followLog(ctx, path, p, func() (bool, error) { return c.running(ctx, container.GetId()) })
		}
		return printLog(path, p)
	})
}

// running reports whether a container may still write.
func (c *client) running(ctx context.Context, id string) (bool, error) {
	answer, err := c.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return false, err
	}
	return answer.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_EXITED, nil
}

func printLog(path string, p *logPrinter) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer f.Close()
	if _, err := p.copy(f); err != nil {
		return err
	}
	return p.flush()
}

// How often a log that is followed is looked at, and how often of that its
// container.
const (
	followEvery  = 100 * time.Millisecond
	askEveryNth  = 5
	longestEntry = 1 << 20 // of a log file, timestamp and all; the CRI splits at 16 KiB
)

// followLog prints a log until its container has exited and all of it is read,
// across rotation, or until ctx ends.
func followLog(ctx context.Context, path string, p *logPrinter, running func() (bool, error)) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer func() { f.Close() }()
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	last := false // the container has exited: whatever is there now is all
	for n := 1; ; n++ {
		read, err := p.copy(f)
		if err != nil {
			return err
		}
		next, err := rotated(f, path)
		if err != nil {
			return err
		}
		if next != nil && read == 0 {
			f.Close()
			f = next
			continue
		}
		if next != nil {
			next.Close() // read the old one to its end first
			continue
		}
		if last && read == 0 {
			return p.flush()
		}
		if !last && n%askEveryNth == 0 {
			alive, err := running()
			if err != nil {
				return err
			}
			last = !alive
		}
		select {
		case <-ctx.Done():
			return p.flush()
		case <-tick.C:
		}
	}
}

// rotated opens the log anew if another file stands under its name.
func rotated(f *os.File, path string) (*os.File, error) {
	now, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // between the rename and the new file, or removed
	}
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	open, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	if os.SameFile(now, open) {
		return nil, nil
	}
	next, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	return next, nil
}

// logPrinter turns a log in the CRI's format back into what was written.
type logPrinter struct {
	out, err   io.Writer
	timestamps bool
	rest       []byte // an entry whose end is not there yet
	open       [2]bool
}

// copy prints all whole entries from r and returns how many bytes it read.
func (p *logPrinter) copy(r io.Reader) (int64, error) {
	buffered := bufio.NewReaderSize(r, 64<<10)
	var total int64
	for {
		chunk, err := buffered.ReadSlice('\n')
		total += int64(len(chunk))
		p.rest = append(p.rest, chunk...)
		whole := err == nil
		if whole || len(p.rest) > longestEntry {
			if err := p.entry(p.rest); err != nil {
				return total, err
			}
			p.rest = p.rest[:0]
		}
		switch {
		case errors.Is(err, io.EOF):
			return total, nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return total, fmt.Errorf("read log: %w", err)
		}
	}
}

// flush prints an entry that has no end.
func (p *logPrinter) flush() error {
	if len(p.rest) == 0 {
		return nil
	}
	err := p.entry(p.rest)
	p.rest = nil
	return err
}

// entry prints one line of the log file. What is no entry is printed as it is.
func (p *logPrinter) entry(line []byte) error {
	e, ok := parseEntry(line)
	if !ok {
		_, err := p.out.Write(line)
		return err
	}
	w, stream := p.out, 0
	if e.stderr {
		w, stream = p.err, 1
	}
	var text []byte
	if p.timestamps && !p.open[stream] {
		text = append(append(text, e.time...), ' ')
	}
	text = append(text, e.text...)
	if !e.partial {
		text = append(text, '\n')
	}
	p.open[stream] = e.partial
	_, err := w.Write(text)
	return err
}

// entry is one line of a log in the CRI's format.
type entry struct {
	time    []byte
	stderr  bool
	partial bool // more of the same line follows
	text    []byte
}

// parseEntry reads "TIME stdout|stderr TAG[:TAG...] TEXT".
func parseEntry(line []byte) (entry, bool) {
	line = bytes.TrimSuffix(line, []byte("\n"))
	stamp, rest, ok1 := bytes.Cut(line, []byte(" "))
	stream, rest, ok2 := bytes.Cut(rest, []byte(" "))
	tags, text, ok3 := bytes.Cut(rest, []byte(" "))
	if !ok1 || !ok2 || !ok3 {
		return entry{}, false
	}
	tag, _, _ := bytes.Cut(tags, []byte(":"))
	e := entry{time: stamp, text: text, stderr: string(stream) == "stderr", partial: string(tag) == "P"}
	if !e.stderr && string(stream) != "stdout" || !e.partial && string(tag) != "F" {
		return entry{}, false
	}
	return e, true
}
