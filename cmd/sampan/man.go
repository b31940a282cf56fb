package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// newManCommand writes the manual for those who make packages.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write a manual page for each command to DIR",
		Args:   cobra.ExactArgs(1),
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return writeManual(cmd.Root(), args[0])
		},
	}
}

// writeManual writes the pages of a command and of all below it.
func writeManual(cmd *cobra.Command, dir string) error {
	if cmd.Hidden || cmd.Name() == "help" {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, manName(cmd)+".1"), []byte(manPage(cmd)), 0o644); err != nil {
		return err
	}
	for _, sub := range cmd.Commands() {
		if err := writeManual(sub, dir); err != nil {
			return err
		}
	}
	return nil
}

func manName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manPage is a page in the macros of man(7).
func manPage(cmd *cobra.Command) string {
	cmd.InitDefaultHelpFlag()
	var b strings.Builder
	section := func(title, format string, args ...any) {
		fmt.Fprintf(&b, ".SH %s\n"+format+"\n", append([]any{title}, args...)...)
	}
	fmt.Fprintf(&b, ".TH %s 1 \"\" \"sampan %s\"\n", strings.ToUpper(manName(cmd)), roff(cmd.Root().Version))
	section("NAME", `%s \- %s`, roff(manName(cmd)), roff(cmd.Short))
	section("SYNOPSIS", "%s", roff(cmd.UseLine()))
	if cmd.Long != "" {
		section("DESCRIPTION", "%s", paragraphs(cmd.Long))
	}
	if cmd.Example != "" {
		section("EXAMPLES", ".nf\n%s\n.fi", roff(cmd.Example))
	}
	for _, flags := range []struct{ title, usages string }{
		{"OPTIONS", cmd.NonInheritedFlags().FlagUsages()}, {"GLOBAL OPTIONS", cmd.InheritedFlags().FlagUsages()},
	} {
		if flags.usages != "" {
			section(flags.title, ".nf\n%s.fi", roff(flags.usages))
		}
	}
	var others []string
	if cmd.HasParent() {
		others = append(others, manName(cmd.Parent())+"(1)")
	}
	for _, sub := range cmd.Commands() {
		if !sub.Hidden && sub.Name() != "help" {
			others = append(others, manName(sub)+"(1)")
		}
	}
	if len(others) > 0 {
		section("SEE ALSO", "%s", roff(strings.Join(others, ", ")))
	}
	return b.String()
}

// paragraphs sets text whose paragraphs have empty lines between them.
func paragraphs(text string) string {
	return strings.ReplaceAll(roff(text), "\n\n", "\n.PP\n")
}

// roff takes the meaning from what roff would read as commands.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}
