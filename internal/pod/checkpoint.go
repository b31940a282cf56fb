package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/internal/checkpoint"
	"sampan.dev/sampan/internal/host"
	"sampan.dev/sampan/internal/keeper"
	"sampan.dev/sampan/internal/layer"
	"sampan.dev/sampan/internal/spec"
	"sampan.dev/sampan/internal/state"
)

// A checkpoint is made in a directory, by the keeper (the processes) and by the
// daemon (all the rest), while the containers are paused. Nothing of one that
// fails, or was cut off, stays.

// criuOptions is the annotation that names the file by which the keeper gives CRIU
// its options. No client has a say in it: CRIU's options can run programs.
const criuOptions = "org.criu.config"

// checkpointRecord tells what a checkpoint that is being made has outside of its
// own directory.
type checkpointRecord struct {
	Paths []string `json:"paths"`
}

// workDir makes a directory for a checkpoint that is being made or read; paths are
// what will be made besides. Discard removes all of it.
func (s *Pods) workDir(paths ...string) (dir string, err error) {
	dir = filepath.Join(s.paths.checkpoints(), newID())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	if err := state.Write(filepath.Join(dir, "record"), checkpointKind, checkpointRecord{paths}, state.Volatile); err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	return dir, nil
}

// abandon removes a checkpoint's directory and what was made besides.
func (s *Pods) abandon(dir string) error {
	var r checkpointRecord
	err := s.read(filepath.Join(dir, "record"), checkpointKind, &r)
	if errors.Is(err, state.ErrVersion) {
		return err
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("leftover of a checkpoint cannot be told", "path", dir, "err", err)
	}
	var errs []error
	for _, path := range r.Paths {
		errs = append(errs, os.RemoveAll(path))
	}
	return errors.Join(append(errs, s.removeStateDir(dir))...)
}

// sweepCheckpoints abandons what an earlier process was at.
func (s *Pods) sweepCheckpoints() {
	entries, err := os.ReadDir(s.paths.checkpoints())
	if err != nil {
		s.log.Warn("read checkpoints", "err", err)
	}
	for _, e := range entries {
		if err := s.abandon(filepath.Join(s.paths.checkpoints(), e.Name())); err != nil {
			s.log.Warn("checkpoint that was cut off stays until the next start", "err", err)
		}
	}
}

// CheckpointContainer writes a checkpoint of a running container into an archive at
// location, an absolute path, which is replaced if it is there. The container is
// paused for a moment and then goes on. A timeout of 0 is the context's.
func (s *Pods) CheckpointContainer(ctx context.Context, id, location string, timeout time.Duration) error {
	if !filepath.IsAbs(location) || filepath.Clean(location) != location {
		return fmt.Errorf("location: %q is not the absolute path of a file: %w", location, errdefs.ErrInvalidArgument)
	}
	c, err := s.container(id)
	if err != nil {
		return err
	}
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	_, err = s.checkpoints.Do(ctx, strings.Join([]string{"container", c.ID, location}, "\x00"), func(ctx context.Context) (restored, error) {
		return restored{}, s.checkpointContainer(ctx, c, location)
	})
	if err != nil {
		return fmt.Errorf("checkpoint %v: %w", c, err)
	}
	return nil
}

func (s *Pods) checkpointContainer(ctx context.Context, c *Container, location string) (err error) {
	p, err := s.pod(c.PodID)
	if err != nil {
		return err
	}
	criu, err := s.dumpable(ctx, p, c)
	if err != nil {
		return err
	}
	partial := location + ".partial-" + newID()[:8]
	work, err := s.workDir(partial)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.abandon(work)) }()
	dir := filepath.Join(work, "container")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := s.dump(ctx, p, criu, map[*Container]string{c: dir}); err != nil {
		return err
	}
	return archive(ctx, dir, partial, location)
}

// archive packs a checkpoint into a file that appears at once, and whole.
func archive(ctx context.Context, dir, partial, location string) error {
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600) // it has the memory of processes
	if err != nil {
		return fmt.Errorf("location: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := errors.Join(checkpoint.Pack(ctx, dir, f), f.Sync(), f.Close()); err != nil {
		return noRoom(err)
	}
	return os.Rename(partial, location)
}

