# A hook of mmdebstrap: puts every kernel that the distribution's cloud package
# has had, of the release and of its backports, into the tree $1, without what
# installing one does on a machine that boots from its own disk.
set -eu
tree=$1
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
cd "$tree/tmp"
for package in $(apt-cache show linux-image-cloud-amd64 | sed -n 's/^Depends: \(linux-image-[^ ]*\).*/\1/p' | sort -u); do
	apt-get -q -o APT::Sandbox::User=root download "$package"
	# /lib is a link, and has to stay one.
	dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x --keep-directory-symlink -C "$tree"
	rm "$package"_*.deb
done
for kernel in "$tree"/boot/vmlinuz-*; do
	chroot "$tree" /sbin/depmod "${kernel#"$tree"/boot/vmlinuz-}"
done
# The agent's user and whoever logs in on the console: root, without a password.
chroot "$tree" /usr/bin/passwd -d root >/dev/null
# A host knows its own name: sudo, which critest calls, complains where it does not,
# and critest takes every word of it for a failure.
echo sampan-test >"$tree/etc/hostname"
printf '127.0.0.1\tlocalhost sampan-test\n::1\tlocalhost\n' >"$tree/etc/hosts"
