package logs

import (
	"bytes"
	"time"
)

// Stream is one of a container's two outputs.
type Stream uint8

// The streams.
const (
	Stdout Stream = iota
	Stderr
	streams = 2
)

// String returns the stream's name in the log.
func (s Stream) String() string { return [...]string{"stdout", "stderr"}[s] }

// maxChunk is how much of one line of output a line of the log holds, in bytes.
// Longer lines are split.
const maxChunk = 16 << 10

// timeFormat is RFC 3339 with all nine digits, so that lines sort as text.
const timeFormat = "2006-01-02T15:04:05.000000000Z07:00"

// prefixLen is the length of what stands before a chunk; both streams' names
// have the same length.
const (
	prefixLen = len("2006-01-02T15:04:05.000000000Z") + len(" stdout F ")
	tagAt     = prefixLen - len("F ")
)

// tail says what becomes of output after the last newline.
type tail uint8

const (
	hold    tail = iota // leave it for later, but not what fills a chunk
	partial             // write it as a part of a line
	full                // write it as if a newline followed
)

// encode appends raw to dst in the CRI's log format,
//
//	TIME STREAM F|P CHUNK
//
// until raw or dst's capacity ends, and returns how many bytes of raw that were.
// F ends a line of output, P does not. What it appends for raw[:used] depends on
// raw[:used] and the other arguments alone, and is the same with partial as with
// hold: a batch can be encoded again after a crash.
func encode(dst, raw []byte, at time.Time, s Stream, t tail) (out []byte, used int) {
	f := appendPrefix(make([]byte, 0, prefixLen), at, s, 'F')
	p := appendPrefix(make([]byte, 0, prefixLen), at, s, 'P')
	for used < len(raw) && cap(dst)-len(dst) > prefixLen+maxChunk {
		rest := raw[used:]
		// A newline right after a full chunk still belongs to it.
		n := bytes.IndexByte(rest[:min(len(rest), maxChunk+1)], '\n')
		switch {
		case n >= 0:
			dst = append(append(append(dst, f...), rest[:n]...), '\n')
			used += n + 1
			continue
		case len(rest) > maxChunk:
			n = maxChunk
		case t == hold:
			return dst, used
		default:
			n = len(rest)
		}
		prefix := p
		if t == full && n == len(rest) {
			prefix = f
		}
		dst = append(append(append(dst, prefix...), rest[:n]...), '\n')
		used += n
	}
	return dst, used
}

// endsOpen tells whether the last of the encoded lines is a part of a line.
func endsOpen(out []byte) bool {
	last := bytes.LastIndexByte(out[:len(out)-1], '\n') + 1
	return out[last+tagAt] == 'P'
}

func appendPrefix(dst []byte, at time.Time, s Stream, tag byte) []byte {
	dst = at.UTC().AppendFormat(dst, timeFormat)
	dst = append(dst, ' ')
	dst = append(dst, s.String()...)
	return append(dst, ' ', tag, ' ')
}
