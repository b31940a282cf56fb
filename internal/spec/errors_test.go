package spec

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// wantError checks that err is a FieldError of a kind, and that it says text.
func wantError(t *testing.T, err, kind error, text string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one that says %q", text)
	}
	var field *FieldError
	if !errors.As(err, &field) || field.Field == "" || field.Cause == "" {
		t.Errorf("%v is no complete FieldError", err)
	}
	if !errors.Is(err, kind) {
		t.Errorf("%v is not: %v", err, kind)
	}
	if !strings.Contains(err.Error(), text) {
		t.Errorf("the error is %q, want it to say %q", err, text)
	}
}

func TestFieldErrorText(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{invalid("a.b", "v\n", "it is bad", "use w"), `a.b: "v\n": it is bad; use w`},
		{invalid("a.b", nil, "it is required", ""), "a.b: it is required"},
		{invalid("a.b", int64(-1), "it is negative", ""), "a.b: -1: it is negative"},
		{invalid("a.b", runtimeapi.NamespaceMode_TARGET, "it is not possible", ""), "a.b: TARGET: it is not possible"},
		{invalid("a.b", strings.Repeat("x", 300), "it is long", ""), `a.b: "` + strings.Repeat("x", 256) + `": it is long`},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got  %q\nwant %q", got, tt.want)
		}
	}
	if err := impossible("a", nil, "b", ""); !errors.Is(err, errdefs.ErrFailedPrecondition) || errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("%v is of the wrong kind", err)
	}
}
