package stream

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// speaksV5 tells whether the client wants version 5 of the remote command
// protocol, in which a stream can be closed alone. cri-streaming stops at 4.
func speaksV5(r *http.Request) bool { return wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) }

// serveV5 does for version 5 what remotecommand.ServeExec and ServeAttach do for
// those before.
func serveV5(w http.ResponseWriter, r *http.Request, o *remotecommand.Options, run func(context.Context, streams) error) {
	channels := []wsstream.ChannelType{
		remotecommand.StreamStdIn:  either(o.Stdin, wsstream.ReadChannel),
		remotecommand.StreamStdOut: either(o.Stdout, wsstream.WriteChannel),
		remotecommand.StreamStdErr: either(o.Stderr, wsstream.WriteChannel),
		remotecommand.StreamErr:    wsstream.WriteChannel,
		remotecommand.StreamResize: wsstream.ReadChannel,
	}
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		remotecommand.StreamProtocolV5Name: {Binary: true, Channels: channels},
	})
	conn.SetIdleTimeout(idleTimeout)
	_, all, err := conn.Open(w, r)
	if err != nil {
		return // the client has been told
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	sizes := make(chan remotecommand.TerminalSize)
	go decodeSizes(ctx, all[remotecommand.StreamResize], sizes)
	err = run(ctx, streams{
		in: all[remotecommand.StreamStdIn], out: all[remotecommand.StreamStdOut], err: all[remotecommand.StreamStdErr], resize: sizes,
	})
	// An error means that the client is gone.
	json.NewEncoder(all[remotecommand.StreamErr]).Encode(statusOf(err))
}

func either(wanted bool, t wsstream.ChannelType) wsstream.ChannelType {
	if wanted {
		return t
	}
	return wsstream.IgnoreChannel
}

// decodeSizes passes on the sizes that the client sends, until ctx ends.
func decodeSizes(ctx context.Context, from io.Reader, to chan<- remotecommand.TerminalSize) {
	defer close(to)
	for d := json.NewDecoder(from); ; {
		var size remotecommand.TerminalSize
		if d.Decode(&size) != nil {
			return
		}
		select {
		case to <- size:
		case <-ctx.Done():
			return
		}
	}
}

// status is how a session ended, in the words of Kubernetes' API.
type status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Code    int      `json:"code,omitempty"`
	Details *details `json:"details,omitempty"`
}

type details struct {
	Causes []cause `json:"causes"`
}

type cause struct {
	Type    string `json:"reason"`
	Message string `json:"message"`
}

func statusOf(err error) status {
	var exit exitError
	switch {
	case err == nil:
		return status{Status: "Success"}
	case errors.As(err, &exit):
		return status{
			Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason, Message: "command terminated with " + exit.Error(),
			Details: &details{[]cause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.ExitStatus())}}},
		}
	}
	return status{Status: "Failure", Reason: "InternalError", Code: http.StatusInternalServerError, Message: err.Error()}
}

// isTunnel tells whether the client wants SPDY within a WebSocket, for ports.
func isTunnel(r *http.Request) bool {
	return wsstream.IsWebSocketRequest(r) && slices.Contains(offered(r), portforward.WebsocketsSPDYTunnelingPortForwardV1)
}

func offered(r *http.Request) []string {
	var all []string
	for p := range strings.SplitSeq(strings.Join(r.Header.Values(wsstream.WebSocketProtocolHeader), ","), ",") {
		all = append(all, strings.TrimSpace(p))
	}
	return all
}

// serveTunnel answers a WebSocket request, and lets serve do with the bytes in it
// what it does with a connection that was upgraded to SPDY.
func serveTunnel(w http.ResponseWriter, r *http.Request, serve http.HandlerFunc) {
	server := websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			c.Protocol = []string{portforward.WebsocketsSPDYTunnelingPortForwardV1}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			inner := r.Clone(r.Context())
			inner.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
			inner.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
			inner.Header.Set(httpstream.HeaderProtocolVersion, portforward.PortForwardV1Name)
			serve(&tunnelled{ws: ws, header: http.Header{}}, inner)
		},
	}
	server.ServeHTTP(w, r)
}

// tunnelled is the answer to a request for an upgrade that has happened.
type tunnelled struct {
	ws     *websocket.Conn
	header http.Header
}

func (t *tunnelled) Header() http.Header         { return t.header }
func (t *tunnelled) Write(b []byte) (int, error) { return len(b), nil }
func (t *tunnelled) WriteHeader(int)             {}

func (t *tunnelled) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return t.ws, bufio.NewReadWriter(bufio.NewReader(t.ws), bufio.NewWriter(t.ws)), nil
}
