#!/bin/sh
# Start the ssh server of the Debian template on a port: /etc/deskgrid/start-ssh, which the agent calls if the job offers ssh.
# The host key is made now and is of the kind that takes no time to make, which is seconds for the others in software emulation.
mkdir -p /run/sshd
[ -e /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
exec /usr/sbin/sshd -p "$1"
