package api

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

const (
	maxFrame      = 4 << 20 // bytes of one message
	maxFrameFiles = 4       // descriptors that travel with one message
)

// SendFrame writes one message of an exec connection with files attached.
// The files stay the caller's.
func SendFrame(conn *net.UnixConn, m proto.Message, files ...*os.File) error {
	frame, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 4), m)
	if err != nil {
		return fmt.Errorf("encode frame: %w", err)
	}
	if len(frame)-4 > maxFrame {
		return fmt.Errorf("send frame of %d bytes: %w", len(frame)-4, unix.EMSGSIZE)
	}
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
	var n int
	err = withFDs(files, nil, func(fds []int) error {
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		n, _, err = conn.WriteMsgUnix(frame, rights, nil)
		return err
	})
	if err == nil && n < len(frame) {
		_, err = conn.Write(frame[n:])
	}
	if err != nil {
		return fmt.Errorf("send frame: %w", err)
	}
	return nil
}

// withFDs calls fn with the descriptors of files appended to fds. The files
// cannot be closed meanwhile, and their mode does not change, as Fd would do.
func withFDs(files []*os.File, fds []int, fn func([]int) error) error {
	if len(files) == 0 {
		return fn(fds)
	}
	conn, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = conn.Control(func(fd uintptr) { ferr = withFDs(files[1:], append(fds, int(fd)), fn) })
	return errors.Join(err, ferr)
}

// RecvFrame reads one message of an exec connection into m, and returns the
// files that came with it, which are the caller's now.
func RecvFrame(conn *net.UnixConn, m proto.Message) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFrameFiles))
	n, oobn, _, _, err := conn.ReadMsgUnix(head[:], oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	if files, err = parseRights(oob[:oobn]); err != nil {
		return files, err
	}
	if _, err := io.ReadFull(conn, head[n:]); err != nil {
		return files, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > maxFrame {
		return files, fmt.Errorf("receive frame of %d bytes: %w", length, unix.EMSGSIZE)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(conn, body); err != nil {
		return files, err
	}
	return files, proto.Unmarshal(body, m)
}

func parseRights(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive files: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if errors.Is(err, unix.EINVAL) {
			continue // not descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