// noRoom gives the error of a full disk its class.
func noRoom(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// dumpable returns the program that checkpoints can be made with, if one can be made
// of this container.
func (s *Pods) dumpable(ctx context.Context, p *Pod, c *Container) (host.Program, error) {
	if st := c.Status().State; st != Running {
		return host.Program{}, fmt.Errorf("it is %v, not running: %w", st, errdefs.ErrFailedPrecondition)
	}
	return s.criuFor(ctx, p)
}

// Checkpoints returns the program that checkpoints are made with, or why none can be
// made on this host. It is tried out when somebody asks, and again if it is another.
func (s *Pods) Checkpoints(ctx context.Context) (host.Program, error) { return s.cfg.CRIU(ctx) }

func (s *Pods) criuFor(ctx context.Context, p *Pod) (host.Program, error) {
	if spec.NamespacesOf(p.Config.PodSandboxConfig).User {
		return host.Program{}, fmt.Errorf("%v has a user namespace, and CRIU cannot put processes into one that is there already: %w", p, errdefs.ErrNotImplemented)
	}
	return s.cfg.CRIU(ctx)
}

// dump writes checkpoints of containers of one pod, all of the same moment, into
// their directories.
func (s *Pods) dump(ctx context.Context, p *Pod, criu host.Program, dirs map[*Container]string) error {
	k, err := s.keeper(ctx, p)
	if err != nil {
		return err
	}
	r := keeper.CheckpointRequest{CRIU: criu.Path}
	for c, dir := range dirs {
		r.Targets = append(r.Targets, keeper.CheckpointTarget{ID: c.ID, Dir: dir})
	}
	return k.Checkpoint(ctx, r, func(ctx context.Context) error {
		for c, dir := range dirs {
			if err := s.writeDown(ctx, p, c, dir); err != nil {
				return noRoom(err)
			}
		}
		return nil
	})
}

// writeDown adds to a checkpoint of the container's processes all else that there is
// to know of it, and its files.
func (s *Pods) writeDown(ctx context.Context, p *Pod, c *Container, dir string) error {
	image, err := s.cfg.Images.Acquire(c.ImageID, c.ID)
	if err != nil {
		return err
	}
	oci, err := readBundle(s.paths.bundle(c.ID))
	if err != nil {
		return err
	}
	st := c.Status()
	annotations, err := json.Marshal(st.Config.GetAnnotations())
	if err != nil {
		return err
	}
	oci.Annotations["io.kubernetes.cri-o.Annotations"] = string(annotations) // CRI-O wants to see it
	config := checkpoint.Config{
		ID: c.ID, Name: st.Config.GetMetadata().GetName(), OCIRuntime: p.Runtime,
		RootfsImage: imageName(st.Config.ContainerConfig), RootfsImageRef: c.ImageID,
		CreatedTime: c.CreatedAt, CheckpointedAt: time.Now(), Restored: c.Checkpoint != "",
	}
	if c.ImageDigest != "" {
		config.RootfsImageRef = c.ImageDigest
	}
	if len(image.RepoTags) > 0 {
		config.RootfsImageName = image.RepoTags[0]
	}
	files := map[string]any{
		checkpoint.ConfigName: config, checkpoint.SpecName: oci, checkpoint.StatusName: statusDump(st),
		checkpoint.RequestName: st.Config, checkpoint.MountsName: bindMounts(oci),
	}
	for name, content := range files {
		if err := checkpoint.WriteJSON(dir, name, content); err != nil {
			return err
		}
	}
	return s.saveFiles(ctx, p, c, image, dir)
}

func readBundle(dir string) (*specs.Spec, error) {
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		return nil, err
	}
	oci := new(specs.Spec)
	if err := json.Unmarshal(data, oci); err != nil {
		return nil, err
	}
	if oci.Annotations == nil {
		oci.Annotations = make(map[string]string)
	}
	return oci, nil
}

// statusDump is the container's status as other runtimes look for it.
func statusDump(st ContainerStatus) *runtimeapi.ContainerStatus {
	return &runtimeapi.ContainerStatus{
		Id: st.ID, Metadata: st.Config.GetMetadata(), State: runtimeapi.ContainerState_CONTAINER_RUNNING,
		CreatedAt: st.CreatedAt.UnixNano(), StartedAt: st.StartedAt.UnixNano(),
		Image: st.Config.GetImage(), ImageRef: st.ImageID, ImageId: st.ImageID,
		Labels: st.Config.GetLabels(), Annotations: st.Config.GetAnnotations(), Mounts: st.Config.GetMounts(), LogPath: st.Config.GetLogPath(),
	}
}

// bindMounts lists what a restore needs sources for.
func bindMounts(oci *specs.Spec) []checkpoint.BindMount {
	var mounts []checkpoint.BindMount
	for _, m := range oci.Mounts {
		info, err := os.Stat(m.Source)
		if m.Type != "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") || err != nil {
			continue
		}
		kind := "file"
		if info.IsDir() {
			kind = "directory"
		}
		mounts = append(mounts, checkpoint.BindMount{Source: m.Source, Destination: m.Destination, FileType: kind, Permissions: uint32(info.Mode().Perm())})
	}
	return mounts
}

// saveFiles adds to a checkpoint the files that the container alone has: what it has
// written to its root file system, the volumes of its image, and the pod's /dev/shm.
func (s *Pods) saveFiles(ctx context.Context, p *Pod, c *Container, image Image, dir string) error {
	var deleted []string
	err := writeFile(filepath.Join(dir, checkpoint.DiffName), func(w io.Writer) (err error) {
		deleted, err = s.cfg.Layers.Diff(ctx, image.Layers, filepath.Join(s.paths.container(c.ID), "upper"), w)
		return err
	})
	if err != nil {
		return err
	}
	if err := checkpoint.WriteJSON(dir, checkpoint.DeletedName, deleted); err != nil {
		return err
	}
	for i := range spec.ImageVolumes(c.Config.ContainerConfig, image.Config) {
		if err := pack(ctx, s.imageVolume(c, i), filepath.Join(dir, checkpoint.VolumeName(i))); err != nil {
			return err
		}
	}
	if !spec.NamespacesOf(p.Config.PodSandboxConfig).IPC {
		return nil // the host's /dev/shm is not the pod's
	}
	return pack(ctx, s.shm(p), filepath.Join(dir, checkpoint.DevShmName))
}

