package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDefaultTOMLIsTheDefault(t *testing.T) {
	got, err := Parse([]byte(DefaultTOML()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("`config default` differs from Default (-code +file):\n%s", diff)
	}
	for _, key := range Keys() {
		last := tailOf(key)
		if !strings.Contains(DefaultTOML(), "\n"+last+" = ") && !strings.Contains(DefaultTOML(), "\n# "+last+" = ") {
			t.Errorf("default.toml does not show %s", key)
		}
	}
}

func TestParse(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       []string // parts of the error; none: it is valid
	}{
		{"empty", "", nil},
		{"dual stack", "[network]\nsubnet = \"10.1.0.0/16, fd00::/64\"", nil},
		{"handlers", "default_handler = \"runc\"\n[handlers.runc]\npath = \"/usr/sbin/runc\"\n[handlers.kata-qemu]\npath = \"/opt/kata\"", nil},
		{"misspelt key", "[network]\nmod = \"cni\"", []string{"line 2", `"network.mod"`, `"network.mode"`}},
		{"misspelt table", "[netwrk]\nmode = \"cni\"", []string{"line 1", `"netwrk"`, `"network"`}},
		{"key at the wrong level", "\nsubnet = \"10.0.0.0/8\"", []string{"line 2", `"subnet"`, `"network.subnet"`}},
		{"top key under a table", "[streaming]\ndefault_handler = \"builtin\"", []string{`"streaming.default_handler"`, "above the first [table]"}},
		{"key of a handler", "[handlers.runc]\nroot_dir = \"/x\"\npath = \"/usr/sbin/runc\"", []string{`"handlers.runc.root_dir"`}},
		{"two unknown keys", "rot = \"/x\"\nstat = \"/y\"", []string{`"root"`, `"state"`}},
		{"syntax", "root = /var/lib", []string{"line 1"}},
		{"wrong type", "root = 3", []string{"line 1", "key root", "cannot decode TOML integer into string"}},
		{"half a table", "[stream]\naddress = \"127.0.0.1:1\"", []string{`"streaming"`}},
		{"repeated key", "root = \"/a\"\nroot = \"/b\"", []string{"root"}},
		{"relative root", "root = \"var\"", []string{`root = "var"`, "absolute"}},
		{"root of everything", "root = \"/\"", []string{"not the root directory"}},
		{"separator in root", "root = \"/a:b\"", []string{`must not contain ":"`}},
		{"state in root", "root = \"/a\"\nstate = \"/a/run\"", []string{`state = "/a/run"`, `root is "/a"`}},
		{"root is state", "root = \"/a\"\nstate = \"/a\"", []string{"separate"}},
		{"neighbours", "root = \"/a\"\nstate = \"/ab\"", nil},
		{"bare socket path", "listen = \"/run/x.sock\"", []string{`did you mean "unix:///run/x.sock"`}},
		{"tcp", "listen = \"tcp://0.0.0.0:1\"", []string{"unix socket"}},
		{"relative socket", "listen = \"unix://x.sock\"", []string{"absolute path"}},
		{"long socket", "listen = \"unix:///" + strings.Repeat("x", 110) + "\"", []string{"107"}},
		{"mode", "[network]\nmode = \"bridge\"", []string{`network.mode = "bridge"`, `"auto", "cni", "builtin"`}},
		{"driver", "[cgroup]\ndriver = \"cgroupv2\"", []string{"cgroup.driver", `"cgroupfs"`}},
		{"isolation", "[keeper]\nisolation = \"none\"", []string{"keeper.isolation", `"pod"`}},
		{"no subnet", "[network]\nsubnet = \"\"", []string{"network.subnet", "10.88.0.0/16"}},
		{"host bits", "[network]\nsubnet = \"10.88.0.1/16\"", []string{"did you mean 10.88.0.0/16"}},
		{"tiny subnet", "[network]\nsubnet = \"10.88.0.0/30\"", []string{"/29"}},
		{"two of a family", "[network]\nsubnet = \"10.88.0.0/16,10.89.0.0/16\"", []string{"one IPv4"}},
		{"mapped", "[network]\nsubnet = \"::ffff:10.0.0.0/104\"", []string{"network.subnet"}},
		{"no plugins", "[network]\nmode = \"cni\"\ncni_bin_dirs = []", []string{"network.cni_bin_dirs"}},
		{"address", "[streaming]\naddress = \"localhost:0\"", []string{`"localhost" is not an IP address`}},
		{"half of TLS", "[streaming]\ntls_cert = \"/etc/cert\"", []string{`streaming.tls_key = ""`, "must be set too"}},
		{"TLS file", "[streaming]\ntls_cert = \"cert\"\ntls_key = \"/etc/key\"", []string{`streaming.tls_cert = "cert"`, "absolute path"}},
		{"no port", "[streaming]\naddress = \"127.0.0.1\"", []string{"streaming.address"}},
		{"port", "[streaming]\naddress = \"127.0.0.1:70000\"", []string{"70000"}},
		{"unknown handler", "default_handler = \"runc\"", []string{"[handlers.runc]", "known handlers: builtin"}},
		{"builtin redefined", "[handlers.builtin]\npath = \"/bin/x\"", []string{"built in"}},
		{"name of a handler", "[handlers.\"Run C\"]\npath = \"/bin/x\"", []string{"RuntimeClass"}},
		{"handler without path", "[handlers.runc]", []string{"handlers.runc.path", "/usr/sbin/runc"}},
		{"pinned", "[images]\npinned = [\"\"]", []string{"images.pinned"}},
		{"several at once", "root = \"x\"\nlisten = \"y\"", []string{"root = ", "listen = "}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse([]byte(test.text))
			if (err == nil) != (len(test.want) == 0) {
				t.Fatalf("error %v, want parts %q", err, test.want)
			}
			for _, part := range test.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error lacks %q: %v", part, err)
				}
			}
		})
	}
}

