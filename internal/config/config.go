// Package config owns the daemon's configuration: one struct, its defaults,
// and strict TOML. It looks at nothing but the text it is given: whether a
// path exists or a network can be had is for those who use it to find out.
//
// Every problem it reports names the key, the value and what would be right.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// DefaultPath is the file that is read when none is named. It need not exist.
const DefaultPath = "/etc/sampan/config.toml"

// BuiltinHandler is the handler that needs no OCI runtime on the host. It
// always exists and cannot be configured.
const BuiltinHandler = "builtin"

// Config is all that can be set. The zero value is not usable; start from
// Default.
type Config struct {
	Root           string             `toml:"root"`            // what survives a reboot
	State          string             `toml:"state"`           // what dies with the boot
	Listen         string             `toml:"listen"`          // unix:///path of the CRI socket
	DefaultHandler string             `toml:"default_handler"` // for pods that name none
	Registry       Registry           `toml:"registry"`
	Images         Images             `toml:"images"`
	Network        Network            `toml:"network"`
	Cgroup         Cgroup             `toml:"cgroup"`
	Security       Security           `toml:"security"`
	Keeper         Keeper             `toml:"keeper"`
	Streaming      Streaming          `toml:"streaming"`
	NRI            NRI                `toml:"nri"`
	Metrics        Metrics            `toml:"metrics"`
	Tracing        Tracing            `toml:"tracing"`
	Checkpoint     Checkpoint         `toml:"checkpoint"`
	Handlers       map[string]Handler `toml:"handlers"` // by name, without BuiltinHandler
}

// Registry says how image registries are reached.
type Registry struct {
	ConfigDir string `toml:"config_dir"` // hosts.toml files, in containerd's layout
}

// Images says which images are kept.
type Images struct {
	Pinned []string `toml:"pinned"` // references or globs that are never garbage collected
}

// Network says how pods get their addresses.
type Network struct {
	Mode       NetworkMode `toml:"mode"`
	Subnet     string      `toml:"subnet"` // "10.88.0.0/16" or "10.88.0.0/16,fd00:88::/64"; see Subnets
	CNIConfDir string      `toml:"cni_conf_dir"`
	CNIBinDirs []string    `toml:"cni_bin_dirs"`
}

// NetworkMode selects the pod network.
type NetworkMode string

const (
	NetworkAuto    NetworkMode = "auto"    // builtin until a CNI configuration appears
	NetworkCNI     NetworkMode = "cni"     // CNI plugins only
	NetworkBuiltin NetworkMode = "builtin" // the bridge network of ours
)

// Cgroup says who makes cgroups.
type Cgroup struct {
	Driver CgroupDriver `toml:"driver"`
}

// CgroupDriver selects how cgroups are made.
type CgroupDriver string

const (
	CgroupAuto    CgroupDriver = "auto" // systemd where systemd runs the host with cgroup v2, else cgroupfs
	CgroupFS      CgroupDriver = "cgroupfs"
	CgroupSystemd CgroupDriver = "systemd"
)

// Security says how containers are confined beyond what they ask for themselves.
type Security struct {
	SELinux SELinux `toml:"selinux"`
}

// SELinux says when containers get labels.
type SELinux string

const (
	SELinuxAuto SELinux = "auto" // where SELinux is enabled and its policy has a label for containers
	SELinuxOff  SELinux = "off"
)

// Keeper says how many keepers there are.
type Keeper struct {
	Isolation Isolation `toml:"isolation"`
}

// Isolation is the number of pods that share one keeper process.
type Isolation string

const (
	IsolationNode Isolation = "node" // one keeper for all pods
	IsolationPod  Isolation = "pod"  // one keeper per pod
)

// Streaming says where exec, attach and port-forward streams are served.
type Streaming struct {
	Address string `toml:"address"`  // host:port; port 0 takes a free one
	TLSCert string `toml:"tls_cert"` // PEM file; "" serves without TLS
	TLSKey  string `toml:"tls_key"`  // PEM file
}

// NRI says where plugins of the Node Resource Interface are.
type NRI struct {
	Enable         bool   `toml:"enable"`
	SocketPath     string `toml:"socket_path"`        // where plugins connect
	PluginPath     string `toml:"plugin_path"`        // those to run
	PluginConfPath string `toml:"plugin_config_path"` // what these get
	RequestTimeout int    `toml:"request_timeout"`    // seconds; a plugin that takes longer is dropped
}

