// Package house tests who may import whom. The rules are below; imports.txt
// lists every import there is of a package that is not the standard library's,
// so that a new one shows in a diff. `go test ./test/house -update` writes it.
package house

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write imports.txt anew")

const module = "sampan.dev/sampan/"

// floors is the house: a package imports only from floors below its own, never
// up, never sideways. A sub-package lives on its parent's floor, and may import
// the rest of its family.
var floors = [][]string{
	{"internal/fault"},
	{"internal/state", "internal/host", "internal/flight", "internal/inflate", "internal/config", "internal/embedded", "internal/hello", "internal/backlog", "internal/checkpoint", "internal/bench", "internal/metrics", "internal/span", "internal/fsck", "internal/systemd"},
	{"internal/spec", "internal/layer", "internal/registry", "internal/network", "internal/ociruntime", "internal/nri", "internal/reset"},
	{"internal/keeper", "internal/handler"},
	{"internal/image"},
	{"internal/pod", "internal/stats"},
	{"internal/stream"},
	{"internal/cri", "internal/admin"},
	{"cmd/sampan", "cmd/sampan-keeper", "cmd/sampan-hello", "cmd/sampan-init"},
}

// speaksCRI lists who may import the CRI's types.
var speaksCRI = []string{"internal/cri", "internal/spec", "internal/stream", "internal/stats", "internal/pod", "internal/bench", "cmd/sampan"}

// pure lists what a package without I/O and clock must not import.
var pure = map[string][]string{
	"internal/spec":   {"os", "os/exec", "io", "net", "net/http", "time", "log/slog", "syscall"},
	"internal/config": {"os/exec", "net/http", "time", "log/slog", "syscall"},
}

// keptOut lists what a program must not contain, however it would get in: an
// import path, or with a trailing slash all below it.
var keptOut = map[string][]string{
	// The keeper is small and has no network. gRPC's codes and statuses come
	// with ttrpc and are only words.
	"cmd/sampan-keeper": {
		"net/http", "golang.org/x/net/http2", "google.golang.org/grpc", "google.golang.org/grpc/internal/transport",
		"k8s.io/", "github.com/containerd/containerd/", "github.com/spf13/cobra", "github.com/google/go-containerregistry/",
	},
	// The daemon is built without cgo and creates no container itself.
	"cmd/sampan": {
		"runtime/cgo", "github.com/opencontainers/runc/libcontainer", "github.com/opencontainers/runc/libcontainer/nsenter",
		"github.com/google/go-containerregistry/", "github.com/seccomp/libseccomp-golang",
	},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
	Error      *struct{ Err string }
}

func (p pkg) name() string { return strings.TrimPrefix(p.ImportPath, module) }

