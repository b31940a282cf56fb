package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// listing is how a list is printed: as a table, as bare ids, or as JSON.
type listing struct {
	format string
	quiet  bool
}

func (l *listing) addTo(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&l.format, "output", "o", "table", "table or json")
	cmd.Flags().BoolVarP(&l.quiet, "quiet", "q", false, "print ids only")
}

// print writes rows, whose last column is the full id, under the given header;
// or the message they were made of.
func (l *listing) print(w io.Writer, message proto.Message, header string, rows [][]string) error {
	switch {
	case l.format == "json":
		text, err := protojson.MarshalOptions{Multiline: true, EmitUnpopulated: true}.Marshal(message)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", text)
		return err
	case l.format != "table":
		return fmt.Errorf("output %q: must be table or json", l.format)
	case l.quiet:
		for _, row := range rows {
			if _, err := fmt.Fprintln(w, row[len(row)-1]); err != nil {
				return err
			}
		}
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	fmt.Fprintln(t, strings.ReplaceAll(header, " ", "\t"))
	for _, row := range rows {
		last := len(row) - 1
		fmt.Fprintln(t, strings.Join(append(row[:last:last], short(row[last])), "\t"))
	}
	return t.Flush()
}

// short is as much of an id as people can read; it is good enough to be given
// to every verb.
func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(len(id), 12)]
}

// age is a time in the past in words.
func age(now time.Time, nanoseconds int64) string {
	switch d := now.Sub(time.Unix(0, nanoseconds)); {
	case nanoseconds == 0:
		return "-"
	case d < 0:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// size is a number of bytes in words.
func size(bytes uint64) string {
	const units = "KMGTPE"
	if bytes < 1000 {
		return fmt.Sprintf("%dB", bytes)
	}
	value, unit := float64(bytes)/1000, 0
	for value >= 999.95 && unit < len(units)-1 {
		value /= 1000
		unit++
	}
	return fmt.Sprintf("%.1f%cB", value, units[unit])
}
