#!/usr/bin/env bash
# Builds the guest of the end-to-end tests and of the demo, once: a Debian 12 with systemd on an 8 GiB sparse
# ext4 disk, its kernel and its initrd. Prints the directory that holds them (target/guest).
#
#   disk.raw      the disk; nobody may write to it: take a copy with `cp --sparse=always`
#   vmlinuz       its kernel            initrd.img    its initial file system
#   version       the stamp that decides whether it must be built anew
#
# In the guest, scripts/guest/agent runs commands for the host that come in on the second serial port.
# Nothing is mounted and no image is fetched: debootstrap installs packages into a directory, mkfs.ext4 copies
# the directory into a file.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

readonly SIZE_GIB=8
readonly SUITE=bookworm
readonly PACKAGES=systemd-sysv,udev,linux-image-cloud-amd64

guest_dir="$target_dir/guest"
# What the guest is made of: a change to any of these makes it stale.
version=$(cat "$scripts_dir/guest.sh" "$scripts_dir"/guest/* | sha256sum | cut -c1-16)

is_current() {
    [[ -r $guest_dir/version && $(<"$guest_dir/version") == "$version" ]] &&
        [[ -s $guest_dir/disk.raw && -s $guest_dir/vmlinuz && -s $guest_dir/initrd.img ]]
}

if [[ ${1:-} == --version ]]; then
    echo "$version"
    exit
fi
if is_current; then
    echo "$guest_dir"
    exit
fi

mkdir -p "$target_dir"
# One builder at a time; whoever waited finds the guest built.
exec 9>"$target_dir/guest.lock"
flock 9
if is_current; then
    echo "$guest_dir"
    exit
fi
require_tools debootstrap mkfs.ext4
[[ $(id -u) == 0 ]] || die "the guest is built by debootstrap, which needs root"

work="$target_dir/guest.new"
rm -rf "$work"
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT
root="$work/root"

# The mirror that apt uses here, where it knows one; else debootstrap's own default.
# shellcheck disable=SC2016  # apt-get fills these in, not the shell.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' 2>/dev/null |
    awk -v suite="$SUITE" '$2 == suite { print $1; exit }' || true)

say "guest: installing Debian ($SUITE) into a directory"
if ! debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$root" ${mirror:+"$mirror"} \
    >"$target_dir/guest.log" 2>&1; then
    tail -n 20 "$target_dir/guest.log" >&2
    die "debootstrap failed; all of its output is in $target_dir/guest.log"
fi

say "guest: making its disk"
echo guest >"$root/etc/hostname"
echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
# A fixed id, so that the first boot is no different from the second.
printf '6c696665626f6f746c696665626f6f74\n' >"$root/etc/machine-id"
# The host's resolver is of no use in there, and says where the guest was built.
: >"$root/etc/resolv.conf"
# Timers would write to the disk at moments of their own.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
install -D -m 755 "$scripts_dir/guest/agent" "$root/usr/local/sbin/guest-agent"
install -D -m 644 "$scripts_dir/guest/guest-agent.service" "$root/etc/systemd/system/guest-agent.service"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -s ../guest-agent.service "$root/etc/systemd/system/multi-user.target.wants/guest-agent.service"

cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
cp "$root"/boot/initrd.img-* "$work/initrd.img"
truncate -s "${SIZE_GIB}G" "$work/disk.raw"
mkfs.ext4 -q -F -L guest -d "$root" "$work/disk.raw"
rm -rf "$root"
echo "$version" >"$work/version"
chmod 444 "$work/disk.raw"

rm -rf "$guest_dir"
mv "$work" "$guest_dir"
trap - EXIT
echo "$guest_dir"
