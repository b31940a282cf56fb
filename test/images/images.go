// Package images makes the images that the tests run, offline but for Debian's
// packages: critest's own, real web servers, and one image in every form that a
// registry can hold. It serves them on loopback under the names that clients ask
// for. It knows nothing of the daemon under test.
package images

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// recipe changes when the images made from the same packages change.
const recipe = "1"

var packages = []string{
	"busybox", "libc6", // the base of all
	"nginx", "nginx-common", "libpcre2-8-0", "libssl3", "zlib1g", "libcrypt1",
	"apache2-bin", "libapr1", "libaprutil1", "libexpat1", "libuuid1",
}

// Build makes the images below cache, unless they are there, and returns their
// directory, for Handler. It needs apt-get, dpkg-deb and go.
func Build(ctx context.Context, cache string) (string, error) {
	d := debs{dir: filepath.Join(cache, "debs")}
	if err := d.fetch(ctx, packages...); err != nil {
		return "", err
	}
	testbox, err := buildTestbox(ctx, cache)
	if err != nil {
		return "", err
	}
	key, err := d.key(testbox)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "images", key)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	s := &store{dir: tmp}
	if err := s.fill(ctx, d, testbox); err != nil {
		return "", err
	}
	if err := s.save(); err != nil {
		return "", err
	}
	return dir, os.Rename(tmp, dir)
}

// Digest is the digest of what a repository:tag names in the images of dir.
func Digest(dir, name string) (digest.Digest, error) {
	s := store{dir: dir}
	if err := s.load(); err != nil {
		return "", err
	}
	for _, m := range s.manifests {
		if slices.Contains(m.Names, name) {
			return digest.FromBytes(m.Body), nil
		}
	}
	return "", fmt.Errorf("image %s: not among the test images", name)
}

// key tells the images of one set of packages, programs and recipe from another.
func (d debs) key(testbox []byte) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, recipe)
	for _, p := range packages {
		file, err := d.file(p)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, filepath.Base(file))
	}
	h.Write(testbox)
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

