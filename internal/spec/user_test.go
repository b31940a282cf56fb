package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func id64(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

func TestResolveUser(t *testing.T) {
	type context = runtimeapi.LinuxContainerSecurityContext
	for _, tt := range []struct {
		name  string
		sc    *context
		image string
		want  identity
		err   string // part of the error, "" for none
	}{
		{name: "nothing asked for is root with its groups", want: identity{0, 0, []uint32{0, 4, 10}, "/root"}},
		{name: "image name", image: "web", want: identity{1000, 1000, []uint32{1000, 4, 50000}, "/home/web"}},
		{name: "image uid", image: "1000", want: identity{1000, 1000, []uint32{1000, 4, 50000}, "/home/web"}},
		{name: "image uid without entry", image: "4711", want: identity{4711, 0, []uint32{0}, "/"}},
		{name: "image uid:gid", image: "4711:4712", want: identity{4711, 4712, []uint32{4712}, "/"}},
		{name: "image name:group", image: "daemon:adm", want: identity{1, 4, []uint32{4, 50000}, "/usr/sbin"}},
		{name: "image name and empty group", image: "web:", want: identity{1000, 1000, []uint32{1000, 4, 50000}, "/home/web"}},
		{name: "image group alone", image: ":adm", want: identity{0, 4, []uint32{4, 10}, "/root"}},
		{name: "home defaults to root", image: "homeless", want: identity{1001, 1001, []uint32{1001}, "/"}},
		{name: "image name unknown", image: "nobody", err: `image.User: "nobody": the image's /etc/passwd has no such user`},
		{name: "image group unknown", image: "web:nogroup", err: `image.User: "nogroup": the image's /etc/group has no such group`},
		{name: "image uid out of range", image: "2147483648", err: "between 0 and 2147483647"},
		{name: "image uid that wraps to root", image: "4294967296", err: "between 0 and 2147483647"},
		{name: "image uid beyond all numbers", image: "18446744073709551616", err: "no such user"},
		{name: "image uid negative", image: "-1", err: "between 0 and 2147483647"},
		{name: "image gid negative", image: "1:-1", err: "between 0 and 2147483647"},
		{name: "a broken line of passwd is no user", image: "broken", err: "no such user"},

		{name: "run_as_user overrides", sc: &context{RunAsUser: id64(1)}, image: "web", want: identity{1, 1, []uint32{1, 50000}, "/usr/sbin"}},
		{name: "run_as_user without entry", sc: &context{RunAsUser: id64(4711)}, want: identity{4711, 0, []uint32{0}, "/"}},
		{name: "run_as_user 0", sc: &context{RunAsUser: id64(0)}, image: "web", want: identity{0, 0, []uint32{0, 4, 10}, "/root"}},
		{name: "run_as_user and group", sc: &context{RunAsUser: id64(1000), RunAsGroup: id64(7)}, want: identity{1000, 7, []uint32{7, 4, 50000}, "/home/web"}},
		{name: "run_as_username", sc: &context{RunAsUsername: "web"}, want: identity{1000, 1000, []uint32{1000, 4, 50000}, "/home/web"}},
		{name: "run_as_username and group", sc: &context{RunAsUsername: "web", RunAsGroup: id64(0)}, want: identity{1000, 0, []uint32{0, 4, 50000}, "/home/web"}},
		{name: "run_as_username has to exist", sc: &context{RunAsUsername: "ghost"}, err: `linux.security_context.run_as_username: "ghost"`},
		{name: "run_as_username is a name", sc: &context{RunAsUsername: "1000"}, err: "no such user"},

		{name: "the kubelet repeats the image's uid", sc: &context{RunAsUser: id64(4711)}, image: "4711:4712", want: identity{4711, 4712, []uint32{4712}, "/"}},
		{name: "the kubelet repeats the image's name", sc: &context{RunAsUsername: "web"}, image: "web:adm", want: identity{1000, 4, []uint32{4, 50000}, "/home/web"}},
		{name: "the image's group is its user's", sc: &context{RunAsUser: id64(1)}, image: "web:adm", want: identity{1, 1, []uint32{1, 50000}, "/usr/sbin"}},
		{name: "run_as_group overrides the image's", sc: &context{RunAsUser: id64(1000), RunAsGroup: id64(9)}, image: "web:adm", want: identity{1000, 9, []uint32{9, 4, 50000}, "/home/web"}},

		{name: "supplemental groups are merged", sc: &context{RunAsUser: id64(1000), SupplementalGroups: []int64{1234, 4, 1234}}, want: identity{1000, 1000, []uint32{1000, 4, 50000, 1234}, "/home/web"}},
		{name: "strict leaves the image's out", sc: &context{RunAsUser: id64(1000), SupplementalGroups: []int64{1234}, SupplementalGroupsPolicy: runtimeapi.SupplementalGroupsPolicy_Strict}, want: identity{1000, 1000, []uint32{1000, 1234}, "/home/web"}},
		{name: "strict without groups", sc: &context{SupplementalGroupsPolicy: runtimeapi.SupplementalGroupsPolicy_Strict}, want: identity{0, 0, []uint32{0}, "/root"}},
		{name: "supplemental group out of range", sc: &context{SupplementalGroups: []int64{1 << 40}}, err: "linux.security_context.supplemental_groups"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := resolveUser(tt.sc, tt.image, []byte(testPasswd), []byte(testGroup))
			if tt.err != "" {
				wantError(t, err, errdefs.ErrInvalidArgument, tt.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(identity{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestResolveUserWithoutFiles(t *testing.T) {
	for _, image := range []string{"", "0", "0:0"} {
		got, err := resolveUser(nil, image, nil, nil)
		if err != nil || got.uid != 0 || got.home != "/" || !slices.Equal(got.groups, []uint32{0}) {
			t.Errorf("USER %q in an image without passwd: %+v, %v", image, got, err)
		}
	}
	_, err := resolveUser(nil, "root", nil, nil)
	wantError(t, err, errdefs.ErrInvalidArgument, "no such user")
}

func TestContainerUser(t *testing.T) {
	in := testInput()
	in.context().RunAsUser = id64(1000)
	in.context().SupplementalGroups = []int64{1234}
	got := ContainerUser(mustBuild(t, in)).Linux
	if got.Uid != 1000 || got.Gid != 1000 || !slices.Equal(got.SupplementalGroups, []int64{1000, 4, 50000, 1234}) {
		t.Errorf("ContainerUser = %v", got)
	}
}

func FuzzResolveUser(f *testing.F) {
	f.Add("web:adm", int64(-1), "", []byte(testPasswd), []byte(testGroup))
	f.Add("", int64(1000), "", []byte("a:x:1000:1000"), []byte("b:x:1:a"))
	f.Add("4294967296", int64(-1), "root", []byte("root::0:0:::\n\n::::"), []byte("::\n:"))
	f.Fuzz(func(t *testing.T, image string, uid int64, username string, passwd, group []byte) {
		sc := &runtimeapi.LinuxContainerSecurityContext{RunAsUsername: username}
		if uid >= 0 {
			sc.RunAsUser = id64(uid)
		}
		id, err := resolveUser(sc, image, passwd, group)
		if err != nil {
			return
		}
		if id.uid > maxID || id.gid > maxID || slices.Max(id.groups) > maxID {
			t.Errorf("an id is out of range: %+v", id)
		}
		if id.groups[0] != id.gid {
			t.Errorf("the groups %v do not begin with the primary one, %d", id.groups, id.gid)
		}
		// Who asks for an id gets that id, and nobody is root by accident.
		user, _, _ := strings.Cut(image, ":")
		switch {
		case uid >= 0 && int64(id.uid) != uid:
			t.Errorf("run_as_user %d became %d", uid, id.uid)
		case uid < 0 && username == "" && id.uid == 0 && user != "":
			_, isNumber := parseID(user)
			a, ok := findAccount(passwd, func(a account) bool { return a.name == user })
			if !isNumber && user != "+0" && user != "-0" && (!ok || a.uid != 0) {
				t.Errorf("USER %q became root", image)
			}
		}
	})
}
