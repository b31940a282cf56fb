package bench

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

// Print writes results as a table for terminals: the median, and the 90th and
// 99th percentile where there is more than one sample.
func (r *Results) Print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	fmt.Fprint(tw, "\tunit")
	for _, t := range r.Targets {
		fmt.Fprintf(tw, "\t%s", t.Name)
	}
	fmt.Fprintln(tw)
	last := ""
	for _, k := range r.keys() {
		if heading := k.heading(); heading != last {
			fmt.Fprintf(tw, "%s\n", strings.ToUpper(heading[:1])+heading[1:])
			last = heading
		}
		fmt.Fprintf(tw, "  %s\t%s", k.Name, k.Unit)
		for _, t := range r.Targets {
			fmt.Fprintf(tw, "\t%s", r.cell(t.Name, k, " / "))
		}
		fmt.Fprintln(tw)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, f := range r.Failures {
		if _, err := fmt.Fprintf(w, "failed: %s: %s: %s\n", f.Case, f.Target, f.Error); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%s; p50 / p90 / p99\n", r.Host)
	return err
}

// Markdown writes results as tables, one for each case.
func (r *Results) Markdown(w io.Writer) error {
	var b strings.Builder
	last := ""
	for _, k := range r.keys() {
		if k.Case != last {
			fmt.Fprintf(&b, "\n**%s**\n\n| | unit |", k.Case)
			for _, t := range r.Targets {
				fmt.Fprintf(&b, " %s |", t.Name)
			}
			b.WriteString("\n|---|---|" + strings.Repeat("---:|", len(r.Targets)) + "\n")
			last = k.Case
		}
		name := k.Name
		if k.Variant != "" {
			name = k.Variant + ": " + name
		}
		fmt.Fprintf(&b, "| %s | %s |", name, k.Unit)
		for _, t := range r.Targets {
			fmt.Fprintf(&b, " %s |", r.cell(t.Name, k, " / "))
		}
		b.WriteByte('\n')
	}
	for _, f := range r.Failures {
		fmt.Fprintf(&b, "\nFailed: %s: %s: %s\n", f.Case, f.Target, f.Error)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// heading is the case with its variant.
func (k Key) heading() string {
	if k.Variant == "" {
		return k.Case
	}
	return k.Case + ", " + k.Variant
}

func (r *Results) cell(target string, k Key, separator string) string {
	f, ok := r.of(target, k)
	switch {
	case !ok:
		return "–"
	case f.N < 2:
		return number(f.P50)
	}
	return number(f.P50) + separator + number(f.P90) + separator + number(f.P99)
}

// number has three digits that matter.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case a == 0:
		return "0"
	}
	return fmt.Sprintf("%.2f", v)
}

// String is the machine in a few words.
func (h HostInfo) String() string {
	return fmt.Sprintf("%d CPUs (%s), %.0f GiB, Linux %s, cgroup %s", h.CPUs, h.CPU, float64(h.MemoryMiB)/1024, h.Kernel, h.Cgroup)
}