func TestParseKeepsUnsetDefaults(t *testing.T) {
	got, err := Parse([]byte("[network]\ncni_bin_dirs = [\"/a\"]\n[keeper]\nisolation = \"pod\""))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Network.CNIBinDirs = []string{"/a"}
	want.Keeper.Isolation = IsolationPod
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "absent")); err == nil {
		t.Error("a named file that is absent is an error")
	}
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte("rooot = \"/x\""), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v does not name %s", err, path)
	}
}

func TestSubnetsSortsFamilies(t *testing.T) {
	got, err := Network{Subnet: "fd00::/64,10.0.0.0/8"}.Subnets()
	if err != nil || len(got) != 2 || !got[0].Addr().Is4() {
		t.Errorf("got %v, %v", got, err)
	}
}

// The keys other tools rely on.
func TestKeys(t *testing.T) {
	want := []string{
		"root", "state", "listen", "default_handler", "registry.config_dir", "images.pinned",
		"network.mode", "network.subnet", "network.cni_conf_dir", "network.cni_bin_dirs",
		"cgroup.driver", "security.selinux", "keeper.isolation", "streaming.address", "streaming.tls_cert", "streaming.tls_key",
		"nri.enable", "nri.socket_path", "nri.plugin_path", "nri.plugin_config_path", "nri.request_timeout",
		"metrics.address", "tracing.endpoint", "tracing.sampling", "checkpoint.criu", "checkpoint.restore_images", "handlers.NAME.path",
	}
	if !slices.Equal(Keys(), want) {
		t.Errorf("got %q, want %q", Keys(), want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(DefaultTOML()))
	f.Add([]byte("[a.\"\"]\n''=1\nx.y=[{z=1}]"))
	f.Add([]byte("root=1979-05-27\n[[handlers]]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err == nil && c.Validate() != nil {
			t.Error("Parse returned an invalid configuration")
		}
	})
}
