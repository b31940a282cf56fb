package spec

import "slices"

// Features is what the OCI runtime that gets a spec can do, as far as specs
// differ in it. What the kernel can do is in host.Facts; both must agree.
type Features struct {
	// RecursiveReadOnly: the mount option "rro".
	RecursiveReadOnly bool
	// UserNamespaces: a container in a user namespace.
	UserNamespaces bool
	// IDMappedMounts: a mount with mappings of its own.
	IDMappedMounts bool
	// Seccomp, AppArmor and SELinux: process and mounts are confined as the spec
	// says.
	Seccomp, AppArmor, SELinux bool
	// MountOptions are the options of mounts that the runtime knows, beside those
	// that every runtime does.
	MountOptions []string
}

// UserNamespacedPods reports whether pods can have user namespaces as Kubernetes means
// it: with volumes.
func (f Features) UserNamespacedPods() bool { return f.UserNamespaces && f.IDMappedMounts }

func (f Features) knowsMountOption(o string) bool {
	return slices.Contains(oldBindOptions, o) || slices.Contains(f.MountOptions, o)
}

// Minimal are the features of a runtime of which nothing is known: what the
// oldest OCI specification that specs are written to asks of every runtime.
func Minimal() Features {
	return Features{Seccomp: true, AppArmor: true, SELinux: true}
}

// oldBindOptions are those of bindOptions that have been there from the
// beginning.
var oldBindOptions = []string{
	"exec", "noexec", "dev", "nodev", "suid", "nosuid",
	"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
}

// BuiltinFeatures are those of the built-in handler; what it can do is then up to
// the kernel alone.
func BuiltinFeatures() Features {
	return Features{
		RecursiveReadOnly: true, UserNamespaces: true, IDMappedMounts: true, Seccomp: true, AppArmor: true, SELinux: true,
		MountOptions: slices.Clone(bindOptions),
	}
}
