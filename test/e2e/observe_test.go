package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// TestMetrics asks the daemon for its own figures after a pod's life.
func TestMetrics(t *testing.T) {
	const address = "127.0.0.1:9111"
	l := lab.New(t, lab.Options{Config: fmt.Sprintf("[metrics]\naddress = %q\n", address)})
	l.Pull(t, "busybox")
	config := l.PodConfig("counted")
	pod := l.RunPod(t, config)
	c := l.CreateContainer(t, pod, config, l.ContainerConfig("c", "busybox", "sleep", "1000"))
	l.StartContainer(t, c)
	over := l.CreateContainer(t, pod, config, l.ContainerConfig("over", "busybox", "true"))
	if _, err := l.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: "nobody"}); err == nil {
		t.Fatal("started nobody")
	}
	if _, err := l.Images.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "no-such-image"}}); err == nil {
		t.Fatal("pulled what is not there")
	}
	events, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := l.Runtime.GetContainerEvents(events, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	l.StartContainer(t, over)
	if _, err := stream.Recv(); err != nil { // it is under way now
		t.Fatal(err)
	}
	killKeeper(t, l, "worker")
	var families map[string]*dto.MetricFamily
	await(t, "the connection to the new worker", func() bool {
		families = scrape(t, "http://"+address+"/metrics")
		return value(families, "sampan_keeper_reconnects_total") > 0
	})
	l.AwaitExit(t, over, lab.Wait)
	families = scrape(t, "http://"+address+"/metrics")
	checkDocumented(t, families)
	for figure, want := range map[string]float64{
		`sampan_rpc_errors_total{method=StartContainer,code=NotFound}`: 1,
		`sampan_rpcs_in_flight{method=GetContainerEvents}`:             1,
		`sampan_rpcs_in_flight{method=RunPodSandbox}`:                  0,
		`sampan_pulls_total{result=ok}`:                                1,
		`sampan_pulls_total{result=error}`:                             1,
		`sampan_pods{state=ready}`:                                     1,
		`sampan_pods{state=not_ready}`:                                 0,
		`sampan_containers{state=running}`:                             1,
		`sampan_containers{state=exited}`:                              1,
		`sampan_containers{state=created}`:                             0,
		`sampan_operations_in_flight`:                                  0,
		`sampan_leaks_swept_total`:                                     0,
		`sampan_nri_plugins`:                                           0,
	} {
		if got := value(families, figure); got != want {
			t.Errorf("%s is %v, want %v", figure, got, want)
		}
	}
	for figure, bounds := range map[string][2]float64{
		"go_goroutines": {5, 500}, "process_cpu_seconds_total": {0.005, 60},
		"process_open_fds": {5, 200}, "process_resident_memory_bytes": {8 << 20, 256 << 20},
	} {
		if got := value(families, figure); got < bounds[0] || got > bounds[1] {
			t.Errorf("%s is %v, want %v", figure, got, bounds)
		}
	}
	if n := value(families, "sampan_pull_bytes_total"); n < 1000 {
		t.Errorf("%v bytes pulled", n)
	}
	for _, m := range families["sampan_rpc_duration_seconds"].GetMetric() {
		if m.GetLabel()[0].GetValue() == "RunPodSandbox" && (m.GetHistogram().GetSampleCount() != 1 || m.GetHistogram().GetSampleSum() <= 0) {
			t.Errorf("RunPodSandbox: %v", m)
		}
	}
}

