package bench

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exec runs /bin/true in a container, again and again.
func (r *runner) exec(ctx context.Context) {
	r.progress("%d times", 4*r.o.N)
	ids := map[*target]string{}
	r.each(ctx, func(t *target) error {
		p, err := t.up(ctx, r.podConfig(t, false))
		if err == nil {
			ids[t] = p.containers[0]
			err = t.execSync(ctx, ids[t], "true")
		}
		return err
	})
	seen := r.newSamples()
	once := func(t *target, variant string) error {
		began := time.Now()
		if err := t.execSync(ctx, ids[t], "true"); err != nil {
			return err
		}
		seen[t].ms(variant, "ExecSync", time.Since(began))
		return nil
	}
	// In short series: CPU clocks are too coarse for one.
	r.rounds(ctx, 4, func(t *target) error {
		_, cpu, err := timed(func() error {
			for range r.o.N {
				if err := once(t, ""); err != nil {
					return err
				}
			}
			return nil
		})
		seen[t].ms("", "CPU of ExecSync", cpu/time.Duration(r.o.N))
		return err
	})
	r.rounds(ctx, r.o.N, func(t *target) error {
		sleepFor(ctx, r.o.Pause)
		return once(t, "pauses")
	})
	r.rounds(ctx, 4, func(t *target) error {
		took, _, err := timed(func() error {
			return inParallel(4, r.o.N, func(int) error { return t.execSync(ctx, ids[t], "true") })
		})
		seen[t].add(Key{Variant: "4 at a time", Name: "ExecSync", Unit: "1/s"}, float64(r.o.N)/took.Seconds())
		return err
	})
	r.collect(seen)
}

const (
	streamBytes = 256 << 20 // moved by each stream
	streamRuns  = 3
	echoes      = 50
)

// streams moves data through exec, attach and port-forward, over WebSocket, and
// types into a terminal.
func (r *runner) streams(ctx context.Context) {
	seen := r.newSamples()
	pods := map[*target]*pod{}
	r.each(ctx, func(t *target) error {
		p, err := t.runPod(ctx, r.podConfig(t, false))
		if err != nil {
			return err
		}
		pods[t] = p
		_, err = t.add(ctx, p, t.containerConfig(p, "sh", "-c",
			fmt.Sprintf("head -c %d /dev/zero > /tmp/zeros && exec httpd -f -p 8080 -h /tmp", streamBytes)))
		if err != nil {
			return err
		}
		return t.execSync(ctx, p.containers[0], "sh", "-c",
			fmt.Sprintf("until [ $(stat -c %%s /tmp/zeros) = %d ]; do sleep 1; done", streamBytes))
	})
	unable := r.failed
	for _, s := range []struct {
		name string
		run  func(context.Context, *target, *pod, *samples) error
	}{
		{"exec, out", execOut}, {"exec, in", execIn}, {"typing", typing}, {"attach", attach}, {"port-forward", portForward},
	} {
		r.progress("%s", s.name)
		r.failed = maps.Clone(unable) // one stream that fails is not all of them
		r.rounds(ctx, streamRuns, func(t *target) error {
			c, cancel := context.WithTimeout(ctx, callTime)
			defer cancel()
			if err := s.run(c, t, pods[t], seen[t]); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			return nil
		})
	}
	r.failed = unable
	r.collect(seen)
}

// rate adds a speed in MB/s.
func (s *samples) rate(variant, name string, bytes int, d time.Duration) {
	s.add(Key{Variant: variant, Name: name, Unit: "MB/s"}, float64(bytes)/1e6/d.Seconds())
}

// The channels of the remote command protocol.
const (
	channelIn = iota
	channelOut
	channelErr
	channelStatus
)

// session is a WebSocket to a streaming server; each message begins with a
// channel's number.
type session struct{ ws *websocket.Conn }

