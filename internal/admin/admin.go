// Package admin is the small gRPC service beside the CRI for what the CRI has
// no call for: loading an image from an archive. It owns the protocol, both of
// its ends, and how bytes travel; what an archive means is decided by the
// Loader it is given. It must not grow calls that the CRI has.
package admin

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative admin.proto

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
)

// Loaded is one image that came out of an archive.
type Loaded struct {
	ID         string   // "sha256:..."
	References []string // its names, perhaps none
	Size       uint64   // bytes on disk, unpacked
}

// Loader stores the images of the archive r. It stores all of them or none, and
// gives name to the one image of an archive that does not name it. An error is
// returned to the client as it is, so the server's interceptor can turn it into
// a code.
type Loader interface {
	Load(ctx context.Context, r io.Reader, name string) ([]Loaded, error)
}

// LoaderFunc is a Loader made of a function.
type LoaderFunc func(ctx context.Context, r io.Reader, name string) ([]Loaded, error)

// Load calls f.
func (f LoaderFunc) Load(ctx context.Context, r io.Reader, name string) ([]Loaded, error) {
	return f(ctx, r, name)
}

// Register adds the service to a server.
func Register(s grpc.ServiceRegistrar, l Loader) {
	RegisterImagesServer(s, &server{loader: l})
}

type server struct {
	UnimplementedImagesServer
	loader Loader
}

func (s *server) Load(stream grpc.ClientStreamingServer[LoadRequest, LoadResponse]) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		first, err = &LoadRequest{}, nil
	}
	if err != nil {
		return err
	}
	images, err := s.loader.Load(stream.Context(), &chunks{stream: stream, rest: first.GetChunk()}, first.GetName())
	if err != nil {
		return err
	}
	answer := &LoadResponse{}
	for _, i := range images {
		answer.Images = append(answer.Images, &LoadedImage{Id: i.ID, References: i.References, Size: i.Size})
	}
	return stream.SendAndClose(answer)
}

// chunks reads the archive out of the stream of requests.
type chunks struct {
	stream grpc.ClientStreamingServer[LoadRequest, LoadResponse]
	rest   []byte
}

func (c *chunks) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		m, err := c.stream.Recv()
		if err != nil {
			return 0, err
		}
		c.rest = m.GetChunk()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// chunkSize is what Load sends at once, well below gRPC's limit of a message.
const chunkSize = 256 << 10

// Load sends the archive r to the daemon at the other end of cc.
func Load(ctx context.Context, cc grpc.ClientConnInterface, r io.Reader, name string) ([]Loaded, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a stream that is not finished would live on
	stream, err := NewImagesClient(cc).Load(ctx)
	if err != nil {
		return nil, err
	}
	if err := send(stream, r, name); err != nil {
		return nil, err
	}
	answer, err := stream.CloseAndRecv()
	if err != nil {
		return nil, err
	}
	var images []Loaded
	for _, i := range answer.GetImages() {
		images = append(images, Loaded{ID: i.GetId(), References: i.GetReferences(), Size: i.GetSize()})
	}
	return images, nil
}

// send passes all of r on. It returns nil also if the server has answered
// early: the answer, an error mostly, is then there to be received.
func send(stream grpc.ClientStreamingClient[LoadRequest, LoadResponse], r io.Reader, name string) error {
	for {
		// A message belongs to gRPC once it is sent, so each has its own bytes.
		chunk := make([]byte, chunkSize)
		n, err := io.ReadFull(r, chunk)
		if n > 0 || name != "" {
			sent := stream.Send(&LoadRequest{Name: name, Chunk: chunk[:n]})
			if errors.Is(sent, io.EOF) {
				return nil
			}
			if sent != nil {
				return sent
			}
			name = ""
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("read archive: %w", err)
		}
	}
}
