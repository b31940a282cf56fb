package abuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

const (
	clients  = 4                // that send requests at the same time
	patience = 20 * time.Second // with one request
)

// TestRandomRequests sends every RPC of the CRI requests made at random from its
// descriptor: mostly sensible values with nonsense among them, so that they come
// deep enough. No request may panic, hang or end the daemon, and what they make
// can be removed like anything else. The requests are those of SAMPAN_ABUSE_SEED,
// which `make abuse` takes anew each time, though not their interleaving;
// SAMPAN_ABUSE_REQUESTS is how many.
func TestRandomRequests(t *testing.T) {
	l := lab.New(t, lab.Options{})
	seed := uint64(amount(t, "SAMPAN_ABUSE_SEED", 1))
	requests := amount(t, "SAMPAN_ABUSE_REQUESTS", 1500)
	t.Logf("SAMPAN_ABUSE_SEED=%d SAMPAN_ABUSE_REQUESTS=%d", seed, requests)
	conn, err := grpc.NewClient("unix://"+l.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	g := newGenerator(t, l)
	// A pod's cgroup is the client's to remove, whoever made it.
	l.Foreign = regexp.MustCompile(`^cgroup .*/(random|relative|a\.slice|kubepods-burstable\.slice)(/|$)`)
	tallies := map[protoreflect.Name]*tally{}
	for _, m := range methods {
		tallies[m.Name()] = &tally{}
	}
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(c)))
			for range requests / clients {
				method := pick(r, methods...)
				request := g.request(r, method.Input())
				err := call(t.Context(), conn, method, request, g)
				tallies[method.Name()].count(err)
				switch status.Code(err) {
				case codes.Internal, codes.Unknown, codes.DeadlineExceeded, codes.Unimplemented:
					if !excused(method, err) {
						t.Errorf("%s: %v\n%s", method.Name(), err, prototext.Format(request))
					}
				}
				if status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "transport") {
					t.Errorf("%s: the daemon went away: %v", method.Name(), err)
					return
				}
			}
		})
	}
	wg.Wait()
	for name, tally := range tallies {
		t.Logf("%s: %v", name, tally)
		if often[name] >= 6 && tally.by[codes.OK].Load() == 0 {
			t.Errorf("%s was never served: the requests are too bad to test much", name)
		}
	}
	// A kubelet goes on as if nothing had been.
	image := l.Pull(t, "busybox")
	config := l.PodConfig("afterwards")
	pod := l.RunPod(t, config)
	id := l.CreateContainer(t, pod, config, l.ContainerConfig("box", image, "sleep", "1000"))
	l.StartContainer(t, id)
	if out := l.ExecSync(t, id, "echo", "alive"); string(out.GetStdout()) != "alive\n" {
		t.Errorf("exec afterwards: %v", out)
	}
}

// excused are the answers that are right all the same.
func excused(m protoreflect.MethodDescriptor, err error) bool {
	switch m.Name() {
	case "CreateContainer": // the OCI runtime's words about a program or directory, which have no class
		return strings.Contains(err.Error(), "during container init")
	case "ExecSync": // its timeout
		return status.Code(err) == codes.DeadlineExceeded
	case "CheckpointContainer", "CheckpointPod", "RestorePod": // without CRIU
		return status.Code(err) == codes.Unimplemented || status.Code(err) == codes.DeadlineExceeded
	}
	return false
}

// often are the RPCs that make something, without which the others find nothing.
var often = map[protoreflect.Name]int{"RunPodSandbox": 6, "CreateContainer": 20, "StartContainer": 10, "ExecSync": 4, "PullImage": 3, "StopContainer": 2}

// methods are the RPCs of both services, but the one whose answer never ends;
// those to be called often are there often.
var methods = func() (all []protoreflect.MethodDescriptor) {
	services := runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			if m := services.Get(i).Methods().Get(j); m.Name() != "GetContainerEvents" {
				all = append(all, slices.Repeat([]protoreflect.MethodDescriptor{m}, max(1, often[m.Name()]))...)
			}
		}
	}
	return all
}()