// openSession connects to the URL that Exec, Attach or PortForward has answered.
func openSession(ctx context.Context, address string) (session, error) {
	u, err := url.Parse(address)
	if err != nil {
		return session{}, err
	}
	u.Scheme = strings.Replace(u.Scheme, "http", "ws", 1)
	config, err := websocket.NewConfig(u.String(), "http://localhost/")
	if err != nil {
		return session{}, err
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	ws, err := config.DialContext(ctx)
	if err != nil {
		return session{}, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		err = ws.SetDeadline(deadline)
	}
	return session{ws}, err
}

func (s session) close() { s.ws.Close() } //nolint:errcheck // nothing is left to be lost

// receive returns the next message that is not empty.
func (s session) receive() (channel int, data []byte, err error) {
	for {
		var message []byte
		if err := websocket.Message.Receive(s.ws, &message); err != nil {
			return 0, nil, err
		}
		if len(message) > 1 {
			return int(message[0]), message[1:], nil
		}
	}
}

func (s session) send(channel byte, data []byte) error {
	return websocket.Message.Send(s.ws, append([]byte{channel}, data...))
}

// drain receives until the command has ended, and returns what it put out.
func (s session) drain() (int, error) {
	n := 0
	for {
		channel, data, err := s.receive()
		if err != nil {
			return n, err
		}
		switch channel {
		case channelOut:
			n += len(data)
		case channelErr:
			return n, fmt.Errorf("the command says: %s", data)
		case channelStatus:
			var status struct{ Status, Message string }
			if err := json.Unmarshal(data, &status); err != nil || status.Status != "Success" {
				return n, fmt.Errorf("the command failed: %s", data)
			}
			return n, nil
		}
	}
}

func (t *target) openExec(ctx context.Context, id string, stdin, tty bool, command ...string) (session, error) {
	a, err := t.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: id, Cmd: command, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
	if err != nil {
		return session{}, err
	}
	return openSession(ctx, a.GetUrl())
}

func execOut(ctx context.Context, t *target, p *pod, seen *samples) error {
	began := time.Now()
	s, err := t.openExec(ctx, p.containers[0], false, false, "cat", "/tmp/zeros")
	if err != nil {
		return err
	}
	defer s.close()
	n, err := s.drain()
	if err != nil {
		return err
	}
	if n != streamBytes {
		return fmt.Errorf("%d bytes came, not %d", n, streamBytes)
	}
	seen.rate("", "exec, output", n, time.Since(began))
	return nil
}

func execIn(ctx context.Context, t *target, p *pod, seen *samples) error {
	began := time.Now()
	s, err := t.openExec(ctx, p.containers[0], true, false, "sh", "-c", fmt.Sprintf("head -c %d > /dev/null", streamBytes))
	if err != nil {
		return err
	}
	defer s.close()
	block := make([]byte, 32<<10)
	for range streamBytes / len(block) {
		if err := s.send(channelIn, block); err != nil {
			return err
		}
	}
	if _, err := s.drain(); err != nil {
		return err
	}
	seen.rate("", "exec, input", streamBytes, time.Since(began))
	return nil
}

// typing waits for the terminal's echo of each character.
func typing(ctx context.Context, t *target, p *pod, seen *samples) error {
	began := time.Now()
	s, err := t.openExec(ctx, p.containers[0], true, true, "cat")
	if err != nil {
		return err
	}
	defer s.close()
	for i := range echoes {
		if err := s.send(channelIn, []byte("x")); err != nil {
			return err
		}
		if _, _, err := s.receive(); err != nil {
			return err
		}
		if i == 0 {
			seen.ms("", "exec, terminal opened and first echo", time.Since(began))
		} else {
			seen.ms("", "exec, echo of a character", time.Since(began))
		}
		began = time.Now()
	}
	return nil
}

// attach reads what a container writes, which goes to its log too.
func attach(ctx context.Context, t *target, p *pod, seen *samples) error {
	config := t.containerConfig(p, "sh", "-c", fmt.Sprintf("read go; yes %s | head -c %d; sleep 1", strings.Repeat("x", 99), streamBytes))
	config.Stdin = true
	id, err := t.add(ctx, p, config)
	if err != nil {
		return err
	}
	a, err := t.runtime.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	s, err := openSession(ctx, a.GetUrl())
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.send(channelIn, []byte("\n")); err != nil {
		return err
	}
	var began time.Time
	for n := 0; n < streamBytes; {
		channel, data, err := s.receive()
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		if began.IsZero() {
			began = time.Now()
		}
		if channel != channelOut {
			return fmt.Errorf("after %d bytes: %s", n, data)
		}
		n += len(data)
	}
	seen.rate("", "attach, output of 100-byte lines", streamBytes, time.Since(began))
	return errors.Join(t.stopContainer(ctx, id), t.removeContainer(ctx, id))
}

// portForward reads a file from a web server in the container.
func portForward(ctx context.Context, t *target, p *pod, seen *samples) error {
	const port = 8080
	a, err := t.runtime.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: p.id, Port: []int32{port}})
	if err != nil {
		return err
	}
	u, err := url.Parse(a.GetUrl())
	if err != nil {
		return err
	}
	query := u.Query()
	query.Set("port", fmt.Sprint(port))
	u.RawQuery = query.Encode()
	began := time.Now()
	s, err := openSession(ctx, u.String())
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.send(0, []byte("GET /zeros HTTP/1.0\r\n\r\n")); err != nil {
		return err
	}
	n := 0
	for first := true; n < streamBytes; {
		channel, data, err := s.receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		// Each channel begins with the port's number: 0 is data, 1 errors.
		if len(data) == 2 && binary.LittleEndian.Uint16(data) == port && (first || channel == 1) {
			first = first && channel == 1
			continue
		}
		if channel != 0 {
			return fmt.Errorf("after %d bytes: %s", n, data)
		}
		n += len(data)
	}
	if n < streamBytes {
		return fmt.Errorf("the connection ended after %d bytes", n)
	}
	seen.rate("", "port-forward, download", n, time.Since(began))
	return nil
}

