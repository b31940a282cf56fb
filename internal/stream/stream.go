// Package stream serves exec, attach and port-forward to the CRI's clients: over
// SPDY and WebSocket, at URLs that are good for one request within a minute. The
// protocols are those of k8s.io/cri-streaming; what it lacks of WebSocket, which
// is version 5 of remote command and SPDY tunnelled for port-forward, is here.
//
// A session lives no longer than its connection: when the client is gone, what an
// exec has started is killed. The package knows sessions and bytes; what runs
// where is the business of the Pods it is given.
package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"sampan.dev/sampan/internal/keeper"
)

// Pods are where sessions lead.
type Pods interface {
	Exec(ctx context.Context, r keeper.ExecRequest) (keeper.ExecResult, error)
	Attach(ctx context.Context, r keeper.AttachRequest) error
	ResizeTerminal(ctx context.Context, containerID string, width, height uint16) error
	// Dial connects to a port of the pod's, at its loopback addresses.
	Dial(ctx context.Context, podID string, port uint16) (net.Conn, error)
}

// Config is what a Server is made of.
type Config struct {
	Address string // IP:port to listen at; port 0 takes a free one
	// CertFile and KeyFile, if set, make it HTTPS. They are read again for each
	// connection.
	CertFile, KeyFile string
	Pods              Pods
	Logger            *slog.Logger
}

const (
	idleTimeout     = 4 * time.Hour    // of a session in which nobody says anything
	creationTimeout = 30 * time.Second // for a client to open its streams
	headerTimeout   = 10 * time.Second // for a client to say what it wants
)

// Server serves sessions.
type Server struct {
	cfg      Config
	log      *slog.Logger
	listener net.Listener
	http     *http.Server
	base     url.URL
	tickets  tickets
	ctx      context.Context // of all sessions
	cancel   context.CancelFunc
}

// Listen returns a Server that listens, and does not serve yet.
func Listen(cfg Config) (*Server, error) {
	s := &Server{cfg: cfg, log: cfg.Logger}
	s.base.Scheme = "http"
	if cfg.CertFile != "" {
		s.base.Scheme = "https"
		if _, err := s.certificate(nil); err != nil {
			return nil, fmt.Errorf("streaming: %w", err)
		}
	}
	listener, err := net.Listen("tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("streaming: %w", err)
	}
	s.listener = listener
	s.base.Host = reachable(listener.Addr()).String()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	for name, serve := range map[string]http.HandlerFunc{"exec": s.serveExec, "attach": s.serveAttach, "portforward": s.servePortForward} {
		mux.HandleFunc("GET /"+name+"/{ticket}", serve)
		mux.HandleFunc("POST /"+name+"/{ticket}", serve)
	}
	s.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: headerTimeout, IdleTimeout: headerTimeout, ConnContext: watchClient,
		BaseContext: func(net.Listener) context.Context { return s.ctx },
		ErrorLog:    slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelInfo),
		TLSConfig:   &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.certificate, NextProtos: []string{"http/1.1"}},
	}
	return s, nil
}

// reachable returns an address that local clients can connect to.
func reachable(a net.Addr) netip.AddrPort {
	at := a.(*net.TCPAddr).AddrPort()
	switch ip := at.Addr().Unmap(); {
	case !ip.IsUnspecified():
		return netip.AddrPortFrom(ip, at.Port())
	case ip.Is4():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	default:
		return netip.AddrPortFrom(netip.IPv6Loopback(), at.Port())
	}
}

func (s *Server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(s.cfg.CertFile, s.cfg.KeyFile)
	return &cert, err
}

