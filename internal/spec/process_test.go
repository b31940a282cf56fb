package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestArguments is the table of the Kubernetes documentation ("Define a Command
// and Arguments for a Container") and what lies beside it.
func TestArguments(t *testing.T) {
	type list = []string
	for _, tt := range []struct {
		name                           string
		entrypoint, cmd, command, args list
		want                           list
		err                            string
	}{
		{"image alone", list{"/ep"}, list{"foo", "bar"}, nil, nil, list{"/ep", "foo", "bar"}, ""},
		{"command alone drops both", list{"/ep"}, list{"foo", "bar"}, list{"/ep2"}, nil, list{"/ep2"}, ""},
		{"args alone", list{"/ep"}, list{"foo", "bar"}, nil, list{"zoo"}, list{"/ep", "zoo"}, ""},
		{"command and args", list{"/ep"}, list{"foo"}, list{"/ep2"}, list{"zoo"}, list{"/ep2", "zoo"}, ""},
		{"cmd without entrypoint", nil, list{"sh", "-c", "x"}, nil, nil, list{"sh", "-c", "x"}, ""},
		{"args without entrypoint", nil, list{"sh"}, nil, list{"ls", ""}, list{"ls", ""}, ""},
		{"nothing", nil, nil, nil, nil, nil, "command: neither the container nor its image says what to run; set command"},
		{"empty program", nil, nil, list{""}, nil, nil, "the program's name is empty"},
		{"NUL in the image's", list{"/ep\x00"}, nil, nil, nil, nil, "NUL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &runtimeapi.ContainerConfig{Command: tt.command, Args: tt.args}
			got, err := arguments(c, ocispec.ImageConfig{Entrypoint: tt.entrypoint, Cmd: tt.cmd})
			if tt.err != "" {
				wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
				return
			}
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	envs := func(kv ...string) (list []*runtimeapi.KeyValue) {
		for _, s := range kv {
			k, v, _ := strings.Cut(s, "=")
			list = append(list, &runtimeapi.KeyValue{Key: k, Value: []byte(v)})
		}
		return list
	}
	for _, tt := range []struct {
		name  string
		image []string
		own   []*runtimeapi.KeyValue
		tty   bool
		want  []string
		err   string
	}{
		{name: "nothing set", want: []string{"PATH=" + defaultPath, "HOSTNAME=pod", "HOME=/h"}},
		{name: "terminal", tty: true, want: []string{"PATH=" + defaultPath, "HOSTNAME=pod", "TERM=xterm", "HOME=/h"}},
		{name: "image overrides", image: []string{"PATH=/i", "HOME=/i", "A=1", "A=2"}, want: []string{"PATH=/i", "HOSTNAME=pod", "HOME=/i", "A=2"}},
		{name: "container overrides", image: []string{"A=1", "B=2"}, own: envs("A=x=y", "C=", "HOSTNAME=other"), want: []string{"PATH=" + defaultPath, "HOSTNAME=other", "HOME=/h", "A=x=y", "B=2", "C="}},
		{name: "image entries that are none", image: []string{"novalue", "=x", ""}, want: []string{"PATH=" + defaultPath, "HOSTNAME=pod", "HOME=/h"}},
		{name: "no name", own: envs("A=1", "=x"), err: "envs[1].key: \"\": a variable needs a name"},
		{name: "= in the name", own: []*runtimeapi.KeyValue{{Key: "A=B"}}, err: "cannot contain ="},
		{name: "not UTF-8", own: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff}}}, err: "envs[0].value: the value of A is not UTF-8"},
		{name: "NUL", own: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0}}}, err: "NUL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := testInput()
			in.Image.Env, in.Container.Envs, in.Container.Tty = tt.image, tt.own, tt.tty
			got, err := environment(in, "/h")
			if tt.err != "" {
				wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
				return
			}
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got  %q, %v\nwant %q", got, err, tt.want)
			}
		})
	}
}

func TestWorkingDir(t *testing.T) {
	for _, tt := range []struct{ own, image, want string }{
		{"", "", "/"},
		{"", "/srv", "/srv"},
		{"", "srv/app", "/srv/app"},
		{"/own", "/srv", "/own"},
	} {
		got, err := workingDir(&runtimeapi.ContainerConfig{WorkingDir: tt.own}, ocispec.ImageConfig{WorkingDir: tt.image})
		if err != nil || got != tt.want {
			t.Errorf("working_dir %q, image %q: got %q, %v, want %q", tt.own, tt.image, got, err, tt.want)
		}
	}
	_, err := workingDir(&runtimeapi.ContainerConfig{WorkingDir: "rel"}, ocispec.ImageConfig{})
	wantError(t, err, errdefs.ErrInvalidArgument, `working_dir: "rel": the path is not absolute`)
}

func TestOpenFilesFollowTheHost(t *testing.T) {
	in := testInput()
	for _, tt := range []struct{ host, want uint64 }{{1 << 30, 1 << 20}, {20000, 20000}} {
		in.Host.MaxOpenFiles = tt.host
		if r := mustBuild(t, in).Process.Rlimits; len(r) != 1 || r[0].Hard != tt.want || r[0].Soft != tt.want {
			t.Errorf("the host gives %d files: %+v, want %d", tt.host, r, tt.want)
		}
	}
	in.Host.MaxOpenFiles = 0
	if r := mustBuild(t, in).Process.Rlimits; r != nil {
		t.Errorf("unknown limit of the host: %+v", r)
	}
}