func scrape(t *testing.T, url string) map[string]*dto.MetricFamily {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.New(bytes.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
		t.Fatalf("promlint: %v, %v", problems, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	for name := range families {
		if !regexp.MustCompile("^(sampan|process|go)_").MatchString(name) {
			t.Errorf("figure %s", name)
		}
	}
	return families
}

// value is that of a counter or gauge, written as name{label=value,...}; -1 if
// there is none.
func value(families map[string]*dto.MetricFamily, figure string) float64 {
	name, labels, _ := strings.Cut(strings.TrimSuffix(figure, "}"), "{")
	for _, m := range families[name].GetMetric() {
		var pairs []string
		for _, p := range m.GetLabel() {
			pairs = append(pairs, p.GetName()+"="+p.GetValue())
		}
		if strings.Join(pairs, ",") == labels {
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return -1
}

// checkDocumented compares the figures with docs/METRICS.md.
func checkDocumented(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "METRICS.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (counter|gauge|histogram) \\|").FindAllStringSubmatch(string(text), -1) {
		documented[row[1]] = true
		if f := families[row[1]]; f == nil || strings.ToLower(f.GetType().String()) != row[2] {
			t.Errorf("docs/METRICS.md says that %s is a %s; it is %v", row[1], row[2], f.GetType())
		}
	}
	for name := range families {
		if !documented[name] {
			t.Errorf("docs/METRICS.md lacks %s", name)
		}
	}
}

// TestMetricsAddressTaken: the daemon says what is wrong, and with which key.
func TestMetricsAddressTaken(t *testing.T) {
	lab.Require(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("root = %q\nstate = %q\nlisten = \"unix://%s/s\"\n[nri]\nenable = false\n[metrics]\naddress = %q\n", dir+"/root", dir+"/state", dir, listener.Addr())
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), lab.Wait)
	defer cancel()
	out, err := exec.CommandContext(ctx, os.Getenv(lab.Binary), "serve", "--config", config).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "metrics.address") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestCollectorAway: calls do not wait for a collector, nor does the daemon's end.
func TestCollectorAway(t *testing.T) {
	l := lab.New(t, lab.Options{Config: "[tracing]\nendpoint = \"http://127.0.0.1:4318\"\n"})
	start := time.Now()
	pod := l.RunPod(t, l.PodConfig("untraced"))
	l.RemovePod(t, pod)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("a pod's life took %v", took)
	}
	start = time.Now()
	l.Stop(t)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("the daemon's end took %v", took)
	}
	l.Start(t)
}

// spans is a collector.
type spans struct {
	collector.UnimplementedTraceServiceServer
	mu  sync.Mutex
	all []*tracepb.Span
}

func (s *spans) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, resource := range r.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			s.all = append(s.all, scope.GetSpans()...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// named returns the first span with the name in a trace.
func (s *spans) named(trace, name string) *tracepb.Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sp := range s.all {
		if fmt.Sprintf("%x", sp.GetTraceId()) == trace && sp.GetName() == name {
			return sp
		}
	}
	return nil
}

// TestTracing is a collector for a client that traces its calls, as the kubelet
// does.
func TestTracing(t *testing.T) {
	const address = "127.0.0.1:4317"
	lab.Require(t)
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	got := &spans{}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, got)
	go server.Serve(listener)
	defer server.Stop()
	// Who has not asked for it is not traced.
	l := lab.New(t, lab.Options{Config: fmt.Sprintf("[tracing]\nendpoint = \"http://%s\"\nsampling = 0\n", address)})

	const trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace+"-"+parent+"-01")
	if _, err := l.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox"}}); err != nil {
		t.Fatal(err)
	}
	config := l.PodConfig("traced")
	r, err := l.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	created, err := l.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: r.GetPodSandboxId(), Config: l.ContainerConfig("c", "busybox", "sleep", "1000"), SandboxConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.GetContainerId()}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: "nobody"}); err == nil {
		t.Fatal("started nobody")
	}
	l.RemovePod(t, r.GetPodSandboxId()) // without a trace
	l.Stop(t)                           // sends what is left
	l.Start(t)

	for name, of := range map[string]string{
		"runtime.v1.ImageService/PullImage": "",
		"pull":                              "runtime.v1.ImageService/PullImage",
		"pull: resolve":                     "pull",
		"pull: layer":                       "pull",
		"runtime.v1.RuntimeService/RunPodSandbox":   "",
		"network: attach":                           "runtime.v1.RuntimeService/RunPodSandbox",
		"runtime.v1.RuntimeService/CreateContainer": "",
		"layers: mount":                             "runtime.v1.RuntimeService/CreateContainer",
		"keeper: create":                            "runtime.v1.RuntimeService/CreateContainer",
		"runtime.v1.RuntimeService/StartContainer":  "",
		"keeper: start":                             "runtime.v1.RuntimeService/StartContainer",
	} {
		sp := got.named(trace, name)
		if sp == nil {
			t.Errorf("no span %q", name)
			continue
		}
		want := parent
		if of != "" {
			want = fmt.Sprintf("%x", got.named(trace, of).GetSpanId())
		}
		if p := fmt.Sprintf("%x", sp.GetParentSpanId()); p != want && name != "keeper: start" {
			t.Errorf("%q is part of %s, want %s (%q)", name, p, want, of)
		}
		if sp.GetEndTimeUnixNano() < sp.GetStartTimeUnixNano() {
			t.Errorf("%q ends before it begins", name)
		}
	}
	got.mu.Lock()
	defer got.mu.Unlock()
	failed := 0
	for _, sp := range got.all {
		if fmt.Sprintf("%x", sp.GetTraceId()) != trace {
			t.Errorf("span %q of a call that is not traced", sp.GetName())
		}
		if sp.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR {
			failed++
		}
	}
	if failed != 1 {
		t.Errorf("%d spans say that they have failed, want 1", failed)
	}
}
