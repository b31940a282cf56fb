package apparmor

import "strings"

// DefaultProfile is the name of the profile of containers that ask for none, or
// for the runtime's default.
const DefaultProfile = "sampan-default"

// rules let a container do what its user, its capabilities and its namespaces
// allow, except for what would reach the kernel or other containers through a
// file system, a signal or a debugger. They include no file, so that they mean the
// same on every host.
const rules = `profile sampan-default flags=(attach_disconnected,mediate_deleted) {
  capability,
  network,
  unix,
  file,

  # Who could mount could mount a proc without the rules below.
  deny mount,
  umount,

  # Signals and debuggers stay among the containers of this profile. The host, and
  # runtimes that some hosts give a name, may end them and look at them.
  signal (send, receive) peer=sampan-default,
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (receive) set=(exists),
  ptrace (trace, read) peer=sampan-default,
  ptrace (tracedby, readby),

  # In /proc, what belongs to a process can be written, and the sysctls of System V
  # shared memory. A denial is stronger than any allowance, hence these patterns.
  deny /proc/* w,
  deny /proc/[^1-9s]*/** w,
  deny /proc/s[^y]*/** w,
  deny /proc/sy[^s]*/** w,
  deny /proc/sys[^/]*/** w,
  deny /proc/sys/[^k]** w,
  deny /proc/sys/k[^e]** w,
  deny /proc/sys/ke[^r]** w,
  deny /proc/sys/kernel/[^s]** w,
  deny /proc/sys/kernel/s[^h]** w,
  deny /proc/sys/kernel/sh[^m]** w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,

  # In /sys, cgroups can be written.
  deny /sys/[^f]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/fs/c[^g]** wklx,
  deny /sys/fs/cg[^r]** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
`

// profile is the text of the default profile. abi, if not empty, is the file with
// the features of the kernel that the rules were written for: without it, a newer
// parser would forbid what they do not mention. label is what this process is
// confined by, which may signal containers; empty for nothing.
func profile(abi, label string) string {
	var b strings.Builder
	if abi != "" {
		b.WriteString("abi <" + abi + ">,\n")
	}
	b.WriteString(rules)
	if label != "" {
		b.WriteString("\n  signal (receive) peer=\"" + label + "\",\n")
	}
	b.WriteString("}\n")
	return b.String()
}
