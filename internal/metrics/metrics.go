// Package metrics keeps the daemon's own figures and shows them in Prometheus'
// text format, version 0.0.4. It knows counters, gauges and histograms, and nothing
// of what they count.
//
// A nil figure counts nothing: who is told of no registry needs no other code. All
// of the package may be used from several goroutines.
package metrics

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// Registry is a set of figures. The zero Registry is empty.
type Registry struct {
	mu       sync.Mutex
	families []*family
}

// Sample is one value of a figure that is asked for when it is shown.
type Sample struct {
	Labels []string // values, in the order of the names
	Value  float64
}

// family is a figure with all its labels' values.
type family struct {
	name, help, kind string
	labels           []string
	write            func(w *bufio.Writer, f *family)
}

func (r *Registry) add(f *family) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.ContainsFunc(r.families, func(o *family) bool { return o.name == f.name }) {
		panic("metrics: " + f.name + " is there twice")
	}
	r.families = append(r.families, f)
	slices.SortFunc(r.families, func(a, b *family) int { return strings.Compare(a.name, b.name) })
}

// Counter is a number that grows; its name ends with _total.
type Counter struct{ values series[atomic.Int64] }

// Counter adds a counter to the registry.
func (r *Registry) Counter(name, help string, labels ...string) *Counter {
	return &Counter{number(r, name, help, "counter", labels)}
}

// Add adds n to the counter of these labels' values.
func (c *Counter) Add(n int64, values ...string) {
	if c != nil {
		c.values.of(values).Add(n)
	}
}

// Gauge is a number that goes up and down.
type Gauge struct{ values series[atomic.Int64] }

// Gauge adds a gauge to the registry.
func (r *Registry) Gauge(name, help string, labels ...string) *Gauge {
	return &Gauge{number(r, name, help, "gauge", labels)}
}

// Add adds n, which may be negative, to the gauge of these labels' values.
func (g *Gauge) Add(n int64, values ...string) {
	if g != nil {
		g.values.of(values).Add(n)
	}
}

func number(r *Registry, name, help, kind string, labels []string) series[atomic.Int64] {
	s := series[atomic.Int64]{&table[atomic.Int64]{all: make(map[string]*entry[atomic.Int64])}}
	r.add(&family{name, help, kind, labels, func(w *bufio.Writer, f *family) {
		for _, e := range s.sorted() {
			f.sample(w, "", e.labels, "", float64(e.value.Load()))
		}
	}})
	return s
}

// Func adds a figure whose values are asked for when it is shown; kind is "counter"
// or "gauge". Ask must not wait for anything.
func (r *Registry) Func(kind, name, help string, labels []string, ask func() []Sample) {
	r.add(&family{name, help, kind, labels, func(w *bufio.Writer, f *family) {
		for _, s := range ask() {
			f.sample(w, "", s.Labels, "", s.Value)
		}
	}})
}

// Histogram counts values by how large they are.
type Histogram struct {
	bounds []float64
	values series[distribution]
}

// distribution has a count for each bound and one for what is above them.
type distribution struct {
	mu     sync.Mutex
	counts []int64
	sum    float64
}

// Seconds are bounds for what takes a millisecond or minutes.
var Seconds = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300}

// Histogram adds a histogram with these upper bounds to the registry.
func (r *Registry) Histogram(name, help string, bounds []float64, labels ...string) *Histogram {
	h := &Histogram{bounds, series[distribution]{&table[distribution]{all: make(map[string]*entry[distribution])}}}
	r.add(&family{name, help, "histogram", labels, h.write})
	return h
}

// Observe counts a value.
func (h *Histogram) Observe(v float64, values ...string) {
	if h == nil {
		return
	}
	d := h.values.of(values)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.counts == nil {
		d.counts = make([]int64, len(h.bounds)+1)
	}
	i, _ := slices.BinarySearch(h.bounds, v)
	d.counts[i]++
	d.sum += v
}

func (h *Histogram) write(w *bufio.Writer, f *family) {
	for _, e := range h.values.sorted() {
		e.value.mu.Lock()
		counts, sum := slices.Clone(e.value.counts), e.value.sum
		e.value.mu.Unlock()
		if counts == nil {
			continue
		}
		var n int64
		for i, c := range counts {
			n += c
			le := "+Inf"
			if i < len(h.bounds) {
				le = number64(h.bounds[i])
			}
			f.sample(w, "_bucket", e.labels, le, float64(n))
		}
		f.sample(w, "_sum", e.labels, "", sum)
		f.sample(w, "_count", e.labels, "", float64(n))
	}
}

// series has a value for each set of labels' values that has come up.
type series[T any] struct{ *table[T] }

type table[T any] struct {
	mu  sync.RWMutex
	all map[string]*entry[T]
}

type entry[T any] struct {
	labels []string
	value  T
}

func (t *table[T]) of(labels []string) *T {
	key := strings.Join(labels, "\xff")
	t.mu.RLock()
	e := t.all[key]
	t.mu.RUnlock()
	if e != nil {
		return &e.value
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e = t.all[key]; e == nil {
		e = &entry[T]{labels: slices.Clone(labels)}
		t.all[key] = e
	}
	return &e.value
}

func (t *table[T]) sorted() []*entry[T] {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*entry[T], 0, len(t.all))
	for _, e := range t.all {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b *entry[T]) int { return slices.Compare(a.labels, b.labels) })
	return list
}

// Write shows all figures.
func (r *Registry) Write(w io.Writer) error {
	r.mu.Lock()
	families := slices.Clone(r.families)
	r.mu.Unlock()
	out := bufio.NewWriter(w)
	for _, f := range families {
		fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", f.name, escape(f.help, false), f.name, f.kind)
		f.write(out, f)
	}
	return out.Flush()
}

// sample writes one line. Le is the bound of a histogram's bucket.
func (f *family) sample(w *bufio.Writer, suffix string, values []string, le string, v float64) {
	var pairs []string
	for i, name := range f.labels {
		pairs = append(pairs, name+`="`+escape(values[i], true)+`"`)
	}
	if le != "" {
		pairs = append(pairs, `le="`+le+`"`)
	}
	w.WriteString(f.name + suffix)
	if len(pairs) > 0 {
		w.WriteString("{" + strings.Join(pairs, ",") + "}")
	}
	w.WriteString(" " + number64(v) + "\n")
}

func number64(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

func escape(s string, quoted bool) string {
	s = strings.ReplaceAll(strings.ReplaceAll(s, `\`, `\\`), "\n", `\n`)
	if quoted {
		s = strings.ReplaceAll(s, `"`, `\"`)
	}
	return s
}
