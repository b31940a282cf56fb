package stream

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"sampan.dev/sampan/internal/keeper"
)

// fakePods has one container, which copies stdin to stdout, says bye on stderr
// and exits with 3, or sleeps without stdin, and one pod, which is this process.
type fakePods struct {
	ended chan error // how execs ended
}

func (f *fakePods) Exec(ctx context.Context, r keeper.ExecRequest) (keeper.ExecResult, error) {
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		if r.Stdin == nil {
			<-ctx.Done()
		} else {
			io.Copy(r.Stdout, r.Stdin)
		}
	}()
	select {
	case <-copied:
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		f.ended <- context.Cause(ctx)
		return keeper.ExecResult{}, ctx.Err()
	}
	if r.Stderr != nil {
		fmt.Fprint(r.Stderr, "bye")
	}
	return keeper.ExecResult{ExitCode: 3}, nil
}

func (f *fakePods) Attach(_ context.Context, r keeper.AttachRequest) error {
	for {
		if _, err := r.Stdout.Write(bytes.Repeat([]byte("x"), 1<<16)); err != nil {
			return fmt.Errorf("pass on output: %w", err)
		}
	}
}

func (f *fakePods) ResizeTerminal(context.Context, string, uint16, uint16) error { return nil }

func (f *fakePods) Dial(ctx context.Context, _ string, port uint16) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
}

