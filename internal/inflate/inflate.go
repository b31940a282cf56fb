// Package inflate reads gzip streams (RFC 1951 and 1952). Inflating layers is most
// of what a pull costs, and this does it in about half the time of the libraries
// that there are for Go: it looks at 64 bits at a time, and takes from a table what
// to do for each 11 of them. It has no unsafe code, and must not get any: what it
// reads is hostile.
package inflate

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// What is wrong with a stream that is not cut short; one that is ends with
// io.ErrUnexpectedEOF.
var (
	ErrHeader   = errors.New("gzip: invalid header")
	ErrChecksum = errors.New("gzip: the content has another checksum or size than the stream says")
	ErrCorrupt  = errors.New("gzip: invalid deflate block")
)

const (
	window   = 32 << 10 // matches reach that far back
	outSize  = window + 192<<10
	inSize   = 64 << 10
	maxMatch = 258

	// The fast loop goes on while that much is there and has room: it looks at two
	// words of input and writes two literals and a match, whole words at a time.
	inSlack  = 16
	outSlack = 2 + maxMatch + 16
)

// Reader inflates a gzip stream of any number of members.
type Reader struct {
	src    io.Reader
	srcErr error

	in       []byte
	pos, end int    // in[pos:end] has not been looked at
	bits     uint64 // the next bits, the first one lowest; above have of them there is nothing
	have     uint

	out   []byte
	given int // out[given:made] is for the caller
	made  int
	base  int // where in out the member begins, or what is left of it

	state   func(*Reader) error // makes more of out; nil after err
	err     error               // after what is in out
	final   bool                // this is the member's last block
	stored  int                 // bytes to come of a stored block
	sum     uint32
	size    uint32
	summed  int // out up to here is in sum
	litlens litlenTable
	dists   distTable
	lengths [fixedLitlens + fixedDists]uint8
}

// NewReader reads the header of the stream's first member.
func NewReader(src io.Reader) (*Reader, error) {
	r := &Reader{src: src, in: make([]byte, inSize), out: make([]byte, outSize)}
	if err := r.header(); err != nil {
		return nil, noEOF(err)
	}
	return r, nil
}

// Close is for those who want a ReadCloser; there is nothing to close.
func (r *Reader) Close() error { return nil }

func (r *Reader) Read(p []byte) (int, error) {
	for r.given == r.made {
		if r.err != nil {
			return 0, r.err
		}
		r.slide()
		r.err = r.state(r)
		r.digest()
	}
	n := copy(p, r.out[r.given:r.made])
	r.given += n
	return n, nil
}

// slide makes room in out, and keeps what matches may refer to.
func (r *Reader) slide() {
	if r.made <= outSize/2 {
		return
	}
	n := r.made - window
	copy(r.out, r.out[n:r.made])
	r.given, r.made, r.summed = window, window, window
	r.base = max(0, r.base-n)
}

func (r *Reader) digest() {
	fresh := r.out[r.summed:r.made]
	r.sum, r.size, r.summed = crc32.Update(r.sum, crc32.IEEETable, fresh), r.size+uint32(len(fresh)), r.made
}

