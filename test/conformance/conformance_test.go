// Package conformance runs critest, the conformance tests of the Container
// Runtime Interface, against the built daemon.
package conformance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// groups are the specs that must pass, as regular expressions of their names.
var groups = []string{
	`Runtime info`,
	`PodSandbox runtime should support (basic|sysctls)`,
	`\[k8s\.io\] Container runtime should support`, // basic operations, volume and device, log
	`Container Mount Propagation`,
	`Multiple Containers`,
	`Networking`,
	`Image Manager`,
	`Image Consistency`,
	`Image Identifier Consistency`,
	`Idempotence`,
	`Container OOM`,
	`Security Context (NamespaceOption|bucket)`,
	`Streaming`,
}

func TestBuiltin(t *testing.T) {
	required := append(everywhere(), readonly)
	if err := lab.ProbeUserNamespaces(t); err != nil {
		t.Logf("probe: %v: specs of user namespaces are not required", err)
	} else {
		required = append(required, userNamespaces)
	}
	run(t, "", required, lab.Options{})
}

// The specs that a handler passes only if it says that it can.
const (
	readonly       = `Container Mount Readonly`
	userNamespaces = `Security Context UserNamespaces`
)

// TestWebSocket runs the specs of streams over the other transport.
func TestWebSocket(t *testing.T) {
	run(t, "", []string{`Streaming`}, lab.Options{}, "-websocket-exec", "-websocket-attach", "-websocket-portforward")
}

func TestRunc(t *testing.T) {
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatalf("%v: install runc", err)
	}
	run(t, "runc", append(everywhere(), readonly), lab.Options{Config: fmt.Sprintf("[handlers.runc]\npath = %q\n", runc)})
}

// TestRuncOfToday runs the specs that Debian's runc is too old for.
func TestRuncOfToday(t *testing.T) {
	if err := lab.ProbeUserNamespaces(t); err != nil {
		t.Skip("probe: ", err)
	}
	runc, err := lab.Tool("runc")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "runc", []string{userNamespaces}, lab.Options{Config: fmt.Sprintf("[handlers.runc]\npath = %q\n", runc)})
}

func TestCrun(t *testing.T) {
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Fatalf("%v: install crun", err)
	}
	required := append(everywhere(), readonly)
	if said, err := exec.Command(crun, "features").CombinedOutput(); err != nil {
		t.Logf("crun features: %v: %s: specs of what it would have to say are not required", err, bytes.TrimSpace(said))
		required = everywhere()
	}
	lab.HideUnified(t) // crun before 1.9 refuses v2 with controllers beside v1
	run(t, "crun", required, lab.Options{Config: fmt.Sprintf("[handlers.crun]\npath = %q\n", crun)})
}

// everywhere are the specs that every handler must pass on this host.
func everywhere() []string {
	list := slices.Clone(groups)
	if host.HasAppArmor() {
		list = append(list, `AppArmor`)
	}
	return list
}

// withSudo returns an environment in which there is a sudo: critest loads AppArmor
// profiles with it, also as root.
func withSudo(t *testing.T, dir string, env []string) []string {
	if _, err := exec.LookPath("sudo"); err == nil {
		return env
	}
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "sudo"), []byte("#!/bin/sh\nexec \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return append(env, "PATH="+bin+":"+os.Getenv("PATH"))
}

// nodes is how many critest processes work side by side: their specs mostly sleep.
const nodes = 4

// run runs groups of critest's specs with a handler. Each spec is a subtest. A required spec that
// is skipped is a failure: all that they need is there, or critest's own probe is
// wrong. With SAMPAN_CONFORMANCE=all, every spec of critest runs, and one that
// critest skips is skipped.
func run(t *testing.T, handler string, groups []string, o lab.Options, flags ...string) {
	l := lab.New(t, o)
	everything := os.Getenv("SAMPAN_CONFORMANCE") == "all"
	focus := "(" + strings.Join(groups, "|") + ")"
	if only := os.Getenv("SAMPAN_CONFORMANCE_FOCUS"); only != "" {
		focus, everything = only, false
	}
	ginkgo, err := lab.Tool("ginkgo")
	if err != nil {
		t.Fatal(err)
	}
	critest, err := lab.Tool("critest.test")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{fmt.Sprintf("--nodes=%d", nodes), "--json-report=report.json", "--output-dir=" + l.Dir, "--no-color", "--timeout=30m"}
	if !everything {
		args = append(args, "--focus="+focus)
	}
	args = append(args, critest, "--",
		"-runtime-endpoint=unix://"+l.Socket, "-image-endpoint=unix://"+l.Socket, "-runtime-handler="+handler, "-config="+filepath.Join(l.Dir, "none.yaml"))
	args = append(args, flags...)
	cmd := exec.Command(ginkgo, args...)
	cmd.Env, cmd.Dir = withSudo(t, l.Dir, l.Env()), l.Dir
	output, runErr := cmd.CombinedOutput() // the report tells what failed
	specs, err := readReport(filepath.Join(l.Dir, "report.json"))
	if err != nil {
		t.Fatalf("critest: %v (%v)\n%s", runErr, err, output)
	}
	required := regexp.MustCompile(focus)
	passed, failed, skipped := 0, 0, 0
	for _, s := range specs {
		t.Run(s.name(), func(t *testing.T) {
			switch {
			case s.State == "passed":
				passed++
			case s.State == "skipped" && !required.MatchString(s.fullName()):
				skipped++
				t.Skip(s.Failure.Message)
			default:
				failed++
				t.Errorf("%s: %s (%s)\n%s", s.State, s.Failure.Message, s.Failure.Location, s.Written)
			}
		})
	}
	name := handler
	if name == "" {
		name = "builtin"
	}
	fmt.Printf("critest 1.36.0, handler %s: %d passed, %d failed, %d skipped\n", name, passed, failed, skipped)
	if passed == 0 {
		t.Errorf("critest ran nothing: %v\n%s", runErr, output)
	}
}

// spec is what ginkgo's report says of one spec.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	Written                 string `json:"CapturedGinkgoWriterOutput"`
	Failure                 struct {
		Message  string
		Location location
	}
}

type location struct {
	FileName   string
	LineNumber int
}

func (l location) String() string {
	return fmt.Sprintf("%s:%d", filepath.Base(l.FileName), l.LineNumber)
}

func (s spec) fullName() string {
	return strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
}

// name is the full name without the parts that all have.
func (s spec) name() string {
	return strings.NewReplacer("[k8s.io] ", "", " [Conformance]", "").Replace(s.fullName())
}

// readReport returns the specs that were meant to run. Ginkgo calls those that
// the focus leaves out skipped too, but gives no reason for them.
func readReport(path string) ([]spec, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var reports []struct{ SpecReports []spec }
	if err := json.Unmarshal(text, &reports); err != nil {
		return nil, err
	}
	var specs []spec
	for _, r := range reports {
		for _, s := range r.SpecReports {
			unwanted := s.State == "skipped" && s.Failure.Message == ""
			if !unwanted && (s.LeafNodeType == "It" || s.State != "passed") {
				specs = append(specs, s)
			}
		}
	}
	return specs, nil
}