func newServer(t *testing.T, change func(*Config)) (*Server, *fakePods) {
	t.Helper()
	pods := &fakePods{ended: make(chan error, 10)}
	cfg := Config{Address: "127.0.0.1:0", Pods: pods, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s, pods
}

func execURL(t *testing.T, s *Server) string {
	t.Helper()
	url, err := s.Exec(&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	return url
}

// dialSPDY upgrades a connection.
func dialSPDY(t *testing.T, url, protocol string, config *tls.Config) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(config)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest("POST", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := (&http.Client{Transport: rt}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// open opens a stream with the headers given as pairs.
func open(t *testing.T, c httpstream.Connection, headers ...string) httpstream.Stream {
	t.Helper()
	h := http.Header{}
	for i := 0; i < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	s, err := c.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	text := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(r)
		text <- string(b)
	}()
	select {
	case got := <-text:
		return got
	case <-time.After(10 * time.Second):
		t.Fatal("the stream does not end")
		return ""
	}
}

func TestExecOverSPDY(t *testing.T) {
	s, _ := newServer(t, nil)
	checkExecOverSPDY(t, execURL(t, s), nil)
}

func checkExecOverSPDY(t *testing.T, url string, config *tls.Config) {
	t.Helper()
	c := dialSPDY(t, url, remotecommand.StreamProtocolV4Name, config)
	status := open(t, c, remotecommand.StreamType, remotecommand.StreamTypeError)
	stdin := open(t, c, remotecommand.StreamType, remotecommand.StreamTypeStdin)
	stdout := open(t, c, remotecommand.StreamType, remotecommand.StreamTypeStdout)
	stderr := open(t, c, remotecommand.StreamType, remotecommand.StreamTypeStderr)
	fmt.Fprint(stdin, "hello")
	stdin.Close()
	if got := readAll(t, stdout); got != "hello" {
		t.Errorf("stdout: %q", got)
	}
	if got := readAll(t, stderr); got != "bye" {
		t.Errorf("stderr: %q", got)
	}
	if got := readAll(t, status); !strings.Contains(got, `"message":"3"`) {
		t.Errorf("status: %q", got)
	}
}

// TestURLs uses URLs twice, wrongly and too late.
func TestURLs(t *testing.T) {
	s, _ := newServer(t, nil)
	url := execURL(t, s)
	status := func(url string) int {
		t.Helper()
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if code := status(url); code != http.StatusBadRequest {
		t.Errorf("no upgrade: %d", code)
	}
	for _, bad := range []string{
		url,
		strings.Replace(execURL(t, s), "/exec/", "/attach/", 1),
		s.base.String() + "/exec/", s.base.String() + "/exec/abc", s.base.String() + "/",
	} {
		if code := status(bad); code != http.StatusNotFound {
			t.Errorf("%s: %d", bad, code)
		}
	}
}

func TestTickets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all tickets
		names := map[string]bool{}
		for range maxTickets {
			name, err := all.issue("request")
			if err != nil || len(name) < 20 || names[name] {
				t.Fatal(name, err)
			}
			names[name] = true
		}
		if _, err := all.issue("request"); !errdefs.IsResourceExhausted(err) {
			t.Errorf("one too many: %v", err)
		}
		for name := range names {
			if all.redeem(name) != "request" || all.redeem(name) != nil {
				t.Error("a ticket is not good once")
			}
			delete(names, name)
			break
		}
		time.Sleep(ticketLife + time.Second)
		if _, err := all.issue("another"); err != nil {
			t.Errorf("when the others are old: %v", err)
		}
		for name := range names {
			if all.redeem(name) != nil {
				t.Fatal("a ticket is good for too long")
			}
		}
	})
}

// TestClientGone hangs up on an exec that neither reads nor writes.
func TestClientGone(t *testing.T) {
	s, pods := newServer(t, nil)
	url, err := s.Exec(&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"sleep"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dialSPDY(t, url, remotecommand.StreamProtocolV4Name, nil)
	for _, kind := range []string{remotecommand.StreamTypeError, remotecommand.StreamTypeStdout} {
		open(t, c, remotecommand.StreamType, kind)
	}
	select {
	case err := <-pods.ended:
		t.Fatalf("the exec ended too early: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	c.Close()
	select {
	case err := <-pods.ended:
		if err != errHangUp && err != net.ErrClosed { // whoever was first
			t.Errorf("the exec ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the exec goes on")
	}
}

// dialWebSocket opens a WebSocket with a subprotocol.
func dialWebSocket(t *testing.T, url, protocol string) *websocket.Conn {
	t.Helper()
	url = strings.Replace(url, "http", "ws", 1)
	config, err := websocket.NewConfig(url, url)
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{protocol}
	ws, err := websocket.DialConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	ws.PayloadType = websocket.BinaryFrame
	t.Cleanup(func() { ws.Close() })
	ws.SetDeadline(time.Now().Add(10 * time.Second))
	return ws
}

func TestExecOverWebSocket(t *testing.T) {
	s, _ := newServer(t, nil)
	ws := dialWebSocket(t, execURL(t, s), remotecommand.StreamProtocolV5Name)
	for _, message := range []string{"\x00hello", "\xff\x00"} { // stdin and its end
		if err := websocket.Message.Send(ws, []byte(message)); err != nil {
			t.Fatal(err)
		}
	}
	var got [5]string
	for {
		var message []byte
		if err := websocket.Message.Receive(ws, &message); err != nil {
			break
		}
		got[message[0]] += string(message[1:])
	}
	if got[remotecommand.StreamStdOut] != "hello" || got[remotecommand.StreamStdErr] != "bye" ||
		!strings.Contains(got[remotecommand.StreamErr], `"causes":[{"reason":"ExitCode","message":"3"}]`) {
		t.Errorf("got %q", got)
	}
}

// TestAttachBehind has a client that does not read be told so, or be cut off.
func TestAttachBehind(t *testing.T) {
	s, _ := newServer(t, nil)
	url, err := s.Attach(&runtimeapi.AttachRequest{ContainerId: "c", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	ws := dialWebSocket(t, url, remotecommand.StreamProtocolV5Name)
	time.Sleep(attachPatience + 500*time.Millisecond)
	var status string
	for {
		var message []byte
		if err := websocket.Message.Receive(ws, &message); err != nil {
			break
		}
		if message[0] == remotecommand.StreamErr {
			status += string(message[1:])
		}
	}
	if !strings.Contains(status, "the client reads too slowly") {
		t.Errorf("status: %q", status)
	}
}

// serveHello serves connections: what comes back says what came.
func serveHello(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				fmt.Fprintf(c, "hello %s", b)
			}()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// TestPortForward forwards connections one of which fails; the others do not.
func TestPortForward(t *testing.T) {
	s, _ := newServer(t, nil)
	port := serveHello(t)
	for name, dial := range map[string]func(url string) httpstream.Connection{
		"spdy": func(url string) httpstream.Connection { return dialSPDY(t, url, portforward.PortForwardV1Name, nil) },
		"tunnel": func(url string) httpstream.Connection {
			c, err := spdy.NewClientConnection(dialWebSocket(t, url, portforward.WebsocketsSPDYTunnelingPortForwardV1))
			if err != nil {
				t.Fatal(err)
			}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			url, err := s.PortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p"})
			if err != nil {
				t.Fatal(err)
			}
			c := dial(url)
			defer c.Close()
			forward := func(id, port, say string) (answer, problem string) {
				t.Helper()
				errs := open(t, c, portforward.StreamType, portforward.StreamTypeError, portforward.PortHeader, port, portforward.PortForwardRequestIDHeader, id)
				errs.Close()
				data := open(t, c, portforward.StreamType, portforward.StreamTypeData, portforward.PortHeader, port, portforward.PortForwardRequestIDHeader, id)
				fmt.Fprint(data, say)
				data.Close()
				return readAll(t, data), readAll(t, errs)
			}
			for i := range 3 {
				if answer, problem := forward(strconv.Itoa(2*i), port, "you"); answer != "hello you" || problem != "" {
					t.Errorf("got %q, %q", answer, problem)
				}
				if answer, problem := forward(strconv.Itoa(2*i+1), "1", "you"); answer != "" || !strings.Contains(problem, "refused") {
					t.Errorf("a port nobody listens at: got %q, %q", answer, problem)
				}
			}
		})
	}
}

func TestReachable(t *testing.T) {
	for at, want := range map[string]string{
		"127.0.0.1:1": "127.0.0.1:1", "0.0.0.0:2": "127.0.0.1:2", "[::]:3": "[::1]:3", "192.0.2.1:4": "192.0.2.1:4", "[::ffff:0.0.0.0]:5": "127.0.0.1:5",
	} {
		if got := reachable(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(at))).String(); got != want {
			t.Errorf("%s: %s, want %s", at, got, want)
		}
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	if _, err := Listen(Config{Address: "127.0.0.1:0", CertFile: cert, KeyFile: key, Logger: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("a certificate that is not there is no error")
	}
	pool := writeCertificate(t, cert, key)
	s, _ := newServer(t, func(c *Config) { c.CertFile, c.KeyFile = cert, key })
	url := execURL(t, s)
	if !strings.HasPrefix(url, "https://127.0.0.1:") {
		t.Errorf("the URL is %s", url)
	}
	checkExecOverSPDY(t, url, &tls.Config{RootCAs: pool})
	checkExecOverSPDY(t, execURL(t, s), &tls.Config{RootCAs: writeCertificate(t, cert, key)}) // replaced
}

func writeCertificate(t *testing.T, certFile, keyFile string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "streams"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for path, text := range map[string][]byte{certFile: cert, keyFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return pool
}
