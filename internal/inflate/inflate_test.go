package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
)

// contents have long and short matches, near and far, runs, and none of these.
func contents() map[string][]byte {
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	var text, mixed bytes.Buffer
	for text.Len() < 1<<20 {
		fmt.Fprintf(&text, "%x %d ", random.Uint64()>>random.UintN(60), text.Len())
	}
	for mixed.Len() < 1<<20 {
		at := random.IntN(len(noise) - 70_000)
		mixed.Write(noise[at : at+random.IntN(300)])
		mixed.WriteString(strings.Repeat(string("abcdefghi"[:1+random.IntN(9)]), random.IntN(100)))
		if mixed.Len() > 40_000 {
			back := 1 + random.IntN(33_000)
			mixed.Write(mixed.Bytes()[mixed.Len()-back:][:min(back, random.IntN(400))])
		}
	}
	return map[string][]byte{
		"nothing": nil, "byte": []byte("x"), "zeros": make([]byte, 3<<20), "noise": noise, "text": text.Bytes(), "mixed": mixed.Bytes(),
	}
}

func pack(t testing.TB, level int, parts ...[]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		w, err := gzip.NewWriterLevel(&b, level)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(p); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func unpack(r io.Reader) ([]byte, error) {
	z, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

func TestInflate(t *testing.T) {
	for name, content := range contents() {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, gzip.DefaultCompression, gzip.BestCompression} {
			packed := pack(t, level, content)
			for how, r := range map[string]io.Reader{
				"": bytes.NewReader(packed), "byte by byte": iotest.OneByteReader(bytes.NewReader(packed)), "by halves": iotest.HalfReader(bytes.NewReader(packed)),
				"with the error at once": iotest.DataErrReader(bytes.NewReader(packed)),
			} {
				if got, err := unpack(r); err != nil || !bytes.Equal(got, content) {
					t.Errorf("%s, level %d, read %s: %d bytes, %v; want %d bytes", name, level, how, len(got), err, len(content))
				}
			}
		}
	}
}

func TestMembers(t *testing.T) {
	c := contents()
	want := slicesConcat(c["text"], nil, c["noise"], c["byte"], c["zeros"])
	got, err := unpack(bytes.NewReader(pack(t, 6, c["text"], nil, c["noise"], c["byte"], c["zeros"])))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v; want %d", len(got), err, len(want))
	}
	// A member cannot refer to what another has.
	var b bytes.Buffer
	b.Write(pack(t, 6, c["text"]))
	w, err := flate.NewWriterDict(&b, 9, c["text"][len(c["text"])-1000:])
	if err != nil {
		t.Fatal(err)
	}
	b.Write([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0})
	w.Write(c["text"][len(c["text"])-1000:])
	w.Close()
	if _, err := unpack(&b); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a match that begins before its member: %v", err)
	}
}

func slicesConcat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestHeader(t *testing.T) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Name, w.Comment, w.Extra = "a name", "a comment", []byte("extra")
	io.WriteString(w, "content")
	w.Close()
	packed := b.Bytes()
	if got, err := unpack(bytes.NewReader(packed)); err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
	end := 10 + 2 + len("extra") + len("a name") + 1 + len("a comment") + 1
	summed := bytes.Clone(packed[:end])
	summed[3] |= hasSum
	sum := crc32.ChecksumIEEE(summed)
	rest := packed[end:]
	if got, err := unpack(bytes.NewReader(slicesConcat(summed, []byte{byte(sum), byte(sum >> 8)}, rest))); err != nil || string(got) != "content" {
		t.Errorf("with a checksum of the header: %q, %v", got, err)
	}
	if _, err := unpack(bytes.NewReader(slicesConcat(summed, []byte{byte(sum), byte(sum>>8) ^ 1}, rest))); !errors.Is(err, ErrHeader) {
		t.Errorf("with a wrong checksum of the header: %v", err)
	}
}

// Every stream that is cut short says so, and none that is changed passes.
func TestDamage(t *testing.T) {
	content := []byte(strings.Repeat("what is in it ", 10) + "and once more, but not the same")
	for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestCompression} {
		packed := pack(t, level, content)
		for n := range packed {
			if _, err := unpack(bytes.NewReader(packed[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("level %d, %d of %d bytes: %v", level, n, len(packed), err)
			}
		}
		for i := range packed {
			if i > 2 && i < 10 {
				continue // flags and facts that nobody checks
			}
			for bit := range 8 {
				damaged := bytes.Clone(packed)
				damaged[i] ^= 1 << bit
				if got, err := unpack(bytes.NewReader(damaged)); err == nil && !bytes.Equal(got, content) {
					t.Errorf("level %d, bit %d of byte %d changed: passes with other content", level, bit, i)
				}
			}
		}
	}
	if _, err := unpack(bytes.NewReader(append(pack(t, 6, content), "garbage behind it"...))); !errors.Is(err, ErrHeader) {
		t.Errorf("with garbage behind it: %v", err)
	}
	cause := errors.New("the network is gone")
	if _, err := unpack(io.MultiReader(bytes.NewReader(pack(t, 6, content)[:40]), iotest.ErrReader(cause))); !errors.Is(err, cause) {
		t.Errorf("the source's error becomes %v", err)
	}
}

// FuzzInflate compares with the standard library, also what is inflated before an
// error.
func FuzzInflate(f *testing.F) {
	for _, content := range contents() {
		f.Add(pack(f, 6, content[:min(len(content), 3000)]))
		f.Add(pack(f, gzip.HuffmanOnly, content[:min(len(content), 300)], content[:min(len(content), 3000)]))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// Fuzzers do not find checksums: a deflate stream in a header of our own.
		for _, stream := range [][]byte{data, slicesConcat([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, data)} {
			const limit = 4 << 20
			var got, want []byte
			var gotErr, wantErr error
			if z, err := NewReader(bytes.NewReader(stream)); err != nil {
				gotErr = err
			} else {
				got, gotErr = io.ReadAll(io.LimitReader(z, limit))
			}
			if z, err := gzip.NewReader(bytes.NewReader(stream)); err != nil {
				wantErr = err
			} else {
				want, wantErr = io.ReadAll(io.LimitReader(z, limit))
			}
			if (gotErr == nil) != (wantErr == nil) {
				t.Fatalf("error %v, the standard library says %v", gotErr, wantErr)
			}
			if gotErr == nil && !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, the standard library says %d others", len(got), len(want))
			}
			if n := min(len(got), len(want)); !bytes.Equal(got[:n], want[:n]) {
				t.Fatalf("other content before the error %v", gotErr)
			}
		}
	})
}

func BenchmarkInflate(b *testing.B) {
	for name, content := range contents() {
		if len(content) < 1<<16 {
			continue
		}
		packed := pack(b, 6, content)
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(content)))
			for b.Loop() {
				z, err := NewReader(bytes.NewReader(packed))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, z); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
