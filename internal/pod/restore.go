package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/checkpoint"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/spec"
)

// A container is restored as it is created: all that surrounds its processes is
// made as the client says, of the image that the checkpoint names. Then the
// keeper has CRIU make the processes. They wait for StartContainer.

// source is a checkpoint that a container is restored from.
type source struct {
	name   string // as the client called it
	dir    string
	config checkpoint.Config
	spec   *specs.Spec
	image  Image // that the container was made of
	criu   host.Program
}

// sourceOf returns the checkpoint that a container is to be restored from, or nil if
// its image is an image: it is one if it is the path of an archive or a directory, or
// an image that is a checkpoint. Done lets go of it.
func (s *Pods) sourceOf(ctx context.Context, p *Pod, config *runtimeapi.ContainerConfig) (from *source, done func(), err error) {
	done = func() {}
	name := imageName(config)
	image, err := s.cfg.Images.Get(name)
	switch {
	case filepath.IsAbs(name):
	case err != nil || image.Checkpoint == "":
		return nil, done, nil // whoever needs the image reports that there is none
	case !s.cfg.RestoreImages:
		return nil, done, fmt.Errorf("image.image: %s is a checkpoint of container %s, and a checkpoint is trusted like root; set restore_images in [checkpoint] of the configuration if all who may name an image are: %w", name, image.Checkpoint, errdefs.ErrPermissionDenied)
	}
	criu, err := s.criuFor(ctx, p)
	if err != nil {
		return nil, done, err
	}
	dir, done, err := s.unpackSource(ctx, name, image)
	if err == nil {
		from, err = s.openSource(name, dir, criu)
	}
	if err != nil {
		done()
		return nil, func() {}, fmt.Errorf("image.image: %s: %w", name, err)
	}
	return from, done, nil
}

// unpackSource makes a directory of a checkpoint that is none.
func (s *Pods) unpackSource(ctx context.Context, name string, image Image) (dir string, done func(), err error) {
	done = func() {}
	if image.Checkpoint == "" {
		info, err := os.Stat(name)
		if err != nil {
			return "", done, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		if info.IsDir() {
			return name, done, nil
		}
	}
	work, err := s.workDir()
	if err != nil {
		return "", done, err
	}
	done = func() {
		if err := s.abandon(work); err != nil {
			s.log.Warn("unpacked checkpoint stays until the next start", "err", err)
		}
		s.cfg.Images.Release(filepath.Base(work))
	}
	dir = filepath.Join(work, "container")
	if image.Checkpoint != "" {
		return dir, done, s.mountSource(ctx, image, dir, filepath.Base(work))
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", done, err
	}
	return dir, done, unpackArchive(ctx, name, dir)
}

func (s *Pods) mountSource(ctx context.Context, image Image, dir, holder string) error {
	image, err := s.cfg.Images.Acquire(image.ID, holder)
	if err != nil {
		return err
	}
	return s.cfg.Layers.Mount(ctx, layer.MountSpec{Layers: image.Layers, Target: dir, ReadOnly: true})
}

func unpackArchive(ctx context.Context, path, dir string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	plain, err := layer.Decompress(f)
	if err != nil {
		return err
	}
	defer plain.Close()
	return checkpoint.Extract(ctx, plain, dir)
}

// openSource reads what a checkpoint says of itself, and finds its image.
func (s *Pods) openSource(name, dir string, criu host.Program) (*source, error) {
	from := &source{name: name, dir: dir, criu: criu, spec: new(specs.Spec)}
	if err := checkpoint.ReadJSON(dir, checkpoint.ConfigName, &from.config); err != nil {
		return nil, err
	}
	if err := checkpoint.ReadJSON(dir, checkpoint.SpecName, from.spec); err != nil {
		return nil, err
	}
	if from.spec.Process == nil || from.spec.Root == nil || from.spec.Linux == nil {
		return nil, fmt.Errorf("checkpoint: %s has no process, root or linux section: %w", checkpoint.SpecName, errdefs.ErrInvalidArgument)
	}
	if info, err := os.Lstat(filepath.Join(dir, checkpoint.ImagesDir)); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("checkpoint: there is no directory %s: %w", checkpoint.ImagesDir, errdefs.ErrInvalidArgument)
	}
	for _, ref := range []string{from.config.RootfsImageRef, from.config.RootfsImageName, from.config.RootfsImage} {
		if image, err := s.cfg.Images.Get(ref); ref != "" && err == nil {
			from.image = image
			return from, nil
		}
	}
	return nil, fmt.Errorf("checkpoint: its image %q is not here; pull it first: %w", from.config.RootfsImageRef, errdefs.ErrNotFound)
}

