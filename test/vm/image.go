package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// suites are what the guest's packages come from, of this machine's mirror.
var suites = []string{"bookworm", "bookworm-updates", "bookworm-backports"}

// packages are what the guest has beside Debian's essential ones. None of them
// is needed by Sampan but what the kernel calls: they make a host of it, or are
// called by tests.
var packages = []string{
	"systemd", "systemd-sysv", "dbus", "udev", "kmod", "login", "mount", // a host
	"apparmor", "nftables", "iproute2", "procps", "util-linux", "ca-certificates", "curl", "sudo", // for tests
	"runc", "crun", "containernetworking-plugins", "libseccomp2",
}

// useless is what makes the image larger for nothing.
var useless = []string{"/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"}

// rootSize is the guest's root file system; blocks that were never written take
// no room.
const rootSize = "3G"

//go:embed kernels.sh
var kernelsHook string

var (
	//go:embed selinux.sh
	selinuxHook string
	//go:embed container.cil
	containerPolicy string
)

// Recipe is what an image has beside what all have.
type Recipe struct {
	packages []string
	hook     string // a hook of mmdebstrap; its arguments are the tree and a file of data
	data     string
}

var (
	// Plain is a Debian with AppArmor.
	Plain Recipe
	// SELinux is a Debian with SELinux instead, when it is booted with SELinuxWords:
	// Debian's policy, with what that lacks for containers.
	SELinux = Recipe{
		packages: []string{"selinux-policy-default", "policycoreutils", "selinux-utils"},
		hook:     selinuxHook, data: containerPolicy,
	}
	// SELinuxWords are for the kernel's command line. /etc/selinux/config says
	// whether the policy is enforced.
	SELinuxWords = []string{"security=selinux", "selinux=1"}
)

// Image is a Debian that can be booted: one root file system, several kernels.
type Image struct {
	dir string
}

// Build makes the image below cache unless it is there. It is made once for each
// recipe: a change of this file's lists makes a new one. Building takes root, mmdebstrap,
// mke2fs, a Debian mirror and about a minute.
func Build(ctx context.Context, cache string, r Recipe) (Image, error) {
	top, err := filepath.Abs(filepath.Join(cache, "vm"))
	if err != nil {
		return Image{}, err
	}
	if err := os.MkdirAll(top, 0o755); err != nil {
		return Image{}, err
	}
	unlock, err := lock(filepath.Join(top, "lock"))
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	image := Image{dir: filepath.Join(top, r.digest())}
	if _, err := os.Stat(image.dir); err == nil {
		return image, nil
	}
	tmp, err := os.MkdirTemp(top, "tmp-")
	if err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(tmp)
	if err := r.build(ctx, tmp); err != nil {
		return Image{}, fmt.Errorf("build the guest's image: %w", err)
	}
	return image, os.Rename(filepath.Join(tmp, "image"), image.dir)
}

