package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sampan.dev/sampan/test/vm/guest/api"
)

// serve answers the host over its port: HTTP/2 on one connection that lasts as
// long as the machine.
func serve() error {
	port, err := openPort()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+api.RunPath, runUnit)
	mux.HandleFunc("GET "+api.FilePath, sendFile)
	mux.HandleFunc("PUT "+api.FilePath, takeFile)
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	server := http.Server{Handler: mux, Protocols: &protocols}
	return server.Serve(&listener{conn: connection{port}})
}

// listener has one connection, and no other ever.
type listener struct {
	conn     net.Conn
	accepted bool
}

func (l *listener) Accept() (net.Conn, error) {
	if l.accepted {
		select {}
	}
	l.accepted = true
	return l.conn, nil
}

func (l *listener) Close() error   { return l.conn.Close() }
func (l *listener) Addr() net.Addr { return l.conn.LocalAddr() }

// openPort finds the port by its name, without the links that udev may not have
// made yet.
func openPort() (*os.File, error) {
	for range 100 {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if text, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(text)) == api.Port {
				return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), os.O_RDWR, 0)
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, fmt.Errorf("no virtio port is called %s", api.Port)
}

// connection shows the port as a network connection. It has no deadlines; the
// host's end is where they are kept.
type connection struct{ *os.File }

func (connection) LocalAddr() net.Addr                { return &net.UnixAddr{Name: api.Port} }
func (connection) RemoteAddr() net.Addr               { return &net.UnixAddr{Name: api.Port} }
func (connection) SetDeadline(time.Time) error        { return nil }
func (connection) SetReadDeadline(time.Time) error    { return nil }
func (connection) SetWriteDeadline(t time.Time) error { return nil }

var units atomic.Int64

// runUnit runs a command as a transient systemd unit, sends what it writes as
// it comes, and its exit code behind it. A host that goes away takes the unit
// along.
func runUnit(w http.ResponseWriter, r *http.Request) {
	var c api.Command
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	unit := fmt.Sprintf("test-%d.service", units.Add(1))
	args := []string{"--quiet", "--wait", "--pipe", "--collect", "--unit=" + unit, "--working-directory=" + c.Dir}
	for _, e := range c.Env {
		args = append(args, "--setenv="+e)
	}
	for _, p := range c.Properties {
		args = append(args, "--property="+p)
	}
	cmd := exec.Command("systemd-run", append(append(args, "--"), c.Args...)...)
	output := flushed{w}
	cmd.Stdout, cmd.Stderr = output, output
	stop := context.AfterFunc(r.Context(), func() {
		_ = exec.Command("systemctl", "kill", "--signal=KILL", unit).Run() // it may have ended
	})
	defer stop()
	w.Header().Set("Trailer", api.ExitTrailer)
	w.WriteHeader(http.StatusOK)
	code := 0
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		fmt.Fprintln(output, "guest:", err)
		code = -1
	}
	w.Header().Set(api.ExitTrailer, strconv.Itoa(code))
}

// flushed sends each write at once.
type flushed struct{ http.ResponseWriter }

func (f flushed) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	f.ResponseWriter.(http.Flusher).Flush()
	return n, err
}

func sendFile(w http.ResponseWriter, r *http.Request) {
	f, err := os.Open(r.URL.Query().Get("path"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer f.Close()
	if _, err := io.Copy(w, f); err != nil {
		panic(http.ErrAbortHandler) // the host must not take a part for the whole
	}
}

func takeFile(w http.ResponseWriter, r *http.Request) {
	mode, err := strconv.ParseUint(r.URL.Query().Get("mode"), 8, 32)
	if err == nil {
		err = writeFile(r.URL.Query().Get("path"), os.FileMode(mode), r.Body)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func writeFile(path string, mode os.FileMode, r io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
