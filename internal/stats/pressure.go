package stats

import (
	"bytes"
	"strconv"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pressure parses a pressure file, of two lines such as
//
//	some avg10=0.00 avg60=0.12 avg300=0.05 total=116533
//
// with percentages and microseconds. It returns nil if there is nothing.
func pressure(data []byte) *runtimeapi.PsiStats {
	var st *runtimeapi.PsiStats
	for line := range bytes.Lines(data) {
		kind, rest, _ := bytes.Cut(line, []byte{' '})
		d, ok := pressureData(rest)
		if !ok {
			continue
		}
		if st == nil {
			st = &runtimeapi.PsiStats{}
		}
		switch string(kind) {
		case "some":
			st.Some = d
		case "full":
			st.Full = d
		}
	}
	return st
}

func pressureData(fields []byte) (*runtimeapi.PsiData, bool) {
	d := &runtimeapi.PsiData{}
	seen := 0
	for field := range bytes.FieldsSeq(fields) {
		key, value, _ := bytes.Cut(field, []byte{'='})
		if string(key) == "total" {
			v, ok := parseUint(value)
			if !ok {
				return nil, false
			}
			d.Total = v * 1000
			seen++
			continue
		}
		v, err := strconv.ParseFloat(string(value), 64)
		if err != nil {
			return nil, false
		}
		switch string(key) {
		case "avg10":
			d.Avg10 = v
		case "avg60":
			d.Avg60 = v
		case "avg300":
			d.Avg300 = v
		default:
			continue
		}
		seen++
	}
	return d, seen == 4
}
