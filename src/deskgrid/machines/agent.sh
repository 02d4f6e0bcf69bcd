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
#     ! listening PORT       something listens on a port that the job offers; once for each
#
# With a network (the folder .deskgrid has a file `network`) it first sets up the card, the hosts file and root's keys, and starts
# an ssh server if the job offers ssh and the template has one.
#
# Needs a POSIX shell (busybox, dash, bash) and dd, head, tail, sed, tr, wc, mount, sync; for a network ip and chmod, too. Nothing
# else is sure to be there.

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
export PATH
CONTEXT=/context
SCRATCH=/scratch
OWN=$CONTEXT/.deskgrid
ETC=/etc
APP=/app
ROOT_HOME=/root
NET=/proc/net
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
        [ -z "$silent" ] || tell_listening
        [ "$new" -eq 0 ] || continue
        [ -z "$stop" ] || break
        # wait is ended by the signal, sleep is not.
        [ -n "$last" ] || { sleep "$pause" 3>&- & wait $!; }
        pause=1
    done
}

# ---- network

silent=   # the offered ports on which nothing listens yet, as NUMBER:HEX

LOOPBACK='/: 0100007F:/d; /: 0\{24\}01000000:/d; /: 0\{16\}FFFF00000100007F:/d'

# Print the ports, in hexadecimal and each between blanks, on which something listens for others: what listens at 127.0.0.1 only
# cannot be reached. Given an empty argument, print those, too.
listening_ports() {
    sed -n -e "${1-$LOOPBACK}" -e 's/^ *[0-9]*: [0-9A-F]*:\([0-9A-F]*\) [0-9A-F]*:[0-9A-F]* 0A .*/ \1 /p' \
        "$NET/tcp" "$NET/tcp6" 2>/dev/null
}

# has PORTS NUMBER: is it among them?
has() { case $1 in *" $(printf %04X "$2") "*) ;; *) return 1 ;; esac; }

# Tell each offered port as soon as something listens on it.
tell_listening() {
    open=$(listening_ports)
    waiting=$silent
    silent=
    for port in $waiting; do
        case $open in
            *" ${port#*:} "*) tell "! listening ${port%:*}" ;;
            *) silent="$silent $port" ;;
        esac
    done
}

# The first card, unless somebody has given it an address already. QEMU's network has no need for a server that tells it.
set_up_card() {
    read -r address gateway <"$OWN/network"
    for card in /sys/class/net/*; do
        card=${card##*/}
        [ "$card" != lo ] && [ -e "/sys/class/net/$card/device" ] || continue
        case $(ip -4 addr show dev "$card" 2>/dev/null) in *inet*) return 0 ;; esac
        ip link set "$card" up && ip addr add "$address" dev "$card" && ip route add default via "$gateway"
        return
    done
    return 1
}

add_hosts() {
    [ -s "$ETC/hosts" ] || echo "127.0.0.1 localhost" >"$ETC/hosts"
    # A last line without an end must not swallow the first of ours.
    { echo; while read -r line; do printf '%s\n' "$line"; done <"$OWN/hosts"; } >>"$ETC/hosts"
}

add_keys() {
    [ -s "$OWN/authorized_keys" ] || return 0
    mkdir -p "$ROOT_HOME/.ssh"
    { echo; while read -r line; do printf '%s\n' "$line"; done <"$OWN/authorized_keys"; } >>"$ROOT_HOME/.ssh/authorized_keys"
    chmod 700 "$ROOT_HOME/.ssh"
    chmod 600 "$ROOT_HOME/.ssh/authorized_keys"
}

# Start the template's ssh server if nobody else does: the way that it says itself, or those of the usual servers.
start_ssh() {
    while read -r name port; do [ "$name" != ssh ] || break; done <"$OWN/offer"
    [ "$name" = ssh ] || return 0
    has "$(listening_ports)" "$port" && return 0
    if [ -x "$ETC/deskgrid/start-ssh" ]; then
        "$ETC/deskgrid/start-ssh" "$port"
    elif command -v dropbear >/dev/null; then
        mkdir -p "$ETC/dropbear"
        dropbear -R -s -p "$port"
    elif server=$(command -v sshd); then
        mkdir -p /run/sshd
        ssh-keygen -A
        "$server" -p "$port"
    fi
}

# At localhost, too, where the agent can: many programs know no other place for their server. A port that is the machine's own, or
# taken, is left alone. With one direction ended, the other may go on for a day.
forward_localhost() {
    cp "$OWN/services.json" "$RUN/services.json"
    taken=$(listening_ports "")
    while read -r _ port; do taken="$taken $(printf %04X "$port") "; done <"$OWN/offer"
    case $(nc --help 2>&1) in *BusyBox*-ll*) busybox_nc=yes ;; *) busybox_nc= ;; esac
    while read -r name address port; do
        has "$taken" "$port" && continue
        taken="$taken $(printf %04X "$port") "
        if command -v socat >/dev/null; then
            socat -t 86400 "TCP-LISTEN:$port,bind=127.0.0.1,fork,reuseaddr" "TCP:$address:$port" &
        elif [ -n "$busybox_nc" ]; then
            nc -ll -p "$port" -e nc "$address" "$port" &
        else
            return 0
        fi
        sed "s/^    \"$name\": {/&\"localhost\":true,/" "$RUN/services.json" >"$RUN/services.new"
        mv "$RUN/services.new" "$RUN/services.json"
    done <"$OWN/reach"
}

set_up_network() {
    [ -f "$OWN/network" ] || return 0
    set_up_card || tell "2 deskgrid: no network card was found"
    add_hosts
    add_keys
    while read -r _ port; do silent="$silent $port:$(printf %04X "$port")"; done <"$OWN/offer"
    # Without the channel, which a server would hold open.
    forward_localhost </dev/null >"$RUN/network.log" 2>&1 3>&-
    start_ssh </dev/null >>"$RUN/network.log" 2>&1 3>&- &
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
    if [ ! -f "$CONTEXT/context.sh" ] && [ ! -f "$OWN/command" ]; then
        echo "deskgrid: there is no context.sh" >"$REPORT/stderr"
        return 0
    fi
    (
        exec 3>&-
        cd "$SCRATCH" || exit 126
        [ ! -f "$OWN/environment" ] || . "$OWN/environment"
        [ ! -d "$CONTEXT/app" ] || [ -e "$APP" ] || ln -s "$CONTEXT/app" "$APP"
        set -- sh "$CONTEXT/context.sh"
        [ ! -f "$OWN/command" ] || . "$OWN/command"
        exec "$@"
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
set_up_network
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