// restoreUpper makes the writable layer as the container had it.
func (s *Pods) restoreUpper(ctx context.Context, c *Container, image Image, from *source) error {
	var deleted []string
	if err := checkpoint.ReadJSON(from.dir, checkpoint.DeletedName, &deleted); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for i, name := range deleted {
		deleted[i] = strings.TrimPrefix(name, "/")
	}
	diff, err := checkpoint.Open(from.dir, checkpoint.DiffName)
	if errors.Is(err, fs.ErrNotExist) && len(deleted) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	defer diff.Close()
	return s.cfg.Layers.RestoreUpper(ctx, image.Layers, filepath.Join(s.paths.container(c.ID), "upper"), diff, deleted)
}

// fit makes a spec that of the container that was checkpointed, as far as its process
// goes, and refuses it if its surroundings differ from those that the process knows.
func (from *source) fit(oci *specs.Spec) error {
	was, now := from.spec, oci
	if missing, extra := compare(destinations(was), destinations(now)); len(missing)+len(extra) > 0 {
		return fmt.Errorf("mounts: the checkpoint has some that the container has not (%s), or the other way round (%s): %w", strings.Join(missing, ", "), strings.Join(extra, ", "), errdefs.ErrInvalidArgument)
	}
	if missing, extra := compare(namespaces(was), namespaces(now)); len(missing)+len(extra) > 0 {
		return fmt.Errorf("namespaces: the checkpoint has %s, the container would have %s: %w", strings.Join(missing, ", "), strings.Join(extra, ", "), errdefs.ErrInvalidArgument)
	}
	if was.Process.Terminal != now.Process.Terminal {
		return fmt.Errorf("tty: %v, but %v in the checkpoint: %w", now.Process.Terminal, was.Process.Terminal, errdefs.ErrInvalidArgument)
	}
	if was.Root.Readonly != now.Root.Readonly {
		return fmt.Errorf("linux.security_context.readonly_rootfs: %v, but %v in the checkpoint: %w", now.Root.Readonly, was.Root.Readonly, errdefs.ErrInvalidArgument)
	}
	// Execs take after the process, which is what it was.
	now.Process.Args, now.Process.Env, now.Process.Cwd, now.Process.User = was.Process.Args, was.Process.Env, was.Process.Cwd, was.Process.User
	return nil
}

func destinations(s *specs.Spec) map[string]bool {
	all := make(map[string]bool)
	for _, m := range s.Mounts {
		all[filepath.Clean(m.Destination)] = true
	}
	return all
}

// namespaces tells of each namespace of a container whether it is its own.
func namespaces(s *specs.Spec) map[string]bool {
	all := make(map[string]bool)
	for _, ns := range s.Linux.Namespaces {
		whose := "its own"
		if ns.Path != "" {
			whose = "the pod's"
		}
		all[whose+" "+string(ns.Type)] = true
	}
	return all
}

