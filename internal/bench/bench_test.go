package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestQuantile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	for _, c := range []struct {
		of   []float64
		q    float64
		want float64
	}{
		{hundred, 0.5, 50}, {hundred, 0.9, 90}, {hundred, 0.99, 99}, {[]float64{7}, 0.99, 7}, {[]float64{1, 2, 3}, 0.5, 2}, {nil, 0.5, 0},
	} {
		if got := quantile(c.of, c.q); got != c.want {
			t.Errorf("quantile of %d values, %v: %v, want %v", len(c.of), c.q, got, c.want)
		}
	}
}

func TestParseStat(t *testing.T) {
	const line = "42 (a (b) c) S 7 42 42 0 -1 4194560 100 200 0 0 11 5 30 4 20 0 9 0 123456 1000 50 18446744073709551615 0"
	got, ok := parseStat(line)
	want := process{ppid: 7, name: "a (b) c", state: "S", start: 123456, cpu: 16 * tick, ended: 34 * tick}
	if !ok || got != want {
		t.Errorf("parsed %+v, %v, want %+v", got, ok, want)
	}
	for _, bad := range []string{"", "42", "42 (x", "42 (x) S 1"} {
		if _, ok := parseStat(bad); ok {
			t.Errorf("%q passed for a line of stat", bad)
		}
	}
}

// A daemon with a helper, and a monitor with a pause process and a container that
// has two processes.
var machine = map[int]process{
	1: {}, 10: {ppid: 1, name: "daemon"}, 11: {ppid: 10, name: "helper"},
	20: {ppid: 1, name: "shim", start: 5}, 21: {ppid: 20, name: "pause"}, 22: {ppid: 20, name: "app"}, 23: {ppid: 22, name: "child"},
	30: {ppid: 1, name: "stranger"},
}

func TestProcessesOfARuntime(t *testing.T) {
	target := target{known: map[int]uint64{30: 99}} // a monitor that has gone, and its pid to somebody else
	target.remember(machine, []int{22})
	if diff := cmp.Diff(map[int]uint64{20: 5}, target.known); diff != "" {
		t.Errorf("monitors (-want +got):\n%s", diff)
	}
	got := map[int]bool{}
	for pid := range descendants(machine, []int{10, 20}, []int{22}) {
		got[pid] = true
	}
	if diff := cmp.Diff(map[int]bool{10: true, 11: true, 20: true, 21: true}, got); diff != "" {
		t.Errorf("the runtime's processes (-want +got):\n%s", diff)
	}
}

// example has what reports have to cope with: several targets, one without a
// figure, names that are not plain.
func example() *Results {
	r := &Results{Version: resultsVersion, Targets: []TargetInfo{{Target: Target{Name: "a&b"}}, {Target: Target{Name: "c"}}}}
	up := Key{Case: "pods", Name: podUp, Unit: "ms"}
	r.Figures = []Figure{
		{Target: "a&b", Key: up, N: 10, P50: 1, P90: 2, P99: 300},
		{Target: "c", Key: up, N: 10, P50: 12.3, P90: 20, P99: 30},
		{Target: "a&b", Key: Key{Case: "memory", Variant: "50 pods", Name: "PSS", Unit: "MiB"}, N: 1, P50: 40},
	}
	for _, pods := range []string{"10 pods", "100 pods", "1000 pods"} {
		r.Figures = append(r.Figures, Figure{Target: "c", Key: Key{Case: "density", Variant: pods, Name: podUp, Unit: "ms"}, N: 9, P50: 10, P99: 20})
	}
	return r
}

func TestPictureIsXML(t *testing.T) {
	var b bytes.Buffer
	if err := example().Picture(&b); err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(bytes.NewReader(b.Bytes())); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"a&amp;b", "A pod up", ">12.3<", "not measured", "99th percentile"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the picture lacks %q", want)
		}
	}
}

func TestTables(t *testing.T) {
	var text, markdown bytes.Buffer
	if err := errors.Join(example().Print(&text), example().Markdown(&markdown)); err != nil {
		t.Fatal(err)
	}
	if want := "1.00 / 2.00 / 300   12.3 / 20.0 / 30.0"; !strings.Contains(text.String(), want) {
		t.Errorf("the table lacks %q:\n%s", want, &text)
	}
	if want := "| 50 pods: PSS | MiB | 40.0 | – |"; !strings.Contains(markdown.String(), want) {
		t.Errorf("the Markdown lacks %q:\n%s", want, &markdown)
	}
}

func TestSaveLoadMerge(t *testing.T) {
	file := filepath.Join(t.TempDir(), "r.json")
	if err := example().Save(file); err != nil {
		t.Fatal(err)
	}
	loaded, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(example(), loaded); diff != "" {
		t.Errorf("loaded (-saved +loaded):\n%s", diff)
	}
	both := Merge(loaded, example())
	if got := both.names(); !cmp.Equal(got, []string{"a&b", "c", "a&b (2)", "c (2)"}) {
		t.Errorf("merged targets: %q", got)
	}
	if f, ok := both.of("c (2)", Key{Case: "pods", Name: podUp, Unit: "ms"}); !ok || f.P50 != 12.3 {
		t.Errorf("merged figure: %+v, %v", f, ok)
	}
}