// imageVolume is the directory of the VOLUME with this number.
func (s *Pods) imageVolume(c *Container, i int) string {
	return filepath.Join(s.paths.container(c.ID), "volumes", strconv.Itoa(i))
}

func pack(ctx context.Context, dir, path string) error {
	return writeFile(path, func(w io.Writer) error { return layer.Pack(ctx, dir, w) })
}

func writeFile(path string, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// CheckpointPod writes checkpoints of running containers of a pod, all of the same
// moment, into a directory that exists and is empty. All of them go on when it
// returns.
func (s *Pods) CheckpointPod(ctx context.Context, podID, output string, ids []string, options map[string]string) error {
	if err := noOptions(options); err != nil {
		return err
	}
	p, err := s.pod(podID)
	if err != nil {
		return err
	}
	containers, err := s.selected(p, ids)
	if err != nil {
		return err
	}
	if err := emptyDirectory(output); err != nil {
		return err
	}
	_, err = s.checkpoints.Do(ctx, strings.Join([]string{"pod", p.ID, output}, "\x00"), func(ctx context.Context) (restored, error) {
		return restored{}, s.checkpointPod(ctx, p, containers, output)
	})
	if err != nil {
		return fmt.Errorf("checkpoint %v: %w", p, err)
	}
	return nil
}

// noOptions refuses options: there is none that this runtime knows.
func noOptions(options map[string]string) error {
	for key := range options {
		return fmt.Errorf("options: there is no option %q: %w", key, errdefs.ErrInvalidArgument)
	}
	return nil
}

// selected returns the containers with these ids, which are the pod's, and running.
func (s *Pods) selected(p *Pod, ids []string) ([]*Container, error) {
	if len(ids) == 0 {
		return nil, fmt.Errorf("container_ids: it is empty; name the running containers to checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	if !p.Status().Ready {
		return nil, fmt.Errorf("%v is not ready: %w", p, errdefs.ErrFailedPrecondition)
	}
	var all []*Container
	for i, id := range ids {
		c, err := s.container(id)
		field := fmt.Sprintf("container_ids[%d]", i)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %w", field, err)
		case c.PodID != p.ID:
			return nil, fmt.Errorf("%s: %v is not in %v: %w", field, c, p, errdefs.ErrInvalidArgument)
		case slices.Contains(all, c):
			return nil, fmt.Errorf("%s: %v is there twice: %w", field, c, errdefs.ErrInvalidArgument)
		case c.Status().State != Running:
			return nil, fmt.Errorf("%s: %v is %v, not running: %w", field, c, c.Status().State, errdefs.ErrFailedPrecondition)
		}
		all = append(all, c)
	}
	return all, nil
}

func emptyDirectory(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("output_path: %q is not an absolute path: %w", path, errdefs.ErrInvalidArgument)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return fmt.Errorf("output_path: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(entries) > 0 {
		return fmt.Errorf("output_path: %s is not empty: %w", path, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Pods) checkpointPod(ctx context.Context, p *Pod, containers []*Container, output string) (err error) {
	criu, err := s.criuFor(ctx, p)
	if err != nil {
		return err
	}
	options := checkpoint.PodOptions{Version: checkpoint.PodOptionsVersion, Handler: p.Runtime, Containers: make(map[string]string)}
	paths := []string{filepath.Join(output, checkpoint.PodOptionsName), filepath.Join(output, checkpoint.PodName)}
	dirs := make(map[*Container]string)
	for _, c := range containers {
		name := c.Config.GetMetadata().GetName()
		if options.Containers[name] != "" {
			return fmt.Errorf("two containers are called %q: %w", name, errdefs.ErrFailedPrecondition)
		}
		options.Containers[name], dirs[c] = c.ID, filepath.Join(output, c.ID)
		paths = append(paths, dirs[c])
	}
	work, err := s.workDir(paths...)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err == nil {
			err = os.Mkdir(dir, 0o700)
		}
	}
	if err == nil {
		err = s.dump(ctx, p, criu, dirs)
	}
	if err == nil {
		err = checkpoint.WriteJSON(output, checkpoint.PodName, p.Config)
	}
	if err == nil {
		err = checkpoint.WriteJSON(output, checkpoint.PodOptionsName, options) // the last: now it is one
	}
	if err != nil {
		return errors.Join(noRoom(err), s.abandon(work))
	}
	return os.RemoveAll(work)
}

// containerDir is how the directory of a container in a pod's checkpoint is called.
var containerDir = regexp.MustCompile(`^[0-9a-f]{64}$`)
