package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/fault"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/host/selinux"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// maxAccountFile bounds how much of an image's /etc/passwd or group is read.
const maxAccountFile = 4 << 20

func (s *Pods) recordContainer(c *Container) error {
	dir := s.paths.container(c.ID)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	fault.Point("container.directory-made")
	if err := os.Symlink(filepath.Join("../../pods", c.PodID), filepath.Join(dir, podLink)); err != nil {
		return err
	}
	return state.Write(filepath.Join(dir, "config"), containerKind, c.containerRecord, state.Volatile)
}

// prepare mounts the root file system and writes the bundle.
func (s *Pods) prepare(ctx context.Context, p *Pod, c *Container, image Image, from *source) (*specs.Spec, error) {
	rootfs, dir := s.paths.rootfs(c.ID), s.paths.container(c.ID)
	labels, err := s.labels(p, c)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.paths.bundle(c.ID), 0o711); err != nil {
		return nil, err
	}
	if from != nil {
		if err := s.restoreUpper(ctx, c, image, from); err != nil {
			return nil, err
		}
	}
	if err := s.cfg.Layers.Mount(ctx, layer.MountSpec{
		Layers: image.Layers, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), Target: rootfs,
		Places: true, UserNS: s.namespaces(p).User, Label: labels.Mount,
	}); err != nil {
		return nil, err
	}
	fault.Point("container.rootfs-mounted")
	images, err := s.mountImages(ctx, p, c, labels.Mount)
	if err != nil {
		return nil, err
	}
	fault.Point("container.images-mounted")
	in, err := s.specInput(ctx, p, c, image, images, labels)
	if err != nil {
		return nil, err
	}
	oci, err := spec.Build(in)
	if err != nil {
		return nil, err
	}
	if err := injectDevices(oci, s.cfg.CDIDirs, c.Config.ContainerConfig); err != nil {
		return nil, err
	}
	if err := s.consult(ctx, p, c, oci); err != nil {
		return nil, err
	}
	if err := s.makeLogDir(ctx, logPath(p, c)); err != nil {
		return nil, err
	}
	fault.Point("container.log-directory-made")
	if from != nil {
		if err := errors.Join(from.fit(oci), s.restoreVolumes(ctx, p, c, image, from)); err != nil {
			return nil, err
		}
	}
	if oci.Annotations == nil {
		oci.Annotations = make(map[string]string)
	}
	oci.Annotations[criuOptions] = filepath.Join(s.paths.bundle(c.ID), "criu.conf")
	return oci, writeBundle(s.paths.bundle(c.ID), oci)
}

// RuntimeSpec returns the OCI spec that a container's runtime was given, as JSON;
// null if there is none any more, as after a reboot.
func (s *Pods) RuntimeSpec(id string) (json.RawMessage, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(s.paths.bundle(c.ID), "config.json"))
	if errors.Is(err, os.ErrNotExist) {
		return json.RawMessage("null"), nil
	}
	return data, err
}

func writeBundle(dir string, oci *specs.Spec) error {
	data, err := json.Marshal(oci)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600)
}

func (s *Pods) makeLogDir(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	return s.cfg.VolumePaths.MakeDirs(ctx, filepath.Dir(path))
}

