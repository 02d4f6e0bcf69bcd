#!/bin/busybox sh
# First process of the Debian template, in its initrd: mount the system's disk by its label, then systemd.
# It stands in for the distribution's initrd, whose udev and scripts cost many seconds in software emulation.
/bin/busybox mkdir -p /dev /proc /sys /run /root
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
# In order of dependence, written by debian-initrd.sh; not found hardware is no error.
while read -r module; do /bin/busybox insmod "/modules/$module" 2>/dev/null; done </modules/order

read -r label </label

# Print the label of an ext2/3/4 volume: the magic 53 ef is at byte 1080, the label at 1144.
ext_label() {
    [ "$(/bin/busybox dd if="$1" bs=1 skip=1080 count=2 2>/dev/null | /bin/busybox tr '\123\357' 'ok')" = ok ] || return 1
    /bin/busybox dd if="$1" bs=1 skip=1144 count=16 2>/dev/null | /bin/busybox tr -d '\0'
}

find_system() {
    for device in /dev/sd[a-z]1 /dev/vd[a-z]1; do
        [ -b "$device" ] && [ "$(ext_label "$device")" = "$label" ] && return 0
    done
    return 1
}

# Ports are scanned in the background by the kernel; 600 * 50 ms.
tries=0
until find_system; do
    if [ "$tries" -ge 600 ]; then
        echo "debian: no disk has a partition labelled $label"
        /bin/busybox poweroff -f
    fi
    /bin/busybox usleep 50000
    tries=$((tries + 1))
done
/bin/busybox mount -t ext4 -o rw,noatime "$device" /root
for folder in dev proc sys; do /bin/busybox mount -o move "/$folder" "/root/$folder"; done
exec /bin/busybox switch_root /root /sbin/init
