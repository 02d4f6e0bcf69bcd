#!/bin/sh
# Make /boot/deskgrid.img, the initrd of the Debian template: run in the system while it is built, with the disk's label as argument.
set -eu
initrd=/tmp/deskgrid-initrd
version=$(ls /lib/modules)
mkdir -p "$initrd/bin" "$initrd/modules"
cp /bin/busybox "$initrd/bin/busybox"
mv /usr/lib/deskgrid/init "$initrd/init"
echo "$1" >"$initrd/label"
# Disks as IDE, SATA, virtio, and CDs, which systemd's generators look at; what is built in, or not made for this kernel, is left out.
for module in virtio_pci virtio_blk virtio_scsi ata_piix ahci sd_mod sr_mod ext4; do
    modprobe --show-depends --set-version "$version" "$module" 2>/dev/null || true
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
    cp "$file" "$initrd/modules/"
    echo "${file##*/}"
done >"$initrd/order"
mv "$initrd/order" "$initrd/modules/order"
[ -s "$initrd/modules/order" ]
cd "$initrd"
# The same files give the same bytes.
find . -exec touch -h -d @0 {} +
find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible | gzip -9n >/boot/deskgrid.img
rm -r "$initrd"
