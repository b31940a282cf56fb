package bench

import (
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"
)

// A headline is a figure that the picture shows.
type headline struct {
	title, benchCase, variant, name string
}

var headlines = []headline{
	{"A pod up", "pods", "", podUp},
	{"A pod down", "pods", "", podDown},
	{"Pods up per second, 4 at a time", "burst", "4 at a time", "pods up"},
	{"CPU per pod up, 4 at a time", "burst", "4 at a time", cpuUp},
	{"Memory with 50 pods (PSS)", "memory", "50 pods", "PSS"},
	{"Memory of each further pod (PSS)", "memory", "", "each further pod, PSS"},
	{"ExecSync", "exec", "", "ExecSync"},
	{"CPU of ExecSync", "exec", "", "CPU of ExecSync"},
	{"ListContainerStats, 100 containers", "lists", "100 containers", "ListContainerStats"},
	{"Container output, 100-byte lines", "logs", "100-byte lines", "container output"},
	{"Exec, output", "streams", "", "exec, output"},
	{"Start of the daemon, 50 pods running", "start", "50 pods", "until it answers"},
}

// Where things are in the picture, in pixels.
const (
	pictureWidth = 960
	margin       = 28
	headHeight   = 92
	gap          = 24
	panelWidth   = (pictureWidth - 2*margin - gap) / 2
	labelWidth   = 128
	valueWidth   = 74
	barHeight    = 16
	barStep      = 24
	panelHead    = 44
)

// Colours: the first target stands out, the others step back.
var barColours = []string{"#0f766e", "#94a3b8", "#cbd5e1", "#a8a29e", "#d6d3d1"}

