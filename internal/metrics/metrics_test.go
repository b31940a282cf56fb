package metrics

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const want = `# HELP a_seconds How \\long\n it takes.
# TYPE a_seconds histogram
a_seconds_bucket{method="x",le="0.1"} 2
a_seconds_bucket{method="x",le="1"} 3
a_seconds_bucket{method="x",le="+Inf"} 4
a_seconds_sum{method="x"} 6.6
a_seconds_count{method="x"} 4
# HELP b_total Bees.
# TYPE b_total counter
b_total{kind="one",what="\"\\\n"} 3
b_total{kind="two",what=""} 1
# HELP c Seas.
# TYPE c gauge
c -1
# HELP d Dees.
# TYPE d gauge
d{v="z"} 0.5
`

func filled() *Registry {
	r := new(Registry)
	b := r.Counter("b_total", "Bees.", "kind", "what")
	a := r.Histogram("a_seconds", "How \\long\n it takes.", []float64{0.1, 1}, "method")
	c := r.Gauge("c", "Seas.")
	r.Func("gauge", "d", "Dees.", []string{"v"}, func() []Sample { return []Sample{{[]string{"z"}, 0.5}} })
	b.Add(1, "two", "")
	b.Add(1, "one", "\"\\\n")
	b.Add(2, "one", "\"\\\n")
	for _, v := range []float64{0.05, 0.1, 0.45, 6} {
		a.Observe(v, "x")
	}
	c.Add(1)
	c.Add(-2)
	return r
}

func TestFormat(t *testing.T) {
	var out bytes.Buffer
	if err := filled().Write(&out); err != nil {
		t.Fatal(err)
	}
	if out.String() != want {
		t.Errorf("got:\n%swant:\n%s", out.String(), want)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(out.Bytes()))
	if err != nil || len(families) != 4 || families["a_seconds"].GetMetric()[0].GetHistogram().GetSampleCount() != 4 {
		t.Errorf("as others read it: %v, %v", families, err)
	}
	problems, err := promlint.New(&out).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
}

func TestNothingIsCounted(t *testing.T) {
	(*Counter)(nil).Add(1, "x")
	(*Gauge)(nil).Add(1)
	(*Histogram)(nil).Observe(1)
}

func TestConcurrency(t *testing.T) {
	r := new(Registry)
	c, h := r.Counter("c_total", "C.", "l"), r.Histogram("h", "H.", Seconds, "l")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				c.Add(1, "a")
				h.Observe(0.2, "a")
				r.Write(io.Discard)
			}
		})
	}
	wg.Wait()
	var out strings.Builder
	r.Write(&out)
	if !strings.Contains(out.String(), `c_total{l="a"} 8000`) || !strings.Contains(out.String(), `h_count{l="a"} 8000`) {
		t.Error(out.String())
	}
}

func TestServer(t *testing.T) {
	s, err := Listen("127.0.0.1:0", filled())
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	url := "http://" + s.Address()
	resp, err := http.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if string(body) != want || resp.Header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("%v\n%s", resp.Header, body)
	}
	for path, code := range map[string]int{"/": 404, "/metrics/x": 404} {
		if resp, err := http.Get(url + path); err != nil || resp.StatusCode != code {
			t.Errorf("%s: %v, %v", path, resp, err)
		}
	}
	if resp, err := http.Post(url+"/metrics", "text/plain", nil); err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v, %v", resp, err)
	}
	s.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
