# A hook of mmdebstrap: labels the tree $1 as Debian's policy says, adds $2 to that, and
# has it loaded.
set -eu
tree=$1
cat >"$tree/etc/selinux/config" <<X
SELINUX=permissive
SELINUXTYPE=default
X
cp "$2" "$tree/tmp/container.cil"
chroot "$tree" /usr/sbin/semodule --noreload --store default --install /tmp/container.cil
rm "$tree/tmp/container.cil"
chroot "$tree" /sbin/setfiles -F /etc/selinux/default/contexts/files/file_contexts /
