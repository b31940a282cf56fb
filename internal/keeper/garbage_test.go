package keeper_test

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/keeper/api"
	"sampan.dev/sampan/internal/keeper/link"
)

// A client that talks nonsense, on either socket, harms only itself: the keeper's
// processes and its containers stay.
func TestGarbage(t *testing.T) {
	l := newLab(t)
	l.sh("steady", "sleep 1000")
	before := l.info()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			name := []string{link.SocketName, link.ExecSocketName}[i%2]
			conn, err := net.DialTimeout("unix", filepath.Join(l.dir, name), 10*time.Second)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
				t.Error(err)
			}
			// The keeper may have hung up after any of these.
			_, _ = conn.Write(garbage(r, name))
			_, _ = io.Copy(io.Discard, conn)
		})
	}
	wg.Wait()
	after := l.info()
	if before != after {
		t.Errorf("the keeper's processes are %+v now, were %+v", after, before)
	}
	if c := l.find("steady"); c == nil || c.Exit != nil {
		t.Errorf("the container is %+v", c)
	}
	if _, err := l.client.Exec(l.ctx(), keeper.ExecRequest{ID: "steady", Args: []string{"true"}}); err != nil {
		t.Errorf("exec afterwards: %v", err)
	}
}

// garbage returns noise, or something that begins as it should.
func garbage(r *rand.Rand, socket string) []byte {
	noise := make([]byte, r.IntN(200))
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	if r.IntN(3) == 0 {
		return noise
	}
	var body []byte
	switch r.IntN(3) {
	case 0:
		body, _ = proto.Marshal(&api.ExecRequest{Id: "steady"})
	case 1:
		body, _ = proto.Marshal(&api.ExecRequest{Id: "steady", Attach: &api.AttachRequest{}})
	default:
		body = noise
	}
	if r.IntN(2) == 0 && len(body) > 0 {
		body[r.IntN(len(body))] ^= 1 << r.IntN(8)
	}
	length := uint32(len(body))
	if r.IntN(4) == 0 {
		length = r.Uint32()
	}
	if socket == link.ExecSocketName {
		return append(binary.BigEndian.AppendUint32(nil, length), body...)
	}
	// ttrpc: length, stream, type, flags.
	head := binary.BigEndian.AppendUint32(nil, length)
	head = binary.BigEndian.AppendUint32(head, uint32(r.IntN(5)))
	return append(append(head, byte(r.IntN(5)), byte(r.IntN(4))), body...)
}