// call sends a request and reads the answer, of which the generator learns ids.
func call(ctx context.Context, conn *grpc.ClientConn, m protoreflect.MethodDescriptor, request proto.Message, g *generator) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	name := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
	answer := dynamicpb.NewMessage(m.Output())
	if !m.IsStreamingServer() {
		err := conn.Invoke(ctx, name, request, answer)
		if err == nil {
			g.learn(answer)
		}
		return err
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, name)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(request); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	for {
		if err := stream.RecvMsg(answer); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// tally counts answers by code.
type tally struct{ by [17]atomic.Int64 }

func (t *tally) count(err error) { t.by[status.Code(err)].Add(1) }

func (t *tally) String() string {
	var parts []string
	for code := range t.by {
		if n := t.by[code].Load(); n > 0 {
			parts = append(parts, fmt.Sprint(codes.Code(code), " ", n))
		}
	}
	return strings.Join(parts, ", ")
}

// generator makes requests. It knows which words mean something where.
type generator struct {
	words map[string][]string // by the name of the field, the best first
	mu    sync.Mutex
	ids   map[string][]string // seen in answers: "pod_sandbox_id", "container_id"
}

func newGenerator(t *testing.T, l *lab.Lab) *generator {
	t.Helper()
	l.Pull(t, "busybox")
	volume := filepath.Join(l.Dir, "volume")
	if err := os.MkdirAll(filepath.Join(volume, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	logs := l.Logs()
	return &generator{ids: map[string][]string{}, words: map[string][]string{
		"name":                 {"a", "b", "c", "net.ipv4.ip_unprivileged_port_start"},
		"namespace":            {"x", "y"},
		"uid":                  {"u", "v"},
		"image":                {"busybox", "busybox:latest", "busybox@sha256:00", "localhost:1/none", "UPPER/case", "quay.io/sampan/variants"},
		"log_directory":        {logs, filepath.Join(logs, "deep", "er"), "relative"},
		"log_path":             {"c.log", "deep/c.log", "../../escape.log", "/absolute.log"},
		"host_path":            {volume, filepath.Join(volume, "sub"), filepath.Join(volume, "absent"), "relative"},
		"container_path":       {"/data", "/data/deep/er", "relative", "/", "/proc", "/proc/self", "/sys/fs", "/dev", "/dev/null", "/../../x"},
		"location":             {filepath.Join(l.Dir, "checkpoint.tar"), "relative"},
		"output_path":          {filepath.Join(l.Dir, "checkpoint"), "relative"},
		"checkpoint_path":      {filepath.Join(l.Dir, "checkpoint"), "relative"},
		"cgroup_parent":        {"/random", "/random/deep", "relative", "/a.slice", "../..", "kubepods-burstable.slice"},
		"working_dir":          {"/", "/tmp", "/made/anew", "relative", "/proc/self/fd/7", "/../.."},
		"command":              {"sleep", "sh", "/bin/true", "/bin/none", "/etc", ""},
		"args":                 {"1000", "-c", "exit 3", ""},
		"cmd":                  {"true", "/bin/none", "cat", "ls"},
		"run_as_username":      {"root", "nobody", "no-such-user", "1000", "-1", "99999999999"},
		"runtime_handler":      {"", "", "", "builtin", "none"},
		"hostname":             {"host", "with.dots", "new\nline", strings.Repeat("h", 70)},
		"host_ip":              {"", "127.0.0.1", "::1", "1.2.3", "0.0.0.0"},
		"pod_cidr":             {"10.88.4.0/24", "10.88.0.0/16", "nonsense", "fd00::/64"},
		"cpuset_cpus":          {"0", "0-1", "99", "a", "1-0"},
		"cpuset_mems":          {"0", "7"},
		"page_size":            {"2MB", "1GB", "3XB"},
		"level":                {"s0", "s0:c1,c2", "nonsense"},
		"add_capabilities":     {"NET_ADMIN", "ALL", "CAP_CHOWN", "no_such", ""},
		"drop_capabilities":    {"NET_RAW", "ALL", "no_such"},
		"localhost_ref":        {"", "/none.json", "relative", "localhost//none"},
		"seccomp_profile_path": {"", "runtime/default", "unconfined", "localhost//none", "other"},
		"apparmor_profile":     {"", "unconfined", "runtime/default", "localhost/none", "other"},
		"servers":              {"10.0.0.10", "fd00::1", "no address"},
		"unified":              {"memory.high", "../x", ""},
		"image_sub_path":       {"", "etc", "../..", "/etc"},
		"masked_paths":         {"/proc/kcore", "relative", "/none", "/etc/../proc/keys"},
		"readonly_paths":       {"/proc/sys", "relative", "/none"},
		"target_id":            {"none"},
		"mount_options":        {"noexec", "ro", "nosuid", "bind", "size=1"},
	}}
}

// nonsense goes anywhere a string does.
var nonsense = []string{"", " ", "\x00", "\n", "\xff\xfe", "../../../../etc", "%s%n", "/", ".", "..", "-", "🚢", strings.Repeat("x", 300), strings.Repeat("y/", 3000)}

// learn keeps the ids of an answer for later requests.
func (g *generator) learn(answer *dynamicpb.Message) {
	for _, name := range []string{"pod_sandbox_id", "container_id"} {
		f := answer.Descriptor().Fields().ByName(protoreflect.Name(name))
		if f == nil || f.Kind() != protoreflect.StringKind || f.IsList() {
			continue
		}
		id := answer.Get(f).String()
		g.mu.Lock()
		g.ids[name] = append(slices.DeleteFunc(g.ids[name], func(other string) bool { return other == id }), id)
		g.mu.Unlock()
	}
}

// known returns an id that an answer had, a recent one more often than not.
func (g *generator) known(r *rand.Rand, name string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	ids := g.ids[name]
	if len(ids) == 0 {
		return "none"
	}
	return ids[max(0, len(ids)-1-r.IntN(6))]
}

func (g *generator) request(r *rand.Rand, d protoreflect.MessageDescriptor) *dynamicpb.Message {
	m := dynamicpb.NewMessage(d)
	g.fill(r, m, 0)
	return m
}

// maxDepth of messages in messages.
const maxDepth = 8

// needed are fields without which nearly nothing is served.
var needed = []protoreflect.Name{"config", "metadata", "sandbox_config", "image", "name", "uid", "namespace", "pod_sandbox_id", "container_id", "log_directory", "cmd", "command", "args"}

// fill sets fields at random: those that are needed nearly always, others seldom.
func (g *generator) fill(r *rand.Rand, m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		chance := 0.06
		switch {
		case slices.Contains(needed, f.Name()):
			chance = 0.97
		case f.Name() == "linux" || f.Name() == "security_context":
			chance = 0.6
		}
		if r.Float64() >= chance || depth >= maxDepth {
			continue
		}
		switch {
		case f.IsMap():
			entries := m.Mutable(f).Map()
			for range r.IntN(3) {
				entries.Set(g.scalar(r, f.MapKey()).MapKey(), g.value(r, f.MapValue(), entries.NewValue, depth))
			}
		case f.IsList():
			list := m.Mutable(f).List()
			for range 1 + r.IntN(2) {
				list.Append(g.value(r, f, list.NewElement, depth))
			}
		default:
			m.Set(f, g.value(r, f, func() protoreflect.Value { return m.NewField(f) }, depth))
		}
	}
}

func (g *generator) value(r *rand.Rand, f protoreflect.FieldDescriptor, make func() protoreflect.Value, depth int) protoreflect.Value {
	if f.Kind() != protoreflect.MessageKind {
		return g.scalar(r, f)
	}
	v := make()
	g.fill(r, v.Message(), depth+1)
	return v
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

func (g *generator) scalar(r *rand.Rand, f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(r.IntN(4) == 0)
	case protoreflect.EnumKind:
		n := protoreflect.EnumNumber(r.IntN(f.Enum().Values().Len()))
		return protoreflect.ValueOfEnum(pick(r, n, n, n, n, n, n, n, n, n, 77, -1))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(pick[int32](r, 0, 1, 2, 80, 8080, -1, math.MaxInt32, math.MinInt32))
	case protoreflect.Int64Kind:
		// Seconds among others, hence no large ones that are not too large.
		return protoreflect.ValueOfInt64(pick[int64](r, 0, 1, 1, 2, 1000, 100000, -1, math.MinInt64, math.MaxInt64))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(pick[uint32](r, 0, 1, 65536, math.MaxUint32))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(pick[uint64](r, 0, 1, 1<<20, math.MaxUint64))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(pick(r, 0, 1, -1, math.NaN(), math.Inf(1)))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(g.text(r, string(f.Name()))))
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(strings.ToValidUTF8(g.text(r, string(f.Name())), "?"))
	}
	panic(fmt.Sprintf("field %s: no values for kind %s", f.FullName(), f.Kind()))
}

func (g *generator) text(r *rand.Rand, field string) string {
	words := g.words[field]
	switch {
	case r.IntN(80) == 0:
		return pick(r, nonsense...)
	case field == "pod_sandbox_id" || field == "container_id":
		return g.known(r, field)
	case field == "id" || field == "target_id":
		return g.known(r, pick(r, "pod_sandbox_id", "container_id"))
	case len(words) > 0 && r.IntN(3) > 0:
		return words[0]
	case len(words) > 0:
		return pick(r, words...)
	}
	return pick(r, "a", "b", "word")
}
