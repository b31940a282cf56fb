package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
)

// resultsVersion is the version of the format of result files.
const resultsVersion = 1

// Results are what was seen.
type Results struct {
	Version  int          `json:"version"`
	Host     HostInfo     `json:"host"`
	Targets  []TargetInfo `json:"targets"`
	Cases    []CaseInfo   `json:"cases"`
	Figures  []Figure     `json:"figures"`
	Failures []Failure    `json:"failures,omitempty"`
}

// HostInfo is the machine.
type HostInfo struct {
	Kernel    string `json:"kernel"`
	CPU       string `json:"cpu"`
	CPUs      int    `json:"cpus"`
	MemoryMiB int    `json:"memoryMiB"`
	Cgroup    string `json:"cgroup"` // v1 or v2
}

// TargetInfo is a target and what it says it is.
type TargetInfo struct {
	Target
	Version string `json:"version"`
}

// CaseInfo tells when a case was run, and how busy the machine was: the number
// of runnable threads, averaged over a minute.
type CaseInfo struct {
	Name       string    `json:"name"`
	Began      time.Time `json:"began"`
	Seconds    float64   `json:"seconds"`
	LoadBefore float64   `json:"loadBefore"`
	LoadAfter  float64   `json:"loadAfter"`
}

// Key names what a figure is of.
type Key struct {
	Case    string `json:"case"`
	Variant string `json:"variant,omitempty"` // e.g. "host network"
	Name    string `json:"name"`              // e.g. "RunPodSandbox"
	Unit    string `json:"unit"`              // ms, MiB, MB/s, 1/s
}

// Figure is one thing seen N times on one target.
type Figure struct {
	Target string `json:"target"`
	Key
	N   int     `json:"n"`
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
}

// Failure is a case that a target did not get through.
type Failure struct {
	Target string `json:"target"`
	Case   string `json:"case"`
	Error  string `json:"error"`
}

// moreIsBetter tells units of speed from those of cost.
func (k Key) moreIsBetter() bool { return k.Unit == "MB/s" || k.Unit == "1/s" }

func newResults() *Results { return &Results{Version: resultsVersion, Host: hostInfo()} }

// samples collects what is seen of a target, by what it is of.
type samples struct {
	keys []Key
	seen map[Key][]float64
}

func (s *samples) add(k Key, value float64) {
	if s.seen == nil {
		s.seen = map[Key][]float64{}
	}
	if _, ok := s.seen[k]; !ok {
		s.keys = append(s.keys, k)
	}
	s.seen[k] = append(s.seen[k], value)
}

// ms adds a duration in milliseconds.
func (s *samples) ms(variant, name string, d time.Duration) {
	s.add(Key{Variant: variant, Name: name, Unit: "ms"}, float64(d)/1e6)
}

// collect makes figures of samples.
func (r *runner) collect(all map[*target]*samples) {
	for _, t := range r.targets {
		s := all[t]
		if s == nil || r.failed[t] {
			continue
		}
		for _, k := range s.keys {
			values := s.seen[k]
			slices.Sort(values)
			k.Case = r.current
			r.results.Figures = append(r.results.Figures, Figure{
				Target: t.Name, Key: k, N: len(values),
				P50: quantile(values, 0.50), P90: quantile(values, 0.90), P99: quantile(values, 0.99),
			})
			s.seen[k] = nil
		}
	}
}

func (r *runner) newSamples() map[*target]*samples {
	all := map[*target]*samples{}
	for _, t := range r.targets {
		all[t] = &samples{}
	}
	return all
}

// quantile of sorted values: the smallest that at least the share q of them do
// not exceed.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	i := int(q*float64(len(sorted))+0.999999) - 1
	return sorted[max(0, min(i, len(sorted)-1))]
}

// JSON writes results as a file of results has them.
func (r *Results) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", " ")
	return e.Encode(r)
}

// Save writes results to a file.
func (r *Results) Save(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(r.JSON(f), f.Close())
}

// Load reads results from a file.
func Load(path string) (*Results, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r Results
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read results %s: %w", path, err)
	}
	if r.Version != resultsVersion {
		return nil, fmt.Errorf("read results %s: they have version %d, this build knows %d", path, r.Version, resultsVersion)
	}
	return &r, nil
}

// Merge puts the results of several runs side by side. Targets of the same name
// get the number of their run; figures that one target has twice are those of
// the later run.
func Merge(runs ...*Results) *Results {
	m := &Results{Version: resultsVersion}
	for i, r := range runs {
		if i == 0 {
			m.Host = r.Host
		}
		rename := map[string]string{}
		for _, t := range r.Targets {
			name := t.Name
			if slices.ContainsFunc(m.Targets, func(o TargetInfo) bool { return o.Name == name }) {
				name = fmt.Sprintf("%s (%d)", name, i+1)
			}
			rename[t.Name] = name
			t.Name = name
			m.Targets = append(m.Targets, t)
		}
		for _, f := range r.Figures {
			f.Target = rename[f.Target]
			m.Figures = append(m.Figures, f)
		}
		for _, f := range r.Failures {
			f.Target = rename[f.Target]
			m.Failures = append(m.Failures, f)
		}
		m.Cases = append(m.Cases, r.Cases...)
	}
	return m
}

// keys are all that figures are of, in the order in which they were seen.
func (r *Results) keys() []Key {
	var keys []Key
	seen := map[Key]bool{}
	for _, f := range r.Figures {
		if !seen[f.Key] {
			seen[f.Key] = true
			keys = append(keys, f.Key)
		}
	}
	return keys
}

// of is the figure of a target, if there is one.
func (r *Results) of(target string, k Key) (Figure, bool) {
	i := slices.IndexFunc(r.Figures, func(f Figure) bool { return f.Target == target && f.Key == k })
	if i < 0 {
		return Figure{}, false
	}
	return r.Figures[i], true
}