// specInput reads everything the spec depends on. Images has the source of each
// mount that is of an image.
func (s *Pods) specInput(ctx context.Context, p *Pod, c *Container, image Image, images []string, labels selinux.Labels) (spec.Input, error) {
	rootfs := s.paths.rootfs(c.ID)
	in := spec.Input{
		PodID: p.ID, ContainerID: c.ID, Pod: p.Config.PodSandboxConfig, Container: c.Config.ContainerConfig,
		Image: image.Config, Rootfs: rootfs, Hostname: hostname(p.Config.PodSandboxConfig),
		CgroupsPath: path.Join(p.Cgroup, c.ID), Files: s.files(p), Host: s.cfg.Facts,
		ProcessLabel: labels.Process, MountLabel: labels.Mount,
	}
	var err error
	if in.Handler, err = s.cfg.Features(ctx, p.Runtime); err != nil {
		return in, err
	}
	for file, content := range map[string]*[]byte{"etc/passwd": &in.Passwd, "etc/group": &in.Group} {
		if *content, err = readInRoot(rootfs, file); err != nil {
			return in, fmt.Errorf("image: /%s: %w", file, err)
		}
	}
	if in.Namespaces, err = s.specNamespaces(p, c.Config.ContainerConfig); err != nil {
		return in, err
	}
	if in.Sources, err = s.mountSources(ctx, p, c.Config.GetMounts(), images); err != nil {
		return in, err
	}
	if err := s.relabelMounts(ctx, c.Config.GetMounts(), in.Sources, labels); err != nil {
		return in, err
	}
	if in.Volumes, err = s.imageVolumes(ctx, p, c, image, rootfs, labels.Mount); err != nil {
		return in, err
	}
	if err := addDevices(&in, c.Config.ContainerConfig); err != nil {
		return in, err
	}
	if in.AppArmorProfile, err = s.apparmorProfile(ctx, c.Config.ContainerConfig); err != nil {
		return in, err
	}
	file, err := spec.SeccompFile(c.Config.ContainerConfig)
	if err != nil || file == "" {
		return in, err
	}
	in.SeccompProfile, err = os.ReadFile(file)
	if err != nil {
		return in, fmt.Errorf("linux.security_context.seccomp: read profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return in, nil
}

// readInRoot reads a file of an image, which may have links anywhere; absent is
// nil.
func readInRoot(root, name string) ([]byte, error) {
	handle, err := pathrs.OpenInRoot(root, name)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	info, err := handle.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxAccountFile {
		return nil, fmt.Errorf("it is no regular file of at most %d bytes: %w", maxAccountFile, errdefs.ErrInvalidArgument)
	}
	f, err := pathrs.Reopen(handle, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxAccountFile))
}

func (s *Pods) specNamespaces(p *Pod, config *runtimeapi.ContainerConfig) (spec.Namespaces, error) {
	pins := s.namespaces(p)
	ns := spec.Namespaces{Network: pins.Net, IPC: pins.IPC, UTS: pins.UTS, User: pins.User}
	switch mode, target := spec.PIDMode(p.Config.PodSandboxConfig, config); mode {
	case runtimeapi.NamespaceMode_POD:
		ns.PID = s.pinned(p.ID, "pid")
	case runtimeapi.NamespaceMode_TARGET:
		t, err := s.container(target)
		if err != nil {
			return ns, fmt.Errorf("linux.security_context.namespace_options.target_id: %w", err)
		}
		st := t.Status()
		if st.PodID != p.ID || st.State != Running {
			return ns, fmt.Errorf("linux.security_context.namespace_options.target_id: %v is not a running container of %v: %w", t, p, errdefs.ErrInvalidArgument)
		}
		ns.PID = fmt.Sprintf("/proc/%d/ns/pid", st.Process.Pid)
	}
	return ns, nil
}

// apparmorProfile returns the name of the profile a container gets. One that does
// not say that it wants the default runs without it where there is none.
func (s *Pods) apparmorProfile(ctx context.Context, config *runtimeapi.ContainerConfig) (string, error) {
	r, err := spec.AppArmorOf(config)
	if err != nil || !r.Confined || !r.Asked && !s.cfg.Facts.AppArmor {
		return "", err
	}
	name, err := s.cfg.AppArmor(ctx, r.Profile)
	switch {
	case err == nil:
		return name, nil
	case r.Asked:
		return "", fmt.Errorf("%s: %w", spec.AppArmorField, err)
	}
	return "", nil // the status of the node tells why
}

// mountSources looks at the host's side of each mount. The CRI wants an error for
// a source that is absent; kubelets want a directory made for hostPath volumes
// without a type, and cannot say which mounts these are. So it is made, unless
// it is a volume the kubelet itself has set up for the pod: if that is gone, an
// empty directory would pass for the data.
func (s *Pods) mountSources(ctx context.Context, p *Pod, mounts []*runtimeapi.Mount, images []string) ([]spec.Source, error) {
	sources := make([]spec.Source, len(mounts))
	var hosts []int // the mounts whose source is a path of the host
	for i, m := range mounts {
		sources[i].Path = m.GetHostPath()
		if m.GetImage().GetImage() != "" {
			sources[i].Path = images[i]
			continue
		}
		if !filepath.IsAbs(m.GetHostPath()) {
			return nil, fmt.Errorf("mounts[%d].host_path: %q is not an absolute path: %w", i, m.GetHostPath(), errdefs.ErrInvalidArgument)
		}
		hosts = append(hosts, i)
	}
	if err := s.followSources(ctx, p.Config.GetMetadata().GetUid(), sources, hosts); err != nil {
		return nil, err
	}
	if err := s.checkMappable(ctx, p, mounts, sources); err != nil {
		return nil, err
	}
	for i, m := range mounts {
		if m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
			continue
		}
		var err error
		if sources[i].Shared, sources[i].Slave, err = host.Propagation(sources[i].Path); err != nil {
			return nil, fmt.Errorf("mounts[%d].host_path: %w", i, err)
		}
	}
	return sources, nil
}