// Metrics says where the daemon's own figures are shown.
type Metrics struct {
	Address string `toml:"address"` // host:port; "" shows none
}

// Tracing says where spans are sent.
type Tracing struct {
	Endpoint string  `toml:"endpoint"` // http://host:port or https://host:port; "" sends none
	Sampling float64 `toml:"sampling"` // share of the calls whose client has not decided
}

// Checkpoint says how containers are checkpointed and restored.
type Checkpoint struct {
	CRIU          string `toml:"criu"`           // path of the program; "" looks in PATH
	RestoreImages bool   `toml:"restore_images"` // CreateContainer restores images that are checkpoints
}

// Handler is an OCI runtime that is driven by its command line.
type Handler struct {
	Path string `toml:"path"`
}

// Default returns the configuration of a daemon that was told nothing.
func Default() Config {
	return Config{
		Root:           "/var/lib/sampan",
		State:          "/run/sampan",
		Listen:         "unix:///run/sampan/sampan.sock",
		DefaultHandler: BuiltinHandler,
		Registry:       Registry{ConfigDir: "/etc/sampan/certs.d"},
		Images:         Images{Pinned: []string{}},
		Network: Network{
			Mode:       NetworkAuto,
			Subnet:     "10.88.0.0/16",
			CNIConfDir: "/etc/cni/net.d",
			CNIBinDirs: []string{"/opt/cni/bin", "/usr/lib/cni"},
		},
		Cgroup:    Cgroup{Driver: CgroupAuto},
		Security:  Security{SELinux: SELinuxAuto},
		Keeper:    Keeper{Isolation: IsolationNode},
		Streaming: Streaming{Address: "127.0.0.1:0"},
		NRI: NRI{
			Enable: true, SocketPath: "/var/run/nri/nri.sock",
			PluginPath: "/opt/nri/plugins", PluginConfPath: "/etc/nri/conf.d", RequestTimeout: 5,
		},
		Tracing:  Tracing{Sampling: 1},
		Handlers: map[string]Handler{},
	}
}

//go:embed default.toml
var defaultTOML string

// DefaultTOML returns a file with every key at its default, each explained.
func DefaultTOML() string { return defaultTOML }

// Load reads the file at path and validates it. With an empty path it reads
// DefaultPath, and returns Default if that does not exist.
func Load(path string) (Config, error) {
	named := path != ""
	if !named {
		path = DefaultPath
	}
	text, err := os.ReadFile(path)
	if !named && errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	c, err := Parse(text)
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// Parse decodes TOML over the defaults and validates the result. A key that
// does not exist is an error that names the nearest one that does.
func Parse(text []byte) (Config, error) {
	c := Default()
	d := toml.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, explain(err)
	}
	if err := c.Validate(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Subnets returns the prefixes of Subnet, an IPv4 one before an IPv6 one.
func (n Network) Subnets() ([]netip.Prefix, error) {
	var v4, v6 []netip.Prefix
	for field := range strings.SplitSeq(n.Subnet, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(field))
		if err != nil {
			return nil, fmt.Errorf("%q is not an address range; write it like \"10.88.0.0/16\"", strings.TrimSpace(field))
		}
		if p != p.Masked() {
			return nil, fmt.Errorf("%s has address bits behind its prefix; did you mean %s?", p, p.Masked())
		}
		if p.Addr().Is4In6() {
			return nil, fmt.Errorf("%s is an IPv4 range written as IPv6; write it as IPv4", p)
		}
		if room := p.Addr().BitLen() - p.Bits(); room < 3 {
			return nil, fmt.Errorf("%s has too few addresses for pods; use /%d or larger", p, p.Addr().BitLen()-3)
		}
		if p.Addr().Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	if len(v4) > 1 || len(v6) > 1 {
		return nil, fmt.Errorf("%q has two ranges of one address family; give at most one IPv4 and one IPv6 range", n.Subnet)
	}
	return append(v4, v6...), nil
}

// SocketPath returns the path of the socket that Listen names.
func (c Config) SocketPath() string { return strings.TrimPrefix(c.Listen, "unix://") }
