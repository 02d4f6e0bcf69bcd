#!/bin/sh
# The agent: what deskgrid runs in a guest at the end of its boot. The worker puts it on every context disk, so a template
# only has to mount the volume labelled CONTEXT or CIDATA on /context and run `sh /context/.deskgrid/agent.sh` as root.
#
# It mounts the volume labelled SCRATCH on /scratch, runs /context/context.sh there, leaves stdout, stderr and exit in
# /scratch/.deskgrid (these count), and powers the machine off. What happens is told on the second serial port, a line each:
#
#     ! booted               the disks are there
#     ! context-started      context.sh begins
#     1 text | 2 text        a line of its stdout or stderr
#     1-text | 2-text        a piece of a line: what follows belongs to it
#     ! context-exited RC    it ended; all its output that fits was told before
#
# Needs a POSIX shell (busybox, dash, bash) and dd, head, tail, sed, tr, wc, mount, sync. Nothing else is sure to be there.

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
export PATH
CONTEXT=/context
SCRATCH=/scratch
REPORT=$SCRATCH/.deskgrid
RUN=/run/deskgrid
TOLD_BYTES=1048576   # of each stream; the rest is in the report only
CHUNK_BYTES=65536

# A template's service and cloud-init may both call us: the first one runs.
mkdir -p /run
mkdir "$RUN" 2>/dev/null || exit 0

# ---- telling

if [ -c /dev/ttyS1 ]; then
    stty raw -echo 115200 </dev/ttyS1 2>/dev/null
    exec 3>/dev/ttyS1
else
    exec 3>/dev/null
fi

tell() { echo "$*" >&3; }

# tell_new FILE PREFIX OFFSET: tell what FILE has after OFFSET, at most a chunk; set `told` to the bytes told.
tell_new() {
    told=0
    [ -s "$1" ] || return 0
    size=$(wc -c <"$1")
    [ "$3" -lt "$size" ] && [ "$3" -lt "$TOLD_BYTES" ] || return 0
    told=$((size - $3))
    [ "$told" -le "$CHUNK_BYTES" ] || told=$CHUNK_BYTES
    # The chunk is fixed in a file first: the job writes on while we read.
    tail -c "+$(($3 + 1))" "$1" | head -c "$told" >"$RUN/chunk"
    lines=$(wc -l <"$RUN/chunk")
    [ "$lines" -eq 0 ] || head -n "$lines" "$RUN/chunk" | sed "s/^/$2 /" >&3
    if [ -n "$(tail -c 1 "$RUN/chunk" | tr -d '\n' | tr '\0' x)" ]; then
        { printf %s "$2-"; tail -n "+$((lines + 1))" "$RUN/chunk"; echo; } >&3
    fi
}

# Follow both streams until TERM (or, given an argument, at once), then tell the rest. A slow line delays this process
# only, never the job.
follow() {
    last=$1
    out=0
    err=0
    pause=0.2
    trap 'last=1' TERM
    while :; do
        stop=$last
        tell_new "$REPORT/stdout" 1 "$out"; out=$((out + told)); new=$told
        tell_new "$REPORT/stderr" 2 "$err"; err=$((err + told)); new=$((new + told))
        [ "$new" -eq 0 ] || continue
        [ -z "$stop" ] || break
        # wait is ended by the signal, sleep is not.
        [ -n "$last" ] || { sleep "$pause" 3>&- & wait $!; }
        pause=1
    done
}

# ---- disks

# Print the label of an ext2/3/4 volume: the magic 53 ef is at byte 1080, the label at 1144.
ext_label() {
    [ "$(dd if="$1" bs=1 skip=1080 count=2 2>/dev/null | tr '\123\357' 'ok')" = ok ] || return 1
    dd if="$1" bs=1 skip=1144 count=16 2>/dev/null | tr -d '\0'
}

find_scratch() {
    for block in /sys/class/block/*; do
        name=${block##*/}
        case $name in sr* | fd* | loop* | ram* | zram* | dm-*) continue ;; esac
        [ "$(ext_label "/dev/$name")" = SCRATCH ] && { echo "/dev/$name"; return 0; }
    done
    return 1
}

mount_scratch() {
    mkdir -p "$SCRATCH"
    tries=0
    until disk=$(find_scratch); do
        [ "$tries" -lt 100 ] || return 1
        sleep 0.1 2>/dev/null || sleep 1
        tries=$((tries + 1))
    done
    # The image is new and sparse: writing zeros over its inode tables would only make it grow.
    mount -t ext4 -o discard,noinit_itable "$disk" "$SCRATCH" || mount -t ext4 "$disk" "$SCRATCH"
}

# Give the disks the names of their places on the two IDE ports: hda hdb (first), hdc hdd (second).
link_places() {
    for block in /sys/block/sd* /sys/block/sr*; do
        [ -e "$block/device" ] || continue
        place=$(cd -P "$block/device" && pwd)
        case $place in
            */ata1/*:0:0:0) name=hda ;;
            */ata1/*:0:1:0) name=hdb ;;
            */ata2/*:0:0:0) name=hdc ;;
            */ata2/*:0:1:0) name=hdd ;;
            *) continue ;;
        esac
        [ -e "/dev/$name" ] || ln -s "${block##*/}" "/dev/$name"
    done
}

# ---- the job

run_context() {
    if [ ! -f "$CONTEXT/context.sh" ]; then
        echo "deskgrid: there is no context.sh" >"$REPORT/stderr"
        return 0
    fi
    (
        exec 3>&-
        cd "$SCRATCH" || exit 126
        [ ! -f "$CONTEXT/.deskgrid/environment" ] || . "$CONTEXT/.deskgrid/environment"
        exec sh "$CONTEXT/context.sh"
    ) </dev/null >"$REPORT/stdout" 2>"$REPORT/stderr"
}

# Half a number must never be read as an exit code, so it gets its name when it is whole on the disk.
report_exit() {
    echo "$1" >"$REPORT/exit.new"
    sync
    mv "$REPORT/exit.new" "$REPORT/exit"
}

release_scratch() {
    cd /
    grep -q " $SCRATCH .*discard" /proc/mounts || fstrim "$SCRATCH" 2>/dev/null
    sync
    # Processes that the job left behind hold it: then make it read-only under them, so that what is on it is whole.
    umount "$SCRATCH" 2>/dev/null || { echo s >/proc/sysrq-trigger; echo u >/proc/sysrq-trigger; sleep 1; }
}

# Nothing on the first disk is worth an orderly shutdown: the worker throws its overlay away.
power_off() {
    sync
    echo o >/proc/sysrq-trigger 2>/dev/null
    sleep 5
    poweroff -f
    sleep 30
}

link_places
if ! mount_scratch; then
    tell "2 deskgrid: no disk labelled SCRATCH was found"
    power_off
fi
mkdir -p "$REPORT"
: >"$REPORT/stdout"
: >"$REPORT/stderr"
tell "! booted"
tell "! context-started"
follow "" &
follower=$!
run_context
code=$?
report_exit "$code"
kill -TERM "$follower" 2>/dev/null
# A job can be over before the follower has set its trap; it then died with nothing told.
wait "$follower" || follow last
tell "! context-exited $code"
exec 3>&-
release_scratch
power_off