// Serve serves until Close; then it returns nil.
func (s *Server) Serve() error {
	var err error
	if l := (listener{s.listener}); s.cfg.CertFile != "" {
		err = s.http.ServeTLS(l, "", "")
	} else {
		err = s.http.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve streams: %w", err)
}

// Close ends the server and all sessions.
func (s *Server) Close() error {
	s.cancel()
	return errors.Join(s.http.Close(), ignoreClosed(s.listener.Close()))
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Exec returns the URL of a session that r asks for. Its container id is whole.
func (s *Server) Exec(r *runtimeapi.ExecRequest) (string, error) { return s.url("exec", r) }

// Attach does so for an attach.
func (s *Server) Attach(r *runtimeapi.AttachRequest) (string, error) { return s.url("attach", r) }

// PortForward does so for a port-forward. Its pod id is whole.
func (s *Server) PortForward(r *runtimeapi.PortForwardRequest) (string, error) {
	return s.url("portforward", r)
}

func (s *Server) url(kind string, request any) (string, error) {
	t, err := s.tickets.issue(request)
	if err != nil {
		return "", fmt.Errorf("%s: %w", kind, err)
	}
	return s.base.JoinPath(kind, t).String(), nil
}

func (s *Server) serveExec(w http.ResponseWriter, r *http.Request) {
	req, ok := redeem[*runtimeapi.ExecRequest](s, w, r)
	if !ok {
		return
	}
	e := &execSession{session: s.session("exec", "container", req.ContainerId), req: req}
	defer e.end(r)
	opts := &remotecommand.Options{Stdin: req.Stdin, Stdout: req.Stdout, Stderr: req.Stderr, TTY: req.Tty}
	if speaksV5(r) {
		serveV5(w, r, opts, e.run)
		return
	}
	remotecommand.ServeExec(w, r, e, "", "", req.ContainerId, req.Cmd, opts, idleTimeout, creationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request) {
	req, ok := redeem[*runtimeapi.AttachRequest](s, w, r)
	if !ok {
		return
	}
	a := &attachSession{session: s.session("attach", "container", req.ContainerId), req: req}
	defer a.end(r)
	opts := &remotecommand.Options{Stdin: req.Stdin, Stdout: req.Stdout, Stderr: req.Stderr, TTY: req.Tty}
	if speaksV5(r) {
		serveV5(w, r, opts, a.run)
		return
	}
	remotecommand.ServeAttach(w, r, a, "", "", req.ContainerId, opts, idleTimeout, creationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request) {
	req, ok := redeem[*runtimeapi.PortForwardRequest](s, w, r)
	if !ok {
		return
	}
	f := &forwardSession{session: s.session("port-forward", "pod", req.PodSandboxId), ctx: r.Context()}
	defer f.end(r)
	serve := func(w http.ResponseWriter, r *http.Request) {
		opts := &portforward.V4Options{Ports: req.Port}
		portforward.ServePortForward(w, r, f, req.PodSandboxId, "", opts, idleTimeout, creationTimeout, portforward.SupportedProtocols)
	}
	if isTunnel(r) {
		serveTunnel(w, r, serve)
		return
	}
	serve(w, r)
}

// redeem returns the request for which the URL was given out. To a URL that was
// used, is too old, or is another's, the answer is that there is no such page.
func redeem[T any](s *Server, w http.ResponseWriter, r *http.Request) (T, bool) {
	request, ok := s.tickets.redeem(r.PathValue("ticket")).(T)
	if !ok {
		http.Error(w, "this URL was used, is older than a minute, or never was one: ask for another", http.StatusNotFound)
	}
	return request, ok
}

// session is what all sessions have.
type session struct {
	s     *Server
	log   *slog.Logger
	start time.Time
	err   error // what came of it
}

func (s *Server) session(op, kind, id string) session {
	return session{s: s, log: s.log.With("op", op, kind, id), start: time.Now()}
}

// end says how the session went, and sees to it that its connection ends.
func (x *session) end(r *http.Request) {
	hurry(r.Context())
	log := x.log.With("dur", time.Since(x.start).Round(time.Millisecond))
	if x.err != nil {
		log.Info("session failed", "err", x.err)
		return
	}
	log.Debug("session ended")
}
