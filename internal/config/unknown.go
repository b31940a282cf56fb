package config

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// goNames is the part of the decoder's errors that means nothing to a user.
var goNames = regexp.MustCompile(` struct field \S+ of type`)

// explain turns the decoder's error into one line for each problem, with the
// line of the file and, for a key that does not exist, the nearest that does.
func explain(err error) error {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) {
		var lines []error
		for i := range missing.Errors {
			e := &missing.Errors[i]
			row, _ := e.Position()
			lines = append(lines, fmt.Errorf("line %d: %s", row, unknownKey(e.Key())))
		}
		return errors.Join(lines...)
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, column := decode.Position()
		where := fmt.Sprintf("line %d, column %d", row, column)
		if key := strings.Join(decode.Key(), "."); key != "" {
			where += ", key " + key
		}
		cause := goNames.ReplaceAllString(strings.TrimPrefix(decode.Error(), "toml: "), "")
		return fmt.Errorf("%s: %s", where, cause)
	}
	return err
}

func unknownKey(key []string) string {
	name := strings.Join(key, ".")
	last := key[len(key)-1]
	if len(key) > 1 {
		for _, k := range Keys() {
			if k == last {
				return fmt.Sprintf("unknown key %q; %q is a key of its own: move it above the first [table]", name, last)
			}
		}
	}
	return fmt.Sprintf("unknown key %q; the nearest known key is %q", name, nearest(name))
}

// nearest returns the known key with the fewest letters to change, comparing
// whole names and last parts; letters left off at the end count little. There is
// always one.
func nearest(name string) string {
	best, bestDistance := "", 1<<30
	for _, known := range append(Keys(), tables()...) {
		d := 2 * distance(name, known)
		if tail := 2*distance(tailOf(name), tailOf(known)) + 1; tail < d {
			d = tail
		}
		if len(name) >= 3 && strings.HasPrefix(known, name) {
			d = min(d, len(known)-len(name))
		}
		if d < bestDistance {
			best, bestDistance = known, d
		}
	}
	return best
}

func tailOf(name string) string { return name[strings.LastIndexByte(name, '.')+1:] }

// Keys returns the dotted name of every key, in the order of the struct.
func Keys() []string {
	keys, _ := walk(reflect.TypeFor[Config](), "")
	return keys
}

func tables() []string {
	_, tables := walk(reflect.TypeFor[Config](), "")
	return tables
}

func walk(t reflect.Type, prefix string) (keys, tables []string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name := prefix + f.Tag.Get("toml")
		switch f.Type.Kind() {
		case reflect.Struct:
			k, sub := walk(f.Type, name+".")
			keys, tables = append(keys, k...), append(append(tables, name), sub...)
		case reflect.Map:
			k, _ := walk(f.Type.Elem(), name+".NAME.")
			keys, tables = append(keys, k...), append(tables, name)
		default:
			keys = append(keys, name)
		}
	}
	return keys, tables
}

// distance is the number of letters to insert, delete or replace to turn a
// into b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