// compare returns what only one of two sets has, sorted.
func compare(a, b map[string]bool) (onlyA, onlyB []string) {
	for _, name := range slices.Sorted(maps.Keys(a)) {
		if !b[name] {
			onlyA = append(onlyA, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(b)) {
		if !a[name] {
			onlyB = append(onlyB, name)
		}
	}
	return onlyA, onlyB
}

// restoreVolumes brings back what was in the image's volumes and in the pod's
// /dev/shm. The latter only if it is empty: it is that of all the pod's containers,
// and each checkpoint has the whole.
func (s *Pods) restoreVolumes(ctx context.Context, p *Pod, c *Container, image Image, from *source) error {
	for i := range spec.ImageVolumes(c.Config.ContainerConfig, image.Config) {
		if err := unpackInto(ctx, from.dir, checkpoint.VolumeName(i), s.imageVolume(c, i), true); err != nil {
			return err
		}
	}
	if !spec.NamespacesOf(p.Config.PodSandboxConfig).IPC {
		return nil
	}
	return unpackInto(ctx, from.dir, checkpoint.DevShmName, s.shm(p), false)
}

// unpackInto unpacks an archive of a checkpoint, if it has it, into a directory. What
// is in there goes, or stays, and then nothing is unpacked.
func unpackInto(ctx context.Context, from, name, dir string, replace bool) error {
	f, err := checkpoint.Open(from, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 && !replace {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := layer.Unpack(ctx, dir, f); err != nil {
		return fmt.Errorf("checkpoint: %s: %w", name, err)
	}
	return nil
}

// restored is a pod made of a checkpoint, and its containers by name.
type restored struct {
	pod        string
	containers map[string]string
}

// RestorePod makes a pod, and its containers, of a checkpoint that CheckpointPod has
// written. The containers are created, not started. The configs have passed
// spec.ValidatePod and spec.ValidateContainer. On error nothing is left of them.
func (s *Pods) RestorePod(ctx context.Context, dir string, config *runtimeapi.PodSandboxConfig, handler string, options map[string]string, configs []*runtimeapi.ContainerConfig) (podID string, containers map[string]string, err error) {
	if err := noOptions(options); err != nil {
		return "", nil, err
	}
	runtime, err := s.resolveHandler(handler)
	if err != nil {
		return "", nil, err
	}
	dirs, err := readPod(dir, config, configs)
	if err != nil {
		return "", nil, err
	}
	r, err := s.checkpoints.Do(ctx, "restore\x00"+runKey(config), func(ctx context.Context) (restored, error) {
		if p := s.podLike(config); p != nil {
			return s.restoredBefore(p, dirs, config, handler, configs)
		}
		return s.restorePod(ctx, dirs, config, handler, runtime, configs)
	})
	return r.pod, r.containers, err
}

// readPod finds the directory of each container in a pod's checkpoint, and refuses a
// pod that is another.
func readPod(dir string, config *runtimeapi.PodSandboxConfig, configs []*runtimeapi.ContainerConfig) (map[string]string, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("checkpoint_path: %q is not an absolute path: %w", dir, errdefs.ErrInvalidArgument)
	}
	var options checkpoint.PodOptions
	if err := checkpoint.ReadJSON(dir, checkpoint.PodOptionsName, &options); err != nil {
		return nil, fmt.Errorf("checkpoint_path: %w", err)
	}
	if options.Version != checkpoint.PodOptionsVersion {
		return nil, fmt.Errorf("checkpoint_path: the checkpoint has version %d, this runtime reads %d: %w", options.Version, checkpoint.PodOptionsVersion, errdefs.ErrInvalidArgument)
	}
	var was podConfig
	if err := checkpoint.ReadJSON(dir, checkpoint.PodName, &was); err != nil {
		return nil, fmt.Errorf("checkpoint_path: %w", err)
	}
	if before, now := was.GetLinux().GetSecurityContext().GetNamespaceOptions(), config.GetLinux().GetSecurityContext().GetNamespaceOptions(); !proto.Equal(before, now) {
		return nil, fmt.Errorf("config.linux.security_context.namespace_options: they are %v, and %v in the checkpoint: %w", now, before, errdefs.ErrInvalidArgument)
	}
	wanted, has, dirs := make(map[string]bool), make(map[string]bool), make(map[string]string)
	for i, c := range configs {
		name := c.GetMetadata().GetName()
		if name == "" || wanted[name] {
			return nil, fmt.Errorf("container_configs[%d].metadata.name: %q is empty or there twice: %w", i, name, errdefs.ErrInvalidArgument)
		}
		wanted[name] = true
	}
	for name, sub := range options.Containers {
		if !containerDir.MatchString(sub) {
			return nil, fmt.Errorf("checkpoint_path: the directory of container %q is called %q: %w", name, sub, errdefs.ErrInvalidArgument)
		}
		has[name], dirs[name] = true, filepath.Join(dir, sub)
	}
	if missing, extra := compare(has, wanted); len(missing)+len(extra) > 0 || len(wanted) == 0 {
		return nil, fmt.Errorf("container_configs: the checkpoint has containers without a configuration (%s), or there are configurations without a container (%s): %w",
			strings.Join(missing, ", "), strings.Join(extra, ", "), errdefs.ErrInvalidArgument)
	}
	return dirs, nil
}

// restoredBefore answers a RestorePod for a pod that exists, as an earlier call has
// left it whose answer was lost.
func (s *Pods) restoredBefore(p *Pod, dirs map[string]string, config *runtimeapi.PodSandboxConfig, handler string, configs []*runtimeapi.ContainerConfig) (restored, error) {
	if _, err := rerun(p); err != nil {
		return restored{}, err
	}
	if err := p.isLike(config, handler); err != nil {
		return restored{}, err
	}
	r := restored{pod: p.ID, containers: make(map[string]string)}
	for _, config := range configs {
		name := config.GetMetadata().GetName()
		for _, c := range s.containersOf(p.ID) {
			if c.visible() && c.Checkpoint == dirs[name] && proto.Equal(c.Config.ContainerConfig, config) {
				r.containers[name] = c.ID
			}
		}
	}
	if len(r.containers) != len(configs) || len(s.containersOf(p.ID)) != len(configs) {
		return restored{}, fmt.Errorf("%v exists and was not restored from this; remove it or use a new attempt: %w", p, errdefs.ErrAlreadyExists)
	}
	return r, nil
}

func (s *Pods) restorePod(ctx context.Context, dirs map[string]string, config *runtimeapi.PodSandboxConfig, handler, runtime string, configs []*runtimeapi.ContainerConfig) (r restored, err error) {
	r = restored{containers: make(map[string]string)}
	// A RunPodSandbox for the same pod joins this one. It is waited for in any case:
	// what it has made must be known.
	r.pod, err = s.ops.Do(context.WithoutCancel(ctx), runKey(config), func(op context.Context) (string, error) {
		op, cancel := context.WithCancelCause(op)
		defer context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })()
		return s.run(op, config, handler, runtime)
	})
	if err != nil {
		return restored{}, err
	}
	p, err := s.pod(r.pod)
	for _, config := range configs {
		if err == nil {
			name := config.GetMetadata().GetName()
			r.containers[name], err = s.restoreOne(ctx, p, config, dirs[name])
		}
	}
	if err == nil {
		return r, nil
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	return restored{}, errors.Join(err, s.Remove(undo, r.pod))
}

// restoreOne restores a container of a pod.
func (s *Pods) restoreOne(ctx context.Context, p *Pod, config *runtimeapi.ContainerConfig, dir string) (string, error) {
	name := config.GetMetadata().GetName()
	criu, err := s.criuFor(ctx, p)
	if err != nil {
		return "", err
	}
	from, err := s.openSource(dir, dir, criu)
	if err != nil {
		return "", fmt.Errorf("container %s: %w", name, err)
	}
	if err := s.expected(from, config); err != nil {
		return "", fmt.Errorf("container_configs: %s: %w", name, err)
	}
	return s.createFrom(ctx, p, config, from)
}

// expected refuses a configuration of another process than that of the checkpoint.
func (s *Pods) expected(from *source, now *runtimeapi.ContainerConfig) error {
	image, err := s.cfg.Images.Get(imageName(now))
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if image.ID != from.image.ID {
		return fmt.Errorf("image: %s is %s, the checkpoint is of %s: %w", imageName(now), image.ID, from.image.ID, errdefs.ErrInvalidArgument)
	}
	var was containerConfig
	if err := checkpoint.ReadJSON(from.dir, checkpoint.RequestName, &was); err != nil {
		return err
	}
	for _, field := range []struct {
		name string
		same bool
	}{
		{"command", slices.Equal(was.GetCommand(), now.GetCommand())},
		{"args", slices.Equal(was.GetArgs(), now.GetArgs())},
		{"working_dir", was.GetWorkingDir() == now.GetWorkingDir()},
		{"envs", slices.EqualFunc(was.GetEnvs(), now.GetEnvs(), func(a, b *runtimeapi.KeyValue) bool { return proto.Equal(a, b) })},
		{"stdin", was.GetStdin() == now.GetStdin()},
		{"tty", was.GetTty() == now.GetTty()},
		{"linux.security_context: the process' user", proto.Equal(credentials(was.ContainerConfig), credentials(now))},
	} {
		if !field.same {
			return fmt.Errorf("%s differs from the checkpoint's: %w", field.name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// credentials are the fields of a configuration that say who its process is.
func credentials(config *runtimeapi.ContainerConfig) *runtimeapi.LinuxContainerSecurityContext {
	c := config.GetLinux().GetSecurityContext()
	return &runtimeapi.LinuxContainerSecurityContext{
		RunAsUser: c.GetRunAsUser(), RunAsGroup: c.GetRunAsGroup(), RunAsUsername: c.GetRunAsUsername(),
		SupplementalGroups: c.GetSupplementalGroups(), SupplementalGroupsPolicy: c.GetSupplementalGroupsPolicy(),
		Privileged: c.GetPrivileged(), NoNewPrivs: c.GetNoNewPrivs(),
	}
}
