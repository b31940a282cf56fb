package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// debs are Debian packages, unpacked from files fetched once with apt-get.
type debs struct {
	dir string
}

// fetch downloads the packages that dir does not have yet. It refreshes the
// package lists only when apt does not know a package.
func (d debs) fetch(ctx context.Context, packages ...string) error {
	missing := slices.DeleteFunc(slices.Clone(packages), func(p string) bool {
		_, err := d.file(p)
		return err == nil
	})
	if len(missing) == 0 {
		return nil
	}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return err
	}
	download := append([]string{"-q", "-o", "APT::Sandbox::User=root", "download"}, missing...)
	if _, err := d.apt(ctx, download...); err == nil {
		return nil
	}
	if out, err := d.apt(ctx, "-q", "update"); err != nil {
		return fmt.Errorf("apt-get update: %w\n%s", err, out)
	}
	if out, err := d.apt(ctx, download...); err != nil {
		return fmt.Errorf("apt-get download %s: %w\n%s", strings.Join(missing, " "), err, out)
	}
	return nil
}

func (d debs) apt(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Dir = d.dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	return cmd.CombinedOutput()
}

// file is the newest fetched file of a package.
func (d debs) file(pkg string) (string, error) {
	files, err := filepath.Glob(filepath.Join(d.dir, pkg+"_*.deb"))
	if err != nil {
		return "", err
	}
	if len(files) == 0 {
		return "", fmt.Errorf("package %s: not fetched", pkg)
	}
	slices.Sort(files)
	return files[len(files)-1], nil
}

// Fetch downloads Debian packages to cache, unless they are there.
func Fetch(ctx context.Context, cache string, packages ...string) error {
	return debs{dir: filepath.Join(cache, "debs")}.fetch(ctx, packages...)
}

// Unpack unpacks a package that was fetched, with all its files.
func Unpack(ctx context.Context, cache, pkg, dir string) error {
	file, err := debs{dir: filepath.Join(cache, "debs")}.file(pkg)
	if err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", file, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", filepath.Base(file), err, out)
	}
	return nil
}

// useless is what no test needs of a package.
var useless = []string{
	"usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/lintian/", "usr/share/bug/",
	"usr/share/apport/", "usr/share/vim/", "lib/systemd/", "etc/init.d/", "etc/logrotate.d/", "etc/ufw/",
	"/gconv/", "/audit/", "/engines-3/",
}

// addTo puts the files of a package into a tree.
func (d debs) addTo(ctx context.Context, t *tree, pkg string) error {
	file, err := d.file(pkg)
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("unpack %s: %w: %s", filepath.Base(file), err, stderr.String())
	}
	r := tar.NewReader(bytes.NewReader(out))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", filepath.Base(file), err)
		}
		path := strings.TrimPrefix(h.Name, "./")
		if path == "" || slices.ContainsFunc(useless, func(part string) bool { return strings.Contains(path, part) }) {
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		h.Linkname = trimHardLink(h)
		t.add(*h, data)
	}
}

func trimHardLink(h *tar.Header) string {
	if h.Typeflag == tar.TypeLink {
		return strings.TrimPrefix(h.Linkname, "./")
	}
	return h.Linkname
}