// more reads on, and fails at the end of the source: io.EOF.
func (r *Reader) more() error {
	if r.srcErr != nil {
		return r.srcErr
	}
	keep := min(r.pos, 8) // for unread
	r.pos, r.end = keep, copy(r.in, r.in[r.pos-keep:r.end])
	for range 100 {
		n, err := r.src.Read(r.in[r.end:])
		r.end, r.srcErr = r.end+n, err
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	r.srcErr = io.ErrNoProgress
	return r.srcErr
}

// unread gives back whole bytes that were looked at too early.
func (r *Reader) unread() {
	r.pos -= int(r.have / 8)
	r.have %= 8
	r.bits &= 1<<r.have - 1
}

// refill makes sure that there are n bits, or as many as the stream still has.
func (r *Reader) refill(n uint) error {
	for r.have < n {
		if r.pos == r.end {
			if err := r.more(); err != nil {
				return err
			}
		}
		r.bits |= uint64(r.in[r.pos]) << r.have
		r.pos++
		r.have += 8
	}
	return nil
}

// take returns the next n bits.
func (r *Reader) take(n uint) (uint, error) {
	if err := r.refill(n); err != nil {
		return 0, noEOF(err)
	}
	v := uint(r.bits & (1<<n - 1))
	r.drop(n)
	return v, nil
}

func (r *Reader) drop(n uint) {
	r.bits >>= n
	r.have -= n
}

// noEOF is for where the stream must not end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// octet returns the next byte. No bits are left over from before.
func (r *Reader) octet() (byte, error) {
	if r.pos == r.end {
		if err := r.more(); err != nil {
			return 0, err
		}
	}
	r.pos++
	return r.in[r.pos-1], nil
}

// header reads what is before a member's blocks. io.EOF means that there is
// nothing at all.
func (r *Reader) header() error {
	var h [10]byte
	for i := range h {
		b, err := r.octet()
		if i > 0 {
			err = noEOF(err)
		}
		if err != nil {
			return err
		}
		h[i] = b
	}
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return ErrHeader
	}
	if err := r.optional(h[3], crc32.ChecksumIEEE(h[:])); err != nil {
		return noEOF(err)
	}
	r.base, r.sum, r.size, r.final = r.made, 0, 0, false
	r.state = (*Reader).block
	return nil
}

// Parts that a header may have.
const (
	hasSum = 1 << (iota + 1)
	hasExtra
	hasName
	hasComment
)

// optional reads on in a header, of which sum is the checksum so far.
func (r *Reader) optional(flags byte, sum uint32) error {
	next := func() (byte, error) {
		b, err := r.octet()
		sum = crc32.Update(sum, crc32.IEEETable, []byte{b})
		return b, err
	}
	if flags&hasExtra != 0 {
		low, err := next()
		if err != nil {
			return err
		}
		high, err := next()
		if err != nil {
			return err
		}
		for range int(low) | int(high)<<8 {
			if _, err := next(); err != nil {
				return err
			}
		}
	}
	for _, part := range []byte{hasName, hasComment} {
		if flags&part == 0 {
			continue
		}
		for b := byte(1); b != 0; {
			var err error
			if b, err = next(); err != nil {
				return err
			}
		}
	}
	if flags&hasSum != 0 {
		want := uint16(sum)
		low, err := r.octet()
		if err != nil {
			return err
		}
		high, err := r.octet()
		if err != nil {
			return err
		}
		if uint16(low)|uint16(high)<<8 != want {
			return ErrHeader
		}
	}
	return nil
}

// trailer reads what is after a member's blocks, and the header of the next member
// if there is one.
func (r *Reader) trailer() error {
	r.unread()
	r.bits, r.have = 0, 0 // of a byte that was begun
	r.digest()
	var t [8]byte
	for i := range t {
		b, err := r.octet()
		if err != nil {
			return noEOF(err)
		}
		t[i] = b
	}
	if binary.LittleEndian.Uint32(t[:]) != r.sum || binary.LittleEndian.Uint32(t[4:]) != r.size {
		return ErrChecksum
	}
	return r.header()
}

// block begins a block.
func (r *Reader) block() error {
	if r.final {
		return r.trailer()
	}
	h, err := r.take(3)
	if err != nil {
		return err
	}
	r.final = h&1 != 0
	switch h >> 1 {
	case 0:
		return r.beginStored()
	case 1:
		for i := range r.lengths {
			r.lengths[i] = fixedLength(i)
		}
		return r.beginCoded(r.lengths[:fixedLitlens], r.lengths[fixedLitlens:])
	case 2:
		return r.beginDynamic()
	}
	return ErrCorrupt
}

func (r *Reader) beginStored() error {
	r.drop(r.have % 8)
	size, err := r.take(16)
	if err != nil {
		return err
	}
	inverse, err := r.take(16)
	if err != nil {
		return err
	}
	if size != ^inverse&0xffff {
		return ErrCorrupt
	}
	r.unread()
	r.stored = int(size)
	r.state = (*Reader).copyStored
	return nil
}

