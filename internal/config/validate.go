package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// maxSocketPath is the longest path a unix socket can be bound to.
const maxSocketPath = 107

// handlerName is what a RuntimeClass can name: a DNS label.
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Validate reports everything that is wrong with c, one line for each key.
func (c Config) Validate() error {
	v := &problems{}
	v.dir("root", c.Root)
	v.dir("state", c.State)
	if within(c.Root, c.State) || within(c.State, c.Root) {
		v.add("state", c.State, "root and state must be separate directories; root is "+strconv.Quote(c.Root))
	}
	v.listen(c.Listen)
	v.dir("registry.config_dir", c.Registry.ConfigDir)
	for _, p := range c.Images.Pinned {
		if strings.TrimSpace(p) != p || p == "" {
			v.add("images.pinned", p, "an entry is an image reference or a pattern with *")
		}
	}
	choice(v, "network.mode", c.Network.Mode, NetworkAuto, NetworkCNI, NetworkBuiltin)
	if _, err := c.Network.Subnets(); err != nil {
		v.add("network.subnet", c.Network.Subnet, err.Error())
	}
	v.dir("network.cni_conf_dir", c.Network.CNIConfDir)
	for _, dir := range c.Network.CNIBinDirs {
		v.dir("network.cni_bin_dirs", dir)
	}
	if len(c.Network.CNIBinDirs) == 0 && c.Network.Mode == NetworkCNI {
		v.add("network.cni_bin_dirs", "", `mode "cni" needs a directory to find plugins in`)
	}
	choice(v, "cgroup.driver", c.Cgroup.Driver, CgroupAuto, CgroupFS, CgroupSystemd)
	choice(v, "security.selinux", c.Security.SELinux, SELinuxAuto, SELinuxOff)
	choice(v, "keeper.isolation", c.Keeper.Isolation, IsolationNode, IsolationPod)
	v.address("streaming.address", c.Streaming.Address)
	v.pair("streaming.tls_cert", c.Streaming.TLSCert, "streaming.tls_key", c.Streaming.TLSKey)
	v.nri(c.NRI)
	v.metrics(c.Metrics.Address)
	v.tracing(c.Tracing)
	if p := c.Checkpoint.CRIU; p != "" && (!filepath.IsAbs(p) || filepath.Base(p) != "criu") {
		v.add("checkpoint.criu", p, `must be the absolute path of a program called criu, like "/usr/sbin/criu"`)
	}
	v.handlers(c.Handlers, c.DefaultHandler)
	return v.err()
}

// problems collects what is wrong; its methods check one kind of value each.
type problems struct{ list []error }

func (v *problems) add(key, value, remedy string) {
	v.list = append(v.list, fmt.Errorf("%s = %q: %s", key, value, remedy))
}

func (v *problems) err() error { return errors.Join(v.list...) }

func (v *problems) dir(key, path string) {
	switch {
	case !filepath.IsAbs(path):
		v.add(key, path, "must be an absolute path")
	case filepath.Clean(path) == "/":
		v.add(key, path, "must be a directory of its own, not the root directory")
	case strings.ContainsAny(path, ":,\\\n\x00"):
		// They end up in mount options, where these are separators.
		v.add(key, path, `must not contain ":", ",", "\" or a line break`)
	}
}

func (v *problems) listen(value string) {
	path, ok := strings.CutPrefix(value, "unix://")
	switch {
	case !ok && filepath.IsAbs(value):
		v.add("listen", value, `must be a unix socket's URL; did you mean "unix://`+value+`"?`)
	case !ok || !filepath.IsAbs(path) || filepath.Clean(path) != path:
		v.add("listen", value, `must be a unix socket's URL with an absolute path, like "unix:///run/sampan/sampan.sock"`)
	case len(path) > maxSocketPath:
		v.add("listen", value, fmt.Sprintf("the kernel allows %d bytes for a socket's path, this has %d", maxSocketPath, len(path)))
	}
}