// Picture writes the main results as an SVG: bars, a panel for each figure, and
// how starts fare while a node fills up, if that was measured.
func (r *Results) Picture(w io.Writer) error {
	var b strings.Builder
	keys := r.pictured()
	panelHeight := panelHead + barStep*len(r.Targets) + 18
	rows := (len(keys) + 1) / 2
	curves := r.densityCurves()
	height := headHeight + rows*panelHeight + margin
	if len(curves) > 0 {
		height += curveHeight
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="Inter, Helvetica, Arial, DejaVu Sans, sans-serif">`+"\n",
		pictureWidth, height, pictureWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" rx="10" fill="#ffffff" stroke="#e2e8f0"/>`+"\n", pictureWidth, height)
	text(&b, margin, 40, 22, "#0f172a", "bold", "start", strings.Join(r.names(), ", "))
	text(&b, margin, 64, 12, "#64748b", "normal", "start", r.Host.String()+". Medians of one run, taken in turn.")
	for i, k := range keys {
		x, y := margin+(i%2)*(panelWidth+gap), headHeight+(i/2)*panelHeight
		r.panel(&b, x, y, k.title, k.Key)
	}
	if len(curves) > 0 {
		drawCurves(&b, margin, headHeight+rows*panelHeight, curves)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Results) names() []string {
	var names []string
	for _, t := range r.Targets {
		names = append(names, t.Name)
	}
	return names
}

type picturedKey struct {
	Key
	title string
}

// pictured are the headlines that were measured, and every pull.
func (r *Results) pictured() []picturedKey {
	var chosen []picturedKey
	all := r.keys()
	for _, h := range headlines {
		for _, k := range all {
			if k.Case == h.benchCase && k.Variant == h.variant && k.Name == h.name {
				chosen = append(chosen, picturedKey{k, h.title})
			}
		}
	}
	for _, k := range all {
		if k.Case == "pull" && k.Name != "CPU of PullImage" {
			chosen = append(chosen, picturedKey{k, k.Name + " " + k.Variant[strings.LastIndexByte(k.Variant, '/')+1:]})
		}
	}
	return chosen
}

// panel draws the bars of one figure.
func (r *Results) panel(b *strings.Builder, x, y int, title string, k Key) {
	note := k.Unit + ", less is better"
	if k.moreIsBetter() {
		note = k.Unit + ", more is better"
	}
	text(b, x, y+16, 14, "#0f172a", "bold", "start", title)
	text(b, x, y+32, 11, "#94a3b8", "normal", "start", note)
	largest := 0.0
	for _, t := range r.Targets {
		f, _ := r.of(t.Name, k)
		largest = max(largest, f.P50)
	}
	for i, t := range r.Targets {
		top := y + panelHead + i*barStep
		text(b, x, top+12, 12, "#334155", weight(i), "start", t.Name)
		f, ok := r.of(t.Name, k)
		if !ok {
			text(b, x+labelWidth, top+12, 12, "#94a3b8", "normal", "start", "not measured")
			continue
		}
		width := 2.0
		if largest > 0 {
			width = max(width, f.P50/largest*float64(panelWidth-labelWidth-valueWidth))
		}
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" rx="3" fill="%s"/>`+"\n", x+labelWidth, top, width, barHeight, colour(i))
		text(b, x+labelWidth+int(width)+8, top+12, 12, "#334155", weight(i), "start", number(f.P50))
	}
}

func colour(i int) string { return barColours[i%len(barColours)] }

func weight(i int) string {
	if i == 0 {
		return "bold"
	}
	return "normal"
}

func text(b *strings.Builder, x, y, size int, fill, weight, anchor, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" font-size="%d" fill="%s" font-weight="%s" text-anchor="%s">%s</text>`+"\n", x, y, size, fill, weight, anchor, html.EscapeString(s))
}

// curve is one line of the picture of density.
type curve struct {
	name   string
	colour string
	dashed bool
	points [][2]float64 // pods, milliseconds
}

// densityCurves are the median and the 99th percentile of starts, of each target
// with enough steps.
func (r *Results) densityCurves() []curve {
	var curves []curve
	for i, t := range r.Targets {
		p50 := curve{name: t.Name + ", median", colour: colour(i)}
		p99 := curve{name: t.Name + ", 99th percentile", colour: colour(i), dashed: true}
		for _, f := range r.Figures {
			var pods float64
			if _, err := fmt.Sscanf(f.Variant, "%f pods", &pods); err != nil || f.Case != "density" || f.Target != t.Name || f.Name != podUp {
				continue
			}
			p50.points = append(p50.points, [2]float64{pods, f.P50})
			p99.points = append(p99.points, [2]float64{pods, f.P99})
		}
		if len(p50.points) > 2 {
			curves = append(curves, p50, p99)
		}
	}
	return curves
}

const curveHeight = 300

func drawCurves(b *strings.Builder, x, y int, curves []curve) {
	text(b, x, y+16, 14, "#0f172a", "bold", "start", "A pod up, on a node that fills up")
	text(b, x, y+32, 11, "#94a3b8", "normal", "start", "ms, by the number of pods that are there")
	var maxX, maxY float64
	for _, c := range curves {
		for _, p := range c.points {
			maxX, maxY = max(maxX, p[0]), max(maxY, p[1])
		}
	}
	const left, right, top, bottom = 40, 260, 52, 250
	step := roundStep(maxY / 4)
	maxY = step * math.Ceil(maxY/step)
	atX := func(v float64) float64 { return float64(x+left) + v/maxX*float64(pictureWidth-2*margin-left-right) }
	atY := func(v float64) float64 { return float64(y+bottom) - v/maxY*float64(bottom-top) }
	for v := 0.0; v <= maxY+step/2; v += step {
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#e2e8f0"/>`+"\n", atX(0), atX(maxX), atY(v), atY(v))
		text(b, x+left-8, int(atY(v))+4, 11, "#94a3b8", "normal", "end", number(v))
	}
	for _, v := range []float64{0, maxX / 4, maxX / 2, maxX * 3 / 4, maxX} {
		text(b, int(atX(v)), y+bottom+18, 11, "#94a3b8", "normal", "middle", fmt.Sprintf("%.0f", v))
	}
	slices.SortStableFunc(curves, func(a, b curve) int { // legend from top to bottom, as the lines end
		return int(math.Copysign(1, b.points[len(b.points)-1][1]-a.points[len(a.points)-1][1]))
	})
	for i, c := range curves {
		var d strings.Builder
		for j, p := range c.points {
			fmt.Fprintf(&d, "%c%.1f %.1f ", "ML"[min(j, 1)], atX(p[0]), atY(p[1]))
		}
		dash := ""
		if c.dashed {
			dash = ` stroke-dasharray="5 4"`
		}
		fmt.Fprintf(b, `<path d="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", d.String(), c.colour, dash)
		lx, ly := pictureWidth-margin-right+24, y+top+10+i*22
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="%s" stroke-width="2"%s/>`+"\n", lx, lx+24, ly, ly, c.colour, dash)
		text(b, lx+32, ly+4, 12, "#334155", "normal", "start", c.name)
	}
}

// roundStep is the next larger of 1, 2, 5, 10, 20, ...
func roundStep(v float64) float64 {
	if v <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5} {
		if v <= m*power {
			return m * power
		}
	}
	return 10 * power
}
