package crash

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The files that internal/fault is controlled by; see there.
const faultDir = "/run/sampan-faults"

// sourcePoints lists every fault point there is in the source, by name: those that
// are called, and the three of each kind of record.
func sourcePoints(root string) ([]string, error) {
	var names []string
	files := token.NewFileSet()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			names = append(names, pointsOf(n)...)
			return true
		})
		return nil
	})
	slices.Sort(names)
	if twice := firstDuplicate(names); twice != "" {
		return nil, fmt.Errorf("fault point %s stands at two places", twice)
	}
	return names, err
}

// pointsOf returns the points that a call, or the kind of a record, stands for.
func pointsOf(n ast.Node) []string {
	switch n := n.(type) {
	case *ast.CallExpr:
		if isSelector(n.Fun, "fault", "Point") && len(n.Args) == 1 {
			return []string{literal(n.Args[0])}
		}
	case *ast.CompositeLit:
		if !isSelector(n.Type, "state", "Kind") {
			break
		}
		for _, e := range n.Elts {
			if field, ok := e.(*ast.KeyValueExpr); ok && fmt.Sprint(field.Key) == "Name" {
				kind := "record." + literal(field.Value)
				return []string{kind + ".begin", kind + ".temporary", kind + ".written"}
			}
		}
	}
	return nil
}

func isSelector(e ast.Expr, pkg, name string) bool {
	s, ok := e.(*ast.SelectorExpr)
	return ok && fmt.Sprint(s.X) == pkg && s.Sel.Name == name
}

func literal(e ast.Expr) string {
	if lit, ok := e.(*ast.BasicLit); ok {
		if text, err := strconv.Unquote(lit.Value); err == nil {
			return text
		}
	}
	return "no-literal"
}

func firstDuplicate(sorted []string) string {
	for i := 1; i < len(sorted); i++ {
		if sorted[i] == sorted[i-1] {
			return sorted[i]
		}
	}
	return ""
}

// shot is one kill to come: at the nth passage of a point in a scenario, of the
// process that passes it or of all.
type shot struct {
	scenario string
	point    string
	nth      int
	all      bool
}

func (s shot) String() string {
	who := "self"
	if s.all {
		who = "all"
	}
	return fmt.Sprintf("%s:%s:%d:%s", s.scenario, s.point, s.nth, who)
}

// parseShot reads what String wrote.
func parseShot(text string) (shot, error) {
	f := strings.Split(text, ":")
	if len(f) != 4 {
		return shot{}, fmt.Errorf("shot %q: want SCENARIO:POINT:N:self or all", text)
	}
	nth, err := strconv.Atoi(f[2])
	return shot{f[0], f[1], nth, f[3] == "all"}, err
}

// resetFaults makes an empty control directory: points are recorded from now on.
func resetFaults() error {
	for range 10 { // processes pass points meanwhile
		if err := os.RemoveAll(faultDir); err == nil {
			break
		}
	}
	for _, dir := range []string{"passed", "armed", "fired"} {
		if err := os.MkdirAll(filepath.Join(faultDir, dir), 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (s shot) arm() error {
	text := strconv.Itoa(s.nth)
	if s.all {
		text += " all"
	}
	path := filepath.Join(faultDir, "armed", s.point)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// disarm takes what did not fire back.
func disarm() error {
	dir := filepath.Join(faultDir, "armed")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o700)
}

func (s shot) fired() bool {
	_, err := os.Stat(filepath.Join(faultDir, "fired", s.point))
	return err == nil
}

// passages tells how often each point was passed since resetFaults.
func passages() (map[string]int, error) {
	entries, err := os.ReadDir(filepath.Join(faultDir, "passed"))
	passed := map[string]int{}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			passed[e.Name()] = int(info.Size())
		}
	}
	return passed, err
}