func (v *problems) address(key, value string) {
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		v.add(key, value, `must be an IP address and a port, like "127.0.0.1:0"`)
		return
	}
	if _, err := netip.ParseAddr(host); err != nil {
		v.add(key, value, fmt.Sprintf("%q is not an IP address; use 127.0.0.1 to serve this host only", host))
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		v.add(key, value, fmt.Sprintf("%q is not a port from 0 to 65535", port))
	}
}

// pair checks two files of which both or none must be given.
func (v *problems) pair(keyA, a, keyB, b string) {
	for _, f := range []struct{ key, path, otherKey, other string }{{keyA, a, keyB, b}, {keyB, b, keyA, a}} {
		switch {
		case f.path == "" && f.other != "":
			v.add(f.key, f.path, "must be set too, since "+f.otherKey+" is")
		case f.path != "" && !filepath.IsAbs(f.path):
			v.add(f.key, f.path, "must be an absolute path")
		}
	}
}

func (v *problems) handlers(handlers map[string]Handler, byDefault string) {
	for _, name := range slices.Sorted(maps.Keys(handlers)) {
		key := "handlers." + name
		switch {
		case name == BuiltinHandler:
			v.add(key, handlers[name].Path, "this handler is built in; choose another name")
			continue
		case !handlerName.MatchString(name):
			v.add(key, handlers[name].Path, "a handler's name has lower-case letters, digits and dashes, as in a RuntimeClass")
			continue
		}
		if p := handlers[name].Path; !filepath.IsAbs(p) {
			v.add(key+".path", p, `must be the absolute path of an OCI runtime, like "/usr/sbin/runc"`)
		}
	}
	if _, ok := handlers[byDefault]; !ok && byDefault != BuiltinHandler {
		known := append(slices.Sorted(maps.Keys(handlers)), BuiltinHandler)
		v.add("default_handler", byDefault, fmt.Sprintf("there is no [handlers.%s]; known handlers: %s", byDefault, strings.Join(known, ", ")))
	}
}

func choice[T ~string](v *problems, key string, value T, allowed ...T) {
	if slices.Contains(allowed, value) {
		return
	}
	quoted := make([]string, len(allowed))
	for i, a := range allowed {
		quoted[i] = strconv.Quote(string(a))
	}
	v.add(key, string(value), "must be one of "+strings.Join(quoted, ", "))
}

// within reports whether path is dir or lies in it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

func (v *problems) nri(n NRI) {
	if !n.Enable {
		return
	}
	if p := n.SocketPath; !filepath.IsAbs(p) || filepath.Clean(p) != p || len(p) > maxSocketPath {
		v.add("nri.socket_path", p, fmt.Sprintf("must be an absolute path of at most %d bytes", maxSocketPath))
	}
	v.dir("nri.plugin_path", n.PluginPath)
	v.dir("nri.plugin_config_path", n.PluginConfPath)
	if n.RequestTimeout < 1 || n.RequestTimeout > 600 {
		v.add("nri.request_timeout", strconv.Itoa(n.RequestTimeout), "must be 1 to 600 seconds")
	}
}

func (v *problems) metrics(address string) {
	if address == "" {
		return
	}
	host, port, err := net.SplitHostPort(address)
	switch {
	case err != nil || port == "":
		v.add("metrics.address", address, `must be host:port, like "127.0.0.1:9111", or "" for none`)
	case host == "":
		v.add("metrics.address", address, `must name the host: "127.0.0.1:`+port+`", or "0.0.0.0:`+port+`" if every network may ask`)
	default:
		v.address("metrics.address", address)
	}
}

func (v *problems) tracing(t Tracing) {
	if t.Endpoint == "" {
		return
	}
	u, err := url.Parse(t.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Path != "" && u.Path != "/" {
		v.add("tracing.endpoint", t.Endpoint, `must be http://host:port, or https://host:port for TLS`)
	}
	if t.Sampling < 0 || t.Sampling > 1 {
		v.add("tracing.sampling", strconv.FormatFloat(t.Sampling, 'g', -1, 64), "must be 0 to 1")
	}
}