// copyStored copies what out has room for.
func (r *Reader) copyStored() error {
	for r.stored > 0 && r.made < len(r.out) {
		if r.pos == r.end {
			if err := r.more(); err != nil {
				return noEOF(err)
			}
		}
		n := copy(r.out[r.made:min(len(r.out), r.made+r.stored)], r.in[r.pos:r.end])
		r.pos, r.made, r.stored = r.pos+n, r.made+n, r.stored-n
	}
	if r.stored == 0 {
		r.state = (*Reader).block
	}
	return nil
}

// lengthOrder is how the lengths of the code of code lengths are sent.
var lengthOrder = [...]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// beginDynamic reads the codes of a block.
func (r *Reader) beginDynamic() error {
	h, err := r.take(14)
	if err != nil {
		return err
	}
	litlens, dists, codes := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if litlens > maxLitlens || dists > maxDists {
		return ErrCorrupt
	}
	var codeLengths [len(lengthOrder)]uint8
	for _, i := range lengthOrder[:codes] {
		n, err := r.take(3)
		if err != nil {
			return err
		}
		codeLengths[i] = uint8(n)
	}
	if err := r.readLengths(codeLengths[:], r.lengths[:litlens+dists]); err != nil {
		return err
	}
	return r.beginCoded(r.lengths[:litlens], r.lengths[litlens:litlens+dists])
}

// readLengths reads code lengths, which are themselves coded. The table of
// distances is free to be used for that.
func (r *Reader) readLengths(code, lengths []uint8) error {
	if err := build(r.dists[:], distBits, code, lengthEntry); err != nil {
		return err
	}
	for i := 0; i < len(lengths); {
		e, err := r.symbol(r.dists[:], distBits)
		if err != nil {
			return err
		}
		symbol := e >> valueShift
		if symbol < 16 {
			lengths[i] = uint8(symbol)
			i++
			continue
		}
		var repeated uint8
		least, extra := 3, uint(3)
		switch {
		case symbol == 16 && i == 0:
			return ErrCorrupt
		case symbol == 16:
			repeated, extra = lengths[i-1], 2
		case symbol == 18:
			least, extra = 11, 7
		}
		n, err := r.take(extra)
		if err != nil {
			return err
		}
		stop := i + least + int(n)
		if stop > len(lengths) {
			return ErrCorrupt
		}
		for ; i < stop; i++ {
			lengths[i] = repeated
		}
	}
	return nil
}

func (r *Reader) beginCoded(litlens, dists []uint8) error {
	if err := build(r.litlens[:], litlenBits, litlens, litlenEntry); err != nil {
		return err
	}
	if err := build(r.dists[:], distBits, dists, distEntry); err != nil {
		return err
	}
	r.state = (*Reader).coded
	return nil
}

// symbol reads one symbol and the extra bits that belong to it, and returns its
// entry with their value added to its own.
func (r *Reader) symbol(table []uint32, bits uint) (uint32, error) {
	// Not all that is asked for need be there: the code may be shorter.
	if err := r.refill(maxBits + maxDistExtra); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	e := table[r.bits&(1<<bits-1)]
	if e&pointer != 0 {
		e = table[e>>valueShift+uint32(r.bits>>bits)&(1<<(e>>codeShift&15)-1)]
	}
	n := uint(e & totalMask)
	switch {
	case r.have < n || r.have == 0:
		return 0, io.ErrUnexpectedEOF
	case e&invalid != 0:
		return 0, ErrCorrupt
	}
	extra := uint32(r.bits&(1<<n-1)) >> (e >> codeShift & 15)
	r.drop(n)
	return e + extra<<valueShift, nil
}

// coded inflates until the block ends or out is full.
func (r *Reader) coded() error {
	for r.made <= len(r.out)-outSlack {
		if r.end-r.pos >= inSlack {
			if done, err := r.fast(); done || err != nil {
				return err
			}
			continue
		}
		if done, err := r.one(); done || err != nil {
			return err
		}
	}
	return nil
}