func buildTestbox(ctx context.Context, cache string) ([]byte, error) {
	out := filepath.Join(cache, "testbox")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", out, "sampan.dev/sampan/test/images/testbox")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build testbox: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}

// fill makes every image. critest's names and what is in them follow cri-tools'
// images/ directory and pkg/validate.
func (s *store) fill(ctx context.Context, d debs, testbox []byte) error {
	base, err := baseLayer(ctx, d, testbox)
	if err != nil {
		return err
	}
	busybox := image{
		layers: [][]byte{base},
		config: ocispec.ImageConfig{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
	}
	docker := form{docker: true, layers: "gzip", index: "flat"}
	oci := form{layers: "gzip", index: "flat"}

	puts := []func() error{
		func() error { return s.put(busybox, docker, "e2e-test-images/busybox:1.29-2") },
		func() error { return s.put(busybox, oci, "library/busybox:latest", "library/busybox:1.35") },
		func() error { return s.webServers(ctx, d, busybox) },
		func() error { return s.critest(busybox) },
		func() error { return s.small(testbox) },
		func() error { return s.variants(busybox) },
	}
	for _, put := range puts {
		if err := put(); err != nil {
			return err
		}
	}
	return nil
}

// baseLayer has Debian's busybox with a link for each applet, the two programs
// that it lacks and critest wants, and a few users. It is the packages' dynamic
// busybox: the static one runs applets without looking at the file system, so
// that a masked /bin/ls would still list.
func baseLayer(ctx context.Context, d debs, testbox []byte) ([]byte, error) {
	t := newTree()
	for _, p := range []string{"libc6", "busybox"} {
		if err := d.addTo(ctx, t, p); err != nil {
			return nil, err
		}
	}
	box, ok := t.entries["bin/busybox"]
	if !ok {
		return nil, fmt.Errorf("package busybox: has no bin/busybox")
	}
	applets, err := listApplets(ctx, box.data)
	if err != nil {
		return nil, err
	}
	for _, applet := range applets {
		if applet != "busybox" {
			t.link("bin/"+applet, "bin/busybox")
		}
	}
	t.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/testbox", Mode: 0o755}, testbox)
	for _, verb := range []string{"pgrep", "ipcs", "lines"} {
		t.link("bin/"+verb, "bin/testbox")
	}
	t.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n"+
		"www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
	t.file("etc/group", 0o644, "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnogroup:x:65534:\n")
	t.file("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n")
	for _, dir := range []string{"dev", "home", "proc", "sys", "mnt", "run", "usr/bin", "usr/sbin", "var/log", "var/run", "var/www"} {
		t.dir(dir, 0o755)
	}
	t.dir("root", 0o700)
	t.dir("tmp", 0o1777)
	return t.tar()
}

// listApplets asks the busybox binary itself.
func listApplets(ctx context.Context, binary []byte) ([]string, error) {
	f, err := os.CreateTemp("", "busybox-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(binary); err != nil {
		f.Close()
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	if err := os.Chmod(f.Name(), 0o755); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, f.Name(), "--list")
	cmd.Args[0] = "busybox"
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	return strings.Fields(string(out)), nil
}

const nginxConf = `user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /var/log/nginx/error.log notice;
events { worker_connections 256; }
http {
    include /etc/nginx/mime.types;
    access_log /var/log/nginx/access.log;
    include /etc/nginx/conf.d/*.conf;
}
`

const apacheConf = `ServerRoot /usr/lib/apache2
ServerName localhost
PidFile /var/run/httpd.pid
Mutex file:/var/run
LoadModule mpm_event_module modules/mod_mpm_event.so
LoadModule authz_core_module modules/mod_authz_core.so
LoadModule dir_module modules/mod_dir.so
Listen 80
User www-data
Group www-data
StartServers 1
DocumentRoot /var/www/html
<Directory /var/www/html>
    Require all granted
</Directory>
DirectoryIndex index.html
ErrorLog /proc/self/fd/2
LogLevel notice
`

// webServers are Debian's nginx and Apache, in the foreground as in Docker's
// images of them: nginx's logs are links to its own stdout and stderr.
func (s *store) webServers(ctx context.Context, d debs, busybox image) error {
	layer := func(packages []string, more func(*tree)) ([]byte, error) {
		t := newTree()
		for _, p := range packages {
			if err := d.addTo(ctx, t, p); err != nil {
				return nil, err
			}
		}
		if more != nil {
			more(t)
		}
		return t.tar()
	}
	libs, err := layer([]string{"libpcre2-8-0", "libssl3", "zlib1g", "libcrypt1"}, nil)
	if err != nil {
		return err
	}
	server, err := layer([]string{"nginx-common", "nginx"}, func(t *tree) {
		t.file("etc/nginx/nginx.conf", 0o644, nginxConf)
		t.symlink("var/log/nginx/access.log", "/dev/stdout")
		t.symlink("var/log/nginx/error.log", "/dev/stderr")
	})
	if err != nil {
		return err
	}
	site := func(port string) ([]byte, error) {
		t := newTree()
		t.file("etc/nginx/conf.d/default.conf", 0o644,
			"server {\n    listen "+port+";\n    location / { root /usr/share/nginx/html; index index.html; }\n}\n")
		return t.tar()
	}
	nginx := func(port string) (image, error) {
		conf, err := site(port)
		img := image{layers: append(slices.Clone(busybox.layers), libs, server, conf), config: busybox.config}
		img.config.Cmd = []string{"nginx", "-g", "daemon off;"}
		img.config.ExposedPorts = map[string]struct{}{port + "/tcp": {}}
		img.config.StopSignal = "SIGQUIT"
		return img, err
	}
	web, err := nginx("80")
	if err != nil {
		return err
	}
	hostNet, err := nginx("12003")
	if err != nil {
		return err
	}
	apache, err := layer([]string{"libpcre2-8-0", "libcrypt1", "libuuid1", "libexpat1", "libapr1", "libaprutil1", "apache2-bin"}, func(t *tree) {
		t.file("etc/apache2/httpd.conf", 0o644, apacheConf)
		t.file("var/www/html/index.html", 0o644, "<html><body><h1>It works!</h1></body></html>\n")
		t.symlink("usr/sbin/httpd", "apache2")
		keepModules(t, "mpm_event", "authz_core", "dir")
	})
	if err != nil {
		return err
	}
	httpd := image{layers: append(slices.Clone(busybox.layers), apache), config: busybox.config}
	httpd.config.Cmd = []string{"httpd", "-D", "FOREGROUND", "-f", "/etc/apache2/httpd.conf"}
	httpd.config.ExposedPorts = map[string]struct{}{"80/tcp": {}}
	httpd.config.StopSignal = "SIGWINCH"

	docker := form{docker: true, layers: "gzip", index: "flat"}
	if err := s.put(web, docker, "e2e-test-images/nginx:1.14-2"); err != nil {
		return err
	}
	if err := s.put(web, form{layers: "gzip", index: "flat"}, "library/nginx:latest", "library/nginx:1.22"); err != nil {
		return err
	}
	if err := s.put(hostNet, form{docker: true, layers: "gzip"}, "k8s-staging-cri-tools/hostnet-nginx-amd64:latest"); err != nil {
		return err
	}
	return s.put(httpd, docker, "e2e-test-images/httpd:2.4.39-4")
}

// keepModules drops all of Apache's modules but these: the others need more
// libraries.
func keepModules(t *tree, modules ...string) {
	const dir = "usr/lib/apache2/modules/"
	for path := range t.entries {
		module, ok := strings.CutPrefix(path, dir+"mod_")
		if ok && !slices.Contains(modules, strings.TrimSuffix(module, ".so")) {
			delete(t.entries, path)
		}
	}
}

// critest's images are busybox with one file or one setting more.
func (s *store) critest(busybox image) error {
	const repo = "k8s-staging-cri-tools/"
	docker := form{docker: true, layers: "gzip", index: "flat"}
	with := func(file string) (image, error) {
		t := newTree()
		t.file(file, 0o644, "")
		layer, err := t.tar()
		return image{layers: append(slices.Clone(busybox.layers), layer), config: busybox.config}, err
	}
	for file, names := range map[string][]string{
		"test-image-1":      {"test-image-1:latest"},
		"test-image-2":      {"test-image-2:latest"},
		"test-image-3":      {"test-image-3:latest"},
		"test-image-latest": {"test-image-latest:latest"},
		"test-image-digest": {"test-image-digest:latest"},
		"same-image":        {"test-image-tags:1", "test-image-tags:2", "test-image-tags:3"},
		"test":              {"test-image-tag:test"},
		"all":               {"test-image-tag:all"},
	} {
		img, err := with(file)
		if err != nil {
			return err
		}
		for i := range names {
			names[i] = repo + names[i]
		}
		if err := s.put(img, docker, names...); err != nil {
			return err
		}
	}
	for name, user := range map[string]string{
		"test-image-user-uid":            "1002",
		"test-image-user-username":       "www-data",
		"test-image-user-uid-group":      "1003:1004",
		"test-image-user-username-group": "www-data:1004",
	} {
		img := busybox
		img.config.User = user
		if err := s.put(img, docker, repo+name+":latest"); err != nil {
			return err
		}
	}
	t := newTree()
	t.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n")
	t.file("etc/group", 0o644, "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
	t.add(tar.Header{Typeflag: tar.TypeDir, Name: "home/default-user", Mode: 0o755, Uid: 1000, Gid: 1000}, nil)
	layer, err := t.tar()
	if err != nil {
		return err
	}
	img := image{layers: append(slices.Clone(busybox.layers), layer), config: busybox.config}
	img.config.User = "1000"
	return s.put(img, docker, repo+"test-image-predefined-group:latest")
}

// small are images of one static program.
func (s *store) small(testbox []byte) error {
	program := func(name string, mode int64) (image, error) {
		t := newTree()
		t.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, testbox)
		t.dir("tmp", 0o1777)
		layer, err := t.tar()
		return image{layers: [][]byte{layer}, config: ocispec.ImageConfig{Entrypoint: []string{"/" + name}, Env: []string{"PATH=/"}}}, err
	}
	pause, err := program("pause", 0o755)
	if err != nil {
		return err
	}
	pause.config.User = "65535:65535"
	nonewprivs, err := program("nonewprivs", 0o4755)
	if err != nil {
		return err
	}
	lines, err := program("lines", 0o755)
	if err != nil {
		return err
	}
	docker := form{docker: true, layers: "gzip", index: "flat"}
	if err := s.put(pause, docker, "pause:3.9"); err != nil {
		return err
	}
	if err := s.put(nonewprivs, docker, "e2e-test-images/nonewprivs:1.3"); err != nil {
		return err
	}
	return s.put(lines, form{layers: "gzip"}, "sampan/lines:latest")
}

// variants are one image in every form a registry can hold it.
func (s *store) variants(busybox image) error {
	for tag, f := range map[string]form{
		"docker":      {docker: true, layers: "gzip"},
		"docker-list": {docker: true, layers: "gzip", index: "flat"},
		"oci-gzip":    {layers: "gzip"},
		"oci-zstd":    {layers: "zstd"},
		"oci-plain":   {},
		"oci-index":   {layers: "gzip", index: "flat"},
		"oci-nested":  {layers: "zstd", index: "nested"},
	} {
		img := busybox
		img.config.Labels = map[string]string{"dev.sampan.form": tag}
		if err := s.put(img, f, "sampan/variants:"+tag); err != nil {
			return err
		}
	}
	return nil
}
