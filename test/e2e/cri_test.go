package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sampan.dev/sampan/test/lab"
)

// criDoc is what docs/CRI.md says.
type criDoc struct {
	rpcs   map[string]rpcRow
	fields map[string]string // text, by "Message.field"; "Message.*" for all
}

type rpcRow struct {
	v1alpha2 bool
	text     string
}

func (r rpcRow) open() bool { return strings.HasPrefix(r.text, "open") }

// readDoc reads the tables. A row that is there twice is an error.
func readDoc(t *testing.T) criDoc {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "CRI.md"))
	if err != nil {
		t.Fatal(err)
	}
	doc := criDoc{make(map[string]rpcRow), make(map[string]string)}
	inFields := false
	for line := range strings.Lines(string(text)) {
		inFields = inFields || strings.HasPrefix(line, "## Fields")
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		name := strings.TrimSpace(cells[0])
		if len(cells) != 3 || !strings.HasPrefix(name, "`") {
			continue
		}
		name, second, last := strings.Trim(name, "`"), strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])
		if !inFields {
			if _, twice := doc.rpcs[name]; twice {
				t.Errorf("docs/CRI.md has %s twice", name)
			}
			doc.rpcs[name] = rpcRow{second == "yes", last}
			continue
		}
		for field := range strings.SplitSeq(second, ",") {
			key := name + "." + strings.Trim(strings.TrimSpace(field), "`")
			if field == "all" {
				key = name + ".*"
			}
			if _, twice := doc.fields[key]; twice {
				t.Errorf("docs/CRI.md has %s twice", key)
			}
			doc.fields[key] = last
		}
	}
	return doc
}

// methods are all RPCs of both services.
func methods() []protoreflect.MethodDescriptor {
	var all []protoreflect.MethodDescriptor
	services := runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			all = append(all, services.Get(i).Methods().Get(j))
		}
	}
	return all
}

// messages adds a message and all that are in it.
func messages(all map[protoreflect.Name]protoreflect.MessageDescriptor, m protoreflect.MessageDescriptor) {
	if m.IsMapEntry() || all[m.Name()] != nil {
		return
	}
	all[m.Name()] = m
	for i := range m.Fields().Len() {
		if below := m.Fields().Get(i).Message(); below != nil {
			messages(all, below)
		}
	}
}

// TestCRIDocumented compares docs/CRI.md with the interface: every RPC and every
// field has a row, and there are no others.
func TestCRIDocumented(t *testing.T) {
	doc := readDoc(t)
	all := make(map[protoreflect.Name]protoreflect.MessageDescriptor)
	for _, m := range methods() {
		if _, ok := doc.rpcs[string(m.Name())]; !ok {
			t.Errorf("docs/CRI.md has no row for the RPC %s", m.Name())
		}
		delete(doc.rpcs, string(m.Name()))
		messages(all, m.Input())
		messages(all, m.Output())
	}
	for rpc := range doc.rpcs {
		t.Errorf("docs/CRI.md has a row for %s, which is no RPC", rpc)
	}
	for name, m := range all {
		whole := string(name) + ".*"
		_, skipped := doc.fields[whole]
		delete(doc.fields, whole)
		for i := range m.Fields().Len() {
			key := string(name) + "." + string(m.Fields().Get(i).Name())
			if _, ok := doc.fields[key]; !ok && !skipped {
				t.Errorf("docs/CRI.md has no row for the field %s", key)
			}
			delete(doc.fields, key)
		}
	}
	for field := range doc.fields {
		t.Errorf("docs/CRI.md has a row for %s, which is no field", field)
	}
}

// TestCRIFieldsRead looks in the source for a reader of each request field that
// docs/CRI.md says is used.
func TestCRIFieldsRead(t *testing.T) {
	doc, source := readDoc(t), sources(t)
	all := make(map[protoreflect.Name]protoreflect.MessageDescriptor)
	for _, m := range methods() {
		messages(all, m.Input())
	}
	for name, m := range all {
		for i := range m.Fields().Len() {
			field := m.Fields().Get(i)
			text, ok := doc.fields[string(name)+"."+string(field.Name())]
			unused := strings.HasPrefix(text, "open") || strings.HasPrefix(text, "ignored")
			read := regexp.MustCompile(`\.(Get)?` + goName(field) + `\b`)
			if ok && !unused && !read.MatchString(source) {
				t.Errorf("docs/CRI.md says that %s.%s is used, but nothing reads a %s", name, field.Name(), goName(field))
			}
		}
	}
}

// sources is the text of the daemon's packages.
func sources(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(filepath.Join("..", "..", "internal"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		all.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

var wordStart = regexp.MustCompile(`(^|_)[a-z]`)

// goName is a field's name in Go.
func goName(f protoreflect.FieldDescriptor) string {
	return wordStart.ReplaceAllStringFunc(string(f.Name()), func(s string) string {
		return strings.ToUpper(strings.TrimPrefix(s, "_"))
	})
}

// TestCRIAnswered calls every RPC with nothing in the request. Those that docs/CRI.md
// calls open are Unimplemented, and no others; v1alpha2 has what it says.
func TestCRIAnswered(t *testing.T) {
	l := lab.New(t, lab.Options{})
	conn, err := grpc.NewClient("unix://"+l.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	doc := readDoc(t)
	for _, m := range methods() {
		row := doc.rpcs[string(m.Name())]
		for version, there := range map[string]bool{"v1": !row.open(), "v1alpha2": row.v1alpha2 && !row.open()} {
			name := fmt.Sprintf("/runtime.%s.%s/%s", version, m.Parent().Name(), m.Name())
			err := call(t, conn, name, m)
			code := status.Code(err)
			if there != (code != codes.Unimplemented) || code == codes.Internal {
				t.Errorf("%s: %v; docs/CRI.md says %q", name, err, row.text)
			}
		}
	}
}

// call calls an RPC, of a stream until the first answer.
func call(t *testing.T, conn *grpc.ClientConn, name string, m protoreflect.MethodDescriptor) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if m.Name() == "GetContainerEvents" { // nothing happens, so nothing will come
		ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
	}
	in, out := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	if !m.IsStreamingServer() {
		return conn.Invoke(ctx, name, in, out)
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, name)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(in); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(out)
}