// list asks the go command about packages, as they are built.
func list(t *testing.T, cgo string, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-tags", "seccomp", "-json=ImportPath,Imports,Deps,Standard,Error"}, args...)...)
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOOS=linux")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var packages []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// floor returns where a package lives and the head of its family.
func floor(name string) (int, string) {
	for i, families := range floors {
		for _, family := range families {
			if name == family || strings.HasPrefix(name, family+"/") {
				return i, family
			}
		}
	}
	return -1, ""
}

func TestDirection(t *testing.T) {
	for _, p := range list(t, "1", "./cmd/...", "./internal/...") {
		from, family := floor(p.name())
		if from < 0 {
			t.Errorf("%s: lives on no floor of the house; add it to floors", p.name())
			continue
		}
		for _, imported := range p.Imports {
			name, ours := strings.CutPrefix(imported, module)
			if !ours {
				continue
			}
			to, other := floor(name)
			if to >= from && other != family {
				t.Errorf("%s imports %s, which is not below it", p.name(), name)
			}
			if strings.HasPrefix(name, "test/") {
				t.Errorf("%s imports the test package %s", p.name(), name)
			}
		}
	}
}

func TestWhoSpeaksCRI(t *testing.T) {
	for _, p := range list(t, "1", "./cmd/...", "./internal/...") {
		_, family := floor(p.name())
		speaks := slices.ContainsFunc(p.Imports, func(s string) bool { return strings.HasPrefix(s, "k8s.io/cri-api/") })
		if speaks && !slices.Contains(speaksCRI, family) {
			t.Errorf("%s imports the CRI's types; only these may: %s", p.name(), strings.Join(speaksCRI, ", "))
		}
	}
}

func TestPure(t *testing.T) {
	for _, p := range list(t, "1", "./internal/...") {
		for _, forbidden := range pure[p.name()] {
			if slices.Contains(p.Imports, forbidden) {
				t.Errorf("%s imports %s", p.name(), forbidden)
			}
		}
	}
}

func TestKeptOut(t *testing.T) {
	for _, program := range slices.Sorted(maps.Keys(keptOut)) {
		cgo := "0"
		if program == "cmd/sampan-keeper" {
			cgo = "1"
		}
		if matches, _ := filepath.Glob(filepath.Join("..", "..", program, "*.go")); len(matches) == 0 {
			t.Errorf("%s: is not there", program)
			continue
		}
		for _, p := range list(t, cgo, "./"+program) {
			for _, dep := range p.Deps {
				for _, forbidden := range keptOut[program] {
					if dep == forbidden || strings.HasSuffix(forbidden, "/") && strings.HasPrefix(dep, forbidden) {
						t.Errorf("%s contains %s; `go mod why` or `go list -deps` tell how it came in", program, dep)
					}
				}
			}
		}
	}
}

// TestImports compares every import of ours and of other modules with the list.
func TestImports(t *testing.T) {
	var got bytes.Buffer
	packages := list(t, "1", "./cmd/...", "./internal/...")
	slices.SortFunc(packages, func(a, b pkg) int { return cmp.Compare(a.ImportPath, b.ImportPath) })
	for _, p := range packages {
		fmt.Fprintln(&got, p.name())
		for _, imported := range slices.Sorted(slices.Values(p.Imports)) {
			if strings.Contains(strings.Split(imported, "/")[0], ".") {
				fmt.Fprintln(&got, "\t"+strings.TrimPrefix(imported, module))
			}
		}
	}
	if *update {
		if err := os.WriteFile("imports.txt", got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("imports.txt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("imports have changed (-listed +found); if that is meant, `go test ./test/house -update`:\n%s", diff)
	}
}

// TestDependenciesHaveReasons looks for every module we require ourselves in the
// table of docs/ARCHITECTURE.md.
func TestDependenciesHaveReasons(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, "|"); len(cells) >= 5 {
			for name := range strings.SplitSeq(cells[1], ",") {
				rows[strings.Trim(strings.TrimSpace(name), "`")] = true
			}
		}
	}
	required, err := requirements(filepath.Join("..", "..", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for m, direct := range required {
		if direct && !rows[m] {
			t.Errorf("%s has no row in the dependency table of docs/ARCHITECTURE.md", m)
		}
		delete(rows, m)
	}
	for row := range rows {
		if strings.Contains(strings.Split(row, "/")[0], ".") && strings.Contains(row, "/") {
			t.Errorf("docs/ARCHITECTURE.md gives reasons for %s, which go.mod does not require", row)
		}
	}
}

// requirements returns the modules of go.mod, true for those we import ourselves.
func requirements(path string) (map[string]bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	modules := map[string]bool{}
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		line, comment, _ := strings.Cut(strings.TrimPrefix(scanner.Text(), "require "), "//")
		if fields := strings.Fields(line); len(fields) == 2 && strings.HasPrefix(fields[1], "v") && strings.Contains(fields[0], ".") {
			modules[fields[0]] = strings.TrimSpace(comment) != "indirect"
		}
	}
	return modules, scanner.Err()
}

// A promise in docs/FAILURES.md that names a test names one that there is.
func TestFailuresNameTests(t *testing.T) {
	text, err := os.ReadFile("../../docs/FAILURES.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	for _, dir := range []string{"cmd", "internal", "test"} {
		err := filepath.WalkDir(filepath.Join("../..", dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, "_test.go") {
				return err
			}
			source, err := os.ReadFile(path)
			for _, m := range declared.FindAllSubmatch(source, -1) {
				tests[string(m[1])] = true
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(string(text), -1) {
		if !tests[name] {
			t.Errorf("docs/FAILURES.md: there is no %s", name)
		}
	}
}
