package logs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// entry is the batch that was written last, or is being written. See the
// package comment for the protocol it is part of.
type entry struct {
	seq    uint64    // of the batch; marks the FIFO's access time until it is consumed
	stream Stream    // whose output it is
	end    bool      // the stream ended with it: see tail full
	dev    uint64    // the log file's device
	inode  uint64    // and inode
	offset int64     // where in the log file the batch begins
	length int       // bytes of output in the batch
	bare   bool      // the batch stands in the log already, it is only to be consumed
	at     time.Time // the batch's time in the log
	// open tells of each stream whether its last line in the log is a part of
	// a line, once this batch is written.
	open [streams]bool
}

const (
	entrySize    = 64
	entryVersion = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (e *entry) encode() (b [entrySize]byte) {
	le := binary.LittleEndian
	b[4] = entryVersion
	b[5] = byte(e.stream)
	b[6] = bit(e.end, 0) | bit(e.bare, 1) | bit(e.open[Stdout], 2) | bit(e.open[Stderr], 3)
	le.PutUint64(b[8:], e.seq)
	le.PutUint64(b[16:], e.dev)
	le.PutUint64(b[24:], e.inode)
	le.PutUint64(b[32:], uint64(e.offset))
	le.PutUint64(b[40:], uint64(e.length))
	le.PutUint64(b[48:], uint64(e.at.UnixNano()))
	le.PutUint32(b[0:], crc32.Checksum(b[4:], castagnoli))
	return b
}

func bit(v bool, n uint) byte {
	if v {
		return 1 << n
	}
	return 0
}

var errJournal = errors.New("journal is damaged")

func decodeEntry(b []byte) (entry, error) {
	le := binary.LittleEndian
	if len(b) != entrySize || le.Uint32(b) != crc32.Checksum(b[4:], castagnoli) || b[4] != entryVersion || b[5] >= streams {
		return entry{}, errJournal
	}
	e := entry{
		seq: le.Uint64(b[8:]), stream: Stream(b[5]), end: b[6]&1 != 0, bare: b[6]&2 != 0,
		dev: le.Uint64(b[16:]), inode: le.Uint64(b[24:]),
		offset: int64(le.Uint64(b[32:])), length: int(le.Uint64(b[40:])),
		at:   time.Unix(0, int64(le.Uint64(b[48:]))),
		open: [streams]bool{b[6]&4 != 0, b[6]&8 != 0},
	}
	if e.offset < 0 || e.length < 0 || e.length > maxBatch {
		return entry{}, errJournal
	}
	return e, nil
}

// journal is the file that holds one entry. A write of so few bytes is done or
// not done when its writer is killed.
type journal struct{ f *os.File }

// openJournal opens the journal at path and returns the entry in it. A new one,
// for which fresh is set, gets an empty entry.
func openJournal(path string) (j journal, last entry, fresh bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return journal{}, entry{}, false, err
	}
	j = journal{f}
	var b [entrySize]byte
	n, err := f.ReadAt(b[:], 0)
	if n == 0 && errors.Is(err, io.EOF) {
		if err := j.write(&entry{}); err != nil {
			f.Close()
			return journal{}, entry{}, false, err
		}
		return j, entry{}, true, nil
	}
	if last, err = decodeEntry(b[:n]); err != nil {
		return j, entry{}, false, fmt.Errorf("read journal %s: %w", path, err)
	}
	return j, last, false, nil
}

func (j journal) write(e *entry) error {
	b := e.encode()
	_, err := j.f.WriteAt(b[:], 0)
	return err
}
