package spec

import (
	"bytes"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxID is the highest user or group id. The kernel knows more, but an id that
// is negative as an int32 has meant root to more than one program.
const maxID = math.MaxInt32

// identity is who a container's process runs as.
type identity struct {
	uid, gid uint32
	groups   []uint32 // gid first, then the others, each once
	home     string
}

// ContainerUser returns the identity of a spec's process, as a container's
// status reports it.
func ContainerUser(s *specs.Spec) *runtimeapi.ContainerUser {
	u := &runtimeapi.LinuxContainerUser{
		Uid: int64(s.Process.User.UID),
		Gid: int64(s.Process.User.GID),
	}
	for _, g := range s.Process.User.AdditionalGids {
		u.SupplementalGroups = append(u.SupplementalGroups, int64(g))
	}
	return &runtimeapi.ContainerUser{Linux: u}
}

// resolveUser finds out who a container runs as: the user the container asks
// for, else the image's USER, else root; its groups by the policy asked for.
//
// A number needs no entry in the image's passwd, a name does. A user without an
// entry, asked for without a group, gets group 0, as everywhere since Docker.
func resolveUser(sc *runtimeapi.LinuxContainerSecurityContext, imageUser string, passwd, group []byte) (identity, error) {
	const inContext = "linux.security_context."
	imageUser, imageGroup, _ := strings.Cut(imageUser, ":")

	var (
		user account
		err  error
	)
	switch {
	case sc.GetRunAsUser() != nil:
		user, err = accountByID(inContext+"run_as_user", sc.RunAsUser.Value, passwd)
	case sc.GetRunAsUsername() != "":
		user, err = accountByName(inContext+"run_as_username", sc.RunAsUsername, passwd)
	default:
		user, err = imageAccount(imageUser, passwd)
	}
	if err != nil {
		return identity{}, err
	}

	id := identity{uid: user.uid, gid: user.gid, home: user.home}
	switch {
	case sc.GetRunAsGroup() != nil:
		id.gid, err = checkID(inContext+"run_as_group", sc.RunAsGroup.Value)
	case imageGroup != "" && user.is(imageUser):
		// The kubelet repeats the image's user, but has no field to repeat
		// its group in.
		id.gid, err = groupID(imageGroup, group)
	}
	if err != nil {
		return identity{}, err
	}

	id.addGroup(id.gid)
	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge {
		for _, gid := range memberships(user.name, group) {
			id.addGroup(gid)
		}
	}
	for _, v := range sc.GetSupplementalGroups() {
		gid, err := checkID(inContext+"supplemental_groups", v)
		if err != nil {
			return identity{}, err
		}
		id.addGroup(gid)
	}
	return id, nil
}

func (id *identity) addGroup(gid uint32) {
	if !slices.Contains(id.groups, gid) {
		id.groups = append(id.groups, gid)
	}
}

// account is what is known of a user: an entry of passwd, or only its uid.
type account struct {
	name     string // "" without an entry
	uid, gid uint32
	home     string
}

// is reports whether user, a number or a name, means this account. Root is what
// an empty user means.
func (a account) is(user string) bool {
	if uid, ok := parseID(user); ok {
		return uid == a.uid
	}
	if user == "" {
		return a.uid == 0
	}
	return user == a.name
}

// imageAccount finds the user part of an image's USER.
func imageAccount(user string, passwd []byte) (account, error) {
	if user == "" {
		return accountByID("image.User", 0, passwd)
	}
	if n, err := strconv.ParseInt(user, 10, 64); err == nil {
		return accountByID("image.User", n, passwd)
	}
	return accountByName("image.User", user, passwd)
}

func accountByID(field string, v int64, passwd []byte) (account, error) {
	uid, err := checkID(field, v)
	if err != nil {
		return account{}, err
	}
	if a, ok := findAccount(passwd, func(a account) bool { return a.uid == uid }); ok {
		return a, nil
	}
	return account{uid: uid, home: "/"}, nil
}

func accountByName(field, name string, passwd []byte) (account, error) {
	if a, ok := findAccount(passwd, func(a account) bool { return a.name == name }); ok {
		return a, nil
	}
	return account{}, invalid(field, name, "the image's /etc/passwd has no such user", "use a name it has, or a numeric id")
}

func groupID(name string, group []byte) (uint32, error) {
	if n, err := strconv.ParseInt(name, 10, 64); err == nil {
		return checkID("image.User", n)
	}
	for line := range bytes.Lines(group) {
		if g, ok := parseGroup(line); ok && string(g.name) == name {
			return g.gid, nil
		}
	}
	return 0, invalid("image.User", name, "the image's /etc/group has no such group", "set run_as_user and run_as_group")
}

// memberships lists the groups that have the named user as a member.
func memberships(user string, group []byte) []uint32 {
	if user == "" {
		return nil
	}
	var gids []uint32
	for line := range bytes.Lines(group) {
		g, ok := parseGroup(line)
		if !ok {
			continue
		}
		for member := range bytes.SplitSeq(g.members, []byte(",")) {
			if string(member) == user {
				gids = append(gids, g.gid)
				break
			}
		}
	}
	return gids
}

func findAccount(passwd []byte, match func(account) bool) (account, bool) {
	for line := range bytes.Lines(passwd) {
		if a, ok := parseAccount(line); ok && match(a) {
			return a, true
		}
	}
	return account{}, false
}

// parseAccount reads a line of passwd, name:password:uid:gid:gecos:home:shell.
// A line whose ids are no ids is no entry: to take them as 0 would make root of
// a typing error.
func parseAccount(line []byte) (account, bool) {
	f := bytes.Split(bytes.TrimSpace(line), []byte(":"))
	if len(f) < 4 || len(f[0]) == 0 || f[0][0] == '#' {
		return account{}, false
	}
	uid, uidOK := parseID(string(f[2]))
	gid, gidOK := parseID(string(f[3]))
	if !uidOK || !gidOK {
		return account{}, false
	}
	a := account{name: string(f[0]), uid: uid, gid: gid, home: "/"}
	if len(f) > 5 && path.IsAbs(string(f[5])) && utf8.Valid(f[5]) {
		a.home = string(f[5])
	}
	return a, true
}

type groupEntry struct {
	name    []byte
	gid     uint32
	members []byte // separated by commas
}

// parseGroup reads a line of group, name:password:gid:members.
func parseGroup(line []byte) (groupEntry, bool) {
	f := bytes.Split(bytes.TrimSpace(line), []byte(":"))
	if len(f) < 3 || len(f[0]) == 0 || f[0][0] == '#' {
		return groupEntry{}, false
	}
	gid, ok := parseID(string(f[2]))
	if !ok {
		return groupEntry{}, false
	}
	g := groupEntry{name: f[0], gid: gid}
	if len(f) > 3 {
		g.members = f[3]
	}
	return g, true
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err == nil
}

func checkID(field string, v int64) (uint32, error) {
	if v < 0 || v > maxID {
		return 0, invalid(field, v, "an id must be between 0 and 2147483647", "")
	}
	return uint32(v), nil
}

// checkMapped refuses ids that a pod's user namespace does not have.
func checkMapped(pod *runtimeapi.PodSandboxConfig, id identity) error {
	if !NamespacesOf(pod).User {
		return nil
	}
	const remedy = "use an id inside the range, or a larger range"
	u := podNamespaceOptions(pod).GetUsernsOptions()
	if n := u.GetUids()[0].GetLength(); id.uid >= n {
		return invalid("linux.security_context.run_as_user", id.uid, fmt.Sprintf("the pod's user namespace has %d ids", n), remedy)
	}
	for _, gid := range id.groups {
		if n := u.GetGids()[0].GetLength(); gid >= n {
			return invalid("linux.security_context.supplemental_groups", gid, fmt.Sprintf("the pod's user namespace has %d ids", n), remedy)
		}
	}
	return nil
}