// one inflates one symbol, near the end of the input.
func (r *Reader) one() (done bool, err error) {
	e, err := r.symbol(r.litlens[:], litlenBits)
	switch {
	case err != nil:
		return false, err
	case e&literal != 0:
		r.out[r.made] = byte(e >> valueShift)
		r.made++
		return false, nil
	case e&endOfBlock != 0:
		r.state = (*Reader).block
		return true, nil
	}
	length := int(e >> valueShift & valueMask)
	e, err = r.symbol(r.dists[:], distBits)
	if err != nil {
		return false, err
	}
	dist := int(e >> valueShift)
	if dist > r.made-r.base {
		return false, ErrCorrupt
	}
	for range length {
		r.out[r.made] = r.out[r.made-dist]
		r.made++
	}
	return false, nil
}

// fast does the same for as long as there is plenty of input and room.
//
// Whoever changes it: after a refill there are 56 bits at least. A code has 15 at
// most, of which the table takes up to 11 for a literal; a length has 5 more, a
// distance 13.
func (r *Reader) fast() (done bool, err error) {
	in, out := r.in[:r.end], r.out
	pos, made, base := r.pos, r.made, r.base
	bits, have := r.bits, r.have
	litlens, dists := &r.litlens, &r.dists
	lastIn, lastOut := len(in)-inSlack, len(out)-outSlack
loop:
	for pos <= lastIn && made <= lastOut {
		bits |= binary.LittleEndian.Uint64(in[pos:]) << (have & 63)
		pos += int((63 - have) / 8)
		have |= 56

		e := litlens[bits&(1<<litlenBits-1)]
		if e&literal != 0 {
			bits >>= e & 63
			have -= uint(e & totalMask)
			out[made] = byte(e >> valueShift)
			made++
			e = litlens[bits&(1<<litlenBits-1)]
			if e&literal != 0 {
				bits >>= e & 63
				have -= uint(e & totalMask)
				out[made] = byte(e >> valueShift)
				made++
				e = litlens[bits&(1<<litlenBits-1)]
				if e&literal != 0 { // 56-33 bits are left
					bits >>= e & 63
					have -= uint(e & totalMask)
					out[made] = byte(e >> valueShift)
					made++
					continue
				}
			}
		}
		if e&(pointer|endOfBlock|invalid) != 0 {
			if e&pointer != 0 {
				e = litlens[(e>>valueShift+uint32(bits>>litlenBits)&(1<<(e>>codeShift&15)-1))&(litlenSize-1)]
			}
			switch {
			case e&literal != 0:
				bits >>= e & 63
				have -= uint(e & totalMask)
				out[made] = byte(e >> valueShift)
				made++
				continue
			case e&endOfBlock != 0:
				bits >>= e & 63
				have -= uint(e & totalMask)
				r.state, done = (*Reader).block, true
				break loop
			case e&invalid != 0:
				err = ErrCorrupt
				break loop
			}
		}
		length := int(e>>valueShift) + int(uint32(bits&(1<<(e&63)-1))>>(e>>codeShift&15))
		bits >>= e & 63
		have -= uint(e & totalMask)

		if have < maxBits+maxDistExtra {
			bits |= binary.LittleEndian.Uint64(in[pos:]) << (have & 63)
			pos += int((63 - have) / 8)
			have |= 56
		}
		e = dists[bits&(1<<distBits-1)]
		if e&pointer != 0 {
			e = dists[(e>>valueShift+uint32(bits>>distBits)&(1<<(e>>codeShift&15)-1))&(distSize-1)]
		}
		dist := int(e>>valueShift) + int(uint32(bits&(1<<(e&63)-1))>>(e>>codeShift&15))
		bits >>= e & 63
		have -= uint(e & totalMask)
		if e&invalid != 0 || dist > made-base {
			err = ErrCorrupt
			break
		}
		from, stop := made-dist, made+length
		switch {
		case dist >= 8:
			for made < stop {
				binary.LittleEndian.PutUint64(out[made:], binary.LittleEndian.Uint64(out[from:]))
				made, from = made+8, from+8
			}
		case dist == 1:
			for v := 0x0101010101010101 * uint64(out[from]); made < stop; made += 8 {
				binary.LittleEndian.PutUint64(out[made:], v)
			}
		default:
			for ; made < stop; made, from = made+1, from+1 {
				out[made] = out[from]
			}
		}
		made = stop
	}
	r.pos, r.made = pos, made
	r.bits, r.have = bits&(1<<have-1), have
	return done, err
}