func (t *target) stopContainer(ctx context.Context, id string) error {
	_, err := t.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
	return err
}

func (t *target) removeContainer(ctx context.Context, id string) error {
	_, err := t.runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	return err
}

// logs lets a container write lines as fast as its runtime takes them.
func (r *runner) logs(ctx context.Context) {
	for _, v := range []struct {
		name   string
		length int
	}{{"100-byte lines", 100}, {"16 KiB lines", 16 << 10}} {
		r.progress("%s", v.name)
		seen := r.newSamples()
		r.rounds(ctx, 3, func(t *target) error { return r.log(ctx, t, v.name, v.length, seen[t]) })
		r.collect(seen)
	}
}

const (
	logChunk  = 32 << 20 // of lines that are made before the clock starts
	logChunks = 8
)

func (r *runner) log(ctx context.Context, t *target, variant string, length int, seen *samples) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	p, err := t.runPod(ctx, r.podConfig(t, false))
	if err != nil {
		return err
	}
	bytes := logChunk / length * length
	script := fmt.Sprintf("L=$(head -c %d /dev/zero | tr '\\0' x); yes $L | head -c %d > /tmp/lines; touch /tmp/ready; "+
		"until [ -e /tmp/go ]; do sleep 0.1; done; cat%s", length-1, bytes, strings.Repeat(" /tmp/lines", logChunks))
	config := t.containerConfig(p, "sh", "-c", script)
	path := filepath.Join(p.config.GetLogDirectory(), config.GetLogPath())
	id, err := t.add(ctx, p, config)
	if err != nil {
		return err
	}
	if err := t.execSync(ctx, id, "sh", "-c", "until [ -e /tmp/ready ]; do sleep 0.1; done"); err != nil {
		return err
	}
	before, err := t.cpuOf(ctx)
	if err != nil {
		return err
	}
	if err := t.execSync(ctx, id, "touch", "/tmp/go"); err != nil {
		return err
	}
	lines := int64(bytes / length * logChunks)
	took, err := growth(ctx, path, int64(bytes)*logChunks+lines*int64(len("2006-01-02T15:04:05Z stdout F ")))
	if err != nil {
		return err
	}
	after, err := t.cpuOf(ctx)
	if err != nil {
		return err
	}
	seen.rate(variant, "container output", bytes*logChunks, took)
	seen.ms(variant, "CPU per GB", time.Duration(float64(after-before)*1e9/float64(bytes*logChunks)))
	return t.down(ctx, p.id)
}

// growth waits until a file has at least so many bytes and grows no more, and
// tells how long it took from its first byte to its last.
func growth(ctx context.Context, path string, atLeast int64) (time.Duration, error) {
	var began, last time.Time
	var size int64
	for {
		info, err := os.Stat(path)
		if err != nil {
			return 0, err
		}
		if now := time.Now(); info.Size() > size {
			size, last = info.Size(), now
			if began.IsZero() {
				began = now
			}
		} else if size >= atLeast && now.Sub(last) > 300*time.Millisecond {
			return last.Sub(began), nil
		}
		if sleepFor(ctx, time.Millisecond); ctx.Err() != nil {
			return 0, fmt.Errorf("%s has %d of %d bytes: %w", path, size, atLeast, ctx.Err())
		}
	}
}
