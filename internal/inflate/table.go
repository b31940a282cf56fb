package inflate

import "math/bits"

const (
	maxBits      = 15 // of a code
	maxDistExtra = 13
	maxLitlens   = 286
	maxDists     = 30
	fixedLitlens = 288 // in the fixed codes; the last two mean nothing
	fixedDists   = 32  // the same

	// A table is looked at with so many bits. Codes that are longer have a second
	// table behind it, all of which are of the same size.
	litlenBits = 11
	distBits   = 8

	// As large as tables can get, and powers of two: each second table has two
	// symbols at least.
	litlenSize = 8 << 10 // ≥ 2048 + 143*16
	distSize   = 4 << 10 // ≥ 256 + 15*128
)

type (
	litlenTable [litlenSize]uint32
	distTable   [distSize]uint32
)

// An entry of a table tells what comes next. Its low bits say how many bits that
// takes, with those that follow the code, and how many the code has. Then come what
// kind of thing it is, and its value: the literal, the least length or distance, or
// where the second table begins, which has as many bits as the code would have.
const (
	totalMask  = 1<<8 - 1
	codeShift  = 8
	invalid    = 1 << 12
	endOfBlock = 1 << 13
	pointer    = 1 << 14
	valueShift = 16
	valueMask  = 1<<15 - 1
	literal    = 1 << 31
)

func fixedLength(symbol int) uint8 {
	switch {
	case symbol < 144:
		return 8
	case symbol < 256:
		return 9
	case symbol < 280:
		return 7
	case symbol < fixedLitlens:
		return 8
	}
	return 5 // of a distance
}

func value(v, extra int) uint32 { return uint32(v)<<valueShift | uint32(extra) }

// litlenEntry is what a symbol of the first code means, without the code's length.
func litlenEntry(symbol int) uint32 {
	switch {
	case symbol < 256:
		return literal | value(symbol, 0)
	case symbol == 256:
		return endOfBlock
	case symbol < 265:
		return value(symbol-257+3, 0)
	case symbol < 285:
		extra := (symbol - 261) / 4
		return value(3+(4+(symbol-261)%4)<<extra, extra)
	case symbol == 285:
		return value(maxMatch, 0)
	}
	return invalid
}

// distEntry is what a symbol of the code of distances means.
func distEntry(symbol int) uint32 {
	switch {
	case symbol < 4:
		return value(symbol+1, 0)
	case symbol < maxDists:
		extra := symbol/2 - 1
		return value(1+(2+symbol%2)<<extra, extra)
	}
	return invalid
}

func lengthEntry(symbol int) uint32 { return value(symbol, 0) }

// build fills a table, which is looked at with so many bits, for a code in which
// each symbol has the length given. A code must use all that its lengths could
// tell, but for one of no symbol, or of one.
func build(table []uint32, tableBits int, lengths []uint8, entry func(symbol int) uint32) error {
	var count [maxBits + 1]int
	longest := 0
	for _, n := range lengths {
		count[n]++
		longest = max(longest, int(n))
	}
	for i := range table[:1<<tableBits] {
		table[i] = invalid
	}
	if longest == 0 {
		return nil
	}
	var next [maxBits + 1]int
	code := 0
	for n := 1; n <= longest; n++ {
		code <<= 1
		next[n] = code
		code += count[n]
	}
	if code != 1<<longest && (code != 1 || longest != 1) {
		return ErrCorrupt
	}
	second := 1 << tableBits
	for symbol, n := range lengths {
		if n == 0 {
			continue
		}
		length := int(n)
		reversed := int(bits.Reverse16(uint16(next[length])) >> (16 - length))
		next[length]++
		e := entry(symbol)
		e += uint32(length) | uint32(length)<<codeShift
		if length <= tableBits {
			for i := reversed; i < 1<<tableBits; i += 1 << length {
				table[i] = e
			}
			continue
		}
		first := &table[reversed&(1<<tableBits-1)]
		more := longest - tableBits
		if *first == invalid {
			*first = pointer | uint32(second)<<valueShift | uint32(more)<<codeShift
			second += 1 << more
		}
		sub := table[*first>>valueShift:][:1<<more]
		for i := reversed >> tableBits; i < len(sub); i += 1 << (length - tableBits) {
			sub[i] = e
		}
	}
	return nil
}