// digest is one of all that decides what the image will be, but the state of the
// mirror.
func (r Recipe) digest() string {
	text := strings.Join([]string{strings.Join(suites, " "), strings.Join(packages, " "), strings.Join(useless, " "), rootSize, kernelsHook, strings.Join(bootModules, " ")}, "\n")
	if r.hook != "" {
		text += "\n" + strings.Join(r.packages, " ") + "\n" + r.hook + "\n" + r.data
	}
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

func lock(path string) (unlock func() error, err error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

// build makes the directory image in tmp.
func (r Recipe) build(ctx context.Context, tmp string) error {
	file := func(name string) string { return filepath.Join(tmp, name) }
	list, kernels, hook, data := file("sources.list"), file("kernels.sh"), file("recipe.sh"), file("recipe.data")
	sources, err := sourcesList(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(list, []byte(sources), 0o644), os.WriteFile(kernels, []byte(kernelsHook), 0o644), os.WriteFile(hook, []byte(r.hook), 0o644), os.WriteFile(data, []byte(r.data), 0o644)); err != nil {
		return err
	}
	tree, image := filepath.Join(tmp, "tree"), filepath.Join(tmp, "image")
	// Now and then base-passwd is configured without making these files.
	const users = `for f in passwd group; do [ -s "$1/etc/$f" ] || cp "$1/usr/share/base-passwd/$f.master" "$1/etc/$f"; done`
	args := []string{"--mode=root", "--essential-hook=" + users,
		"--variant=essential", "--include=" + strings.Join(slices.Concat(packages, r.packages), ","),
		"--customize-hook=sh " + kernels + ` "$1"`, "--customize-hook=sh " + hook + ` "$1" ` + data,
	}
	for _, pattern := range useless {
		args = append(args, "--dpkgopt=path-exclude="+pattern)
	}
	if err := run(ctx, "mmdebstrap", append(args, "bookworm", tree, list)...); err != nil {
		return err
	}
	if err := os.Mkdir(image, 0o755); err != nil {
		return err
	}
	if err := takeKernels(ctx, tree, image); err != nil {
		return err
	}
	return makeDisk(ctx, filepath.Join(image, "root.ext4"), rootSize, tree)
}

// sourcesList is apt's list for the guest.
func sourcesList(ctx context.Context) (string, error) {
	mirror, err := exec.CommandContext(ctx, "../../scripts/debian-mirror").Output()
	if err != nil {
		return "", fmt.Errorf("find a Debian mirror: %w", err)
	}
	var list strings.Builder
	for _, suite := range suites {
		fmt.Fprintf(&list, "deb %s %s main\n", strings.TrimSpace(string(mirror)), suite)
	}
	return list.String(), nil
}

// takeKernels moves each kernel out of the tree, and makes the part of its
// initial RAM disk that does not change.
func takeKernels(ctx context.Context, tree, image string) error {
	kernels, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil {
		return err
	}
	for _, kernel := range kernels {
		version := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
		dir := filepath.Join(image, version)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := os.Rename(kernel, filepath.Join(dir, "vmlinuz")); err != nil {
			return err
		}
		archive, err := moduleArchive(ctx, filepath.Join(tree, "lib", "modules", version))
		if err != nil {
			return fmt.Errorf("kernel %s: %w", version, err)
		}
		if err := os.WriteFile(filepath.Join(dir, "modules.cpio"), archive, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Kernels are the versions that the image has, the release's own first.
func (i Image) Kernels() ([]string, error) {
	dirs, err := filepath.Glob(filepath.Join(i.dir, "*", "vmlinuz"))
	var versions []string
	for _, d := range dirs {
		versions = append(versions, filepath.Base(filepath.Dir(d)))
	}
	slices.SortFunc(versions, compareVersions)
	return versions, err
}

// kernel is the directory of the kernel whose version begins with prefix.
func (i Image) kernel(prefix string) (string, error) {
	all, err := i.Kernels()
	if err != nil {
		return "", err
	}
	for _, v := range all {
		if v == prefix || strings.HasPrefix(v, prefix+".") || prefix == "" {
			return filepath.Join(i.dir, v), nil
		}
	}
	return "", fmt.Errorf("kernel %s: the image has %s: %w", prefix, strings.Join(all, ", "), fs.ErrNotExist)
}

// compareVersions orders by the first two numbers.
func compareVersions(a, b string) int {
	var majorA, minorA, majorB, minorB int
	fmt.Sscanf(a, "%d.%d", &majorA, &minorA) //nolint:errcheck // then it is 0
	fmt.Sscanf(b, "%d.%d", &majorB, &minorB) //nolint:errcheck // likewise
	return (majorA-majorB)*1000 + minorA - minorB
}

// MakeDisk makes a disk of a size as mke2fs writes it ("512M") with the content
// of the directory tree, or an empty one if that is empty.
func MakeDisk(ctx context.Context, path, size, tree string) error {
	return makeDisk(ctx, path, size, tree)
}

func makeDisk(ctx context.Context, path, size, tree string) error {
	args := []string{"-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1"}
	if tree != "" {
		args = append(args, "-d", tree)
	}
	return run(ctx, "mke2fs", append(args, path, size)...)
}

// run runs a program; what it printed is part of the error.
func run(ctx context.Context, name string, args ...string) error {
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, output.String())
	}
	return nil
}