// followSources replaces the paths of the sources that hosts counts up by those
// without symbolic links, and makes the absent ones.
func (s *Pods) followSources(ctx context.Context, podUID string, sources []spec.Source, hosts []int) error {
	for made := false; len(hosts) > 0; {
		paths := make([]string, len(hosts))
		for n, i := range hosts {
			paths[n] = sources[i].Path
		}
		real, err := s.cfg.VolumePaths.Follow(ctx, paths...)
		for n := range real {
			sources[hosts[n]].Path = real[n]
		}
		if err == nil {
			return nil
		}
		if hosts = hosts[len(real):]; len(hosts) == 0 {
			return err
		}
		if len(real) > 0 {
			made = false
		}
		if made || !errors.Is(err, os.ErrNotExist) {
			return sourceError(hosts[0], sources[hosts[0]].Path, "cannot be followed to a file or directory", err)
		}
		if err := s.makeSource(ctx, podUID, hosts[0], sources[hosts[0]].Path); err != nil {
			return err
		}
		made = true
	}
	return nil
}

func (s *Pods) makeSource(ctx context.Context, podUID string, i int, path string) error {
	if podUID != "" && strings.Contains(path, "/pods/"+podUID+"/") {
		return fmt.Errorf("mounts[%d].host_path: %q is absent, but it is a volume of this pod: the kubelet has to mount it first: %w", i, path, errdefs.ErrInvalidArgument)
	}
	if err := s.cfg.VolumePaths.MakeDirs(ctx, path); err != nil {
		return sourceError(i, path, "is absent and cannot be made", err)
	}
	return nil
}

// sourceError is the client's mistake, unless it is only that time is up.
func sourceError(i int, path, problem string, err error) error {
	if errors.As(err, new(unix.Errno)) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("mounts[%d].host_path: %q %s: %w", i, path, problem, err)
}

// imageVolumes makes a directory for each VOLUME of the image, with what the
// image has there.
func (s *Pods) imageVolumes(ctx context.Context, p *Pod, c *Container, image Image, rootfs, label string) (map[string]string, error) {
	volumes := make(map[string]string)
	for i, path := range spec.ImageVolumes(c.Config.ContainerConfig, image.Config) {
		dir := s.imageVolume(c, i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := p.giveToRoot(dir); err != nil {
			return nil, err
		}
		// The rootfs is not in use yet, so that nobody can swap links under this.
		source, err := securejoin.SecureJoin(rootfs, path)
		if err != nil {
			return nil, fmt.Errorf("image volume %s: %w", path, err)
		}
		if info, err := os.Stat(source); err == nil && info.IsDir() {
			if err := fs.CopyDir(dir, source); err != nil {
				return nil, fmt.Errorf("image volume %s: copy its content: %w", path, err)
			}
		}
		if err := s.cfg.SELinux.Relabel(ctx, dir, label); err != nil {
			return nil, fmt.Errorf("image volume %s: %w", path, err)
		}
		volumes[path] = dir
	}
	return volumes, nil
}

func addDevices(in *spec.Input, config *runtimeapi.ContainerConfig) error {
	in.Devices = make(map[string][]host.Device)
	for i, d := range config.GetDevices() {
		devices, err := host.Devices(d.GetHostPath())
		if err != nil {
			return fmt.Errorf("devices[%d].host_path: %w", i, err)
		}
		in.Devices[d.GetHostPath()] = devices
	}
	if !config.GetLinux().GetSecurityContext().GetPrivileged() {
		return nil
	}
	var err error
	in.HostDevices, err = host.AllDevices()
	return err
}
