package spec

import (
	"path"
	"strconv"
	"strings"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// defaultPath is the PATH of an image that sets none.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// maxOpenFiles is the RLIMIT_NOFILE of containers, whatever the daemon was
	// started with. All other limits are the keeper's.
	maxOpenFiles = 1 << 20
)

// process builds the process of a container without what security adds to it.
func process(in Input) (*specs.Process, error) {
	args, err := arguments(in.Container, in.Image)
	if err != nil {
		return nil, err
	}
	id, err := resolveUser(in.Container.GetLinux().GetSecurityContext(), in.Image.User, in.Passwd, in.Group)
	if err != nil {
		return nil, err
	}
	if err := checkMapped(in.Pod, id); err != nil {
		return nil, err
	}
	env, err := environment(in, id.home)
	if err != nil {
		return nil, err
	}
	cwd, err := workingDir(in.Container, in.Image)
	if err != nil {
		return nil, err
	}
	score := oomScoreAdj(in.Container.GetLinux().GetResources(), in.Host)
	return &specs.Process{
		Terminal:    in.Container.GetTty(),
		User:        specs.User{UID: id.uid, GID: id.gid, AdditionalGids: id.groups},
		Args:        args,
		Env:         env,
		Cwd:         cwd,
		Rlimits:     rlimits(in),
		OOMScoreAdj: &score,
	}, nil
}

// arguments applies the rule of Kubernetes: a command replaces the image's
// entrypoint and its arguments, args alone replace only the arguments.
func arguments(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) ([]string, error) {
	command, args := c.GetCommand(), c.GetArgs()
	if len(command) == 0 {
		command = image.Entrypoint
		if len(args) == 0 {
			args = image.Cmd
		}
	}
	argv := append(append(make([]string, 0, len(command)+len(args)), command...), args...)
	if len(argv) == 0 {
		return nil, invalid("command", nil, "neither the container nor its image says what to run", "set command")
	}
	if argv[0] == "" {
		return nil, invalid("command", argv[0], "the program's name is empty", "set command")
	}
	if err := checkStrings("command", argv); err != nil {
		return nil, err
	}
	return argv, nil
}

// environment merges, each overriding those before it: what every container
// gets, the image's variables, the container's.
func environment(in Input, home string) ([]string, error) {
	var env variables
	env.set("PATH", defaultPath)
	if in.Hostname != "" {
		env.set("HOSTNAME", in.Hostname)
	}
	if in.Container.GetTty() {
		env.set("TERM", "xterm")
	}
	env.set("HOME", home)
	for _, kv := range in.Image.Env {
		// Some builders leave entries without a name or a value; they mean
		// nothing to a process.
		if name, value, ok := strings.Cut(kv, "="); ok && name != "" {
			env.set(name, value)
		}
	}
	for i, kv := range in.Container.GetEnvs() {
		if err := checkVariable(i, kv); err != nil {
			return nil, err
		}
		env.set(kv.GetKey(), string(kv.GetValue()))
	}
	if err := checkStrings("envs", env.list); err != nil {
		return nil, err
	}
	return env.list, nil
}

// variables are environment variables in the order they were first set.
type variables struct {
	list  []string
	index map[string]int
}

func (v *variables) set(name, value string) {
	if v.index == nil {
		v.index = make(map[string]int)
	}
	kv := name + "=" + value
	if i, ok := v.index[name]; ok {
		v.list[i] = kv
		return
	}
	v.index[name] = len(v.list)
	v.list = append(v.list, kv)
}

func checkVariable(i int, kv *runtimeapi.KeyValue) error {
	field := "envs[" + strconv.Itoa(i) + "]"
	switch {
	case kv.GetKey() == "":
		return invalid(field+".key", "", "a variable needs a name", "")
	case strings.Contains(kv.GetKey(), "="):
		return invalid(field+".key", kv.GetKey(), "a variable's name cannot contain =", "")
	case !utf8.Valid(kv.GetValue()):
		// An OCI spec is JSON. Say so rather than change the value.
		return invalid(field+".value", nil, "the value of "+kv.GetKey()+" is not UTF-8, which an OCI runtime cannot be given", "encode it, or put it in a file")
	}
	return nil
}

func workingDir(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) (string, error) {
	if dir := c.GetWorkingDir(); dir != "" {
		if !path.IsAbs(dir) {
			return "", invalid("working_dir", dir, "the path is not absolute", "let it begin with /")
		}
		return dir, checkStrings("working_dir", []string{dir})
	}
	dir := path.Join("/", image.WorkingDir)
	return dir, checkStrings("image.WorkingDir", []string{dir})
}

func rlimits(in Input) []specs.POSIXRlimit {
	files := min(maxOpenFiles, in.Host.MaxOpenFiles)
	if files == 0 {
		return nil // not known: leave the keeper's
	}
	return []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: files, Hard: files}}
}

// checkStrings refuses what no system call could pass on.
func checkStrings(field string, list []string) error {
	for _, s := range list {
		if strings.ContainsRune(s, 0) {
			return invalid(field, s, "the text contains a NUL byte", "")
		}
		if !utf8.ValidString(s) {
			return invalid(field, s, "the text is not UTF-8", "")
		}
	}
	return nil
}
