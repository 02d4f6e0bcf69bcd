#!/bin/sh
# End of the Debian template's boot: mount the context disk, if cloud-init has not, and run the agent that the worker put on it.
mkdir -p /context
tries=0
until [ -e /context/.deskgrid/agent.sh ] || [ "$tries" -ge 100 ]; do
    for label in CONTEXT CIDATA cidata; do
        mount -o ro "LABEL=$label" /context 2>/dev/null && break
    done
    [ -e /context/.deskgrid/agent.sh ] || sleep 0.1
    tries=$((tries + 1))
done
if [ -e /context/.deskgrid/agent.sh ]; then
    exec sh /context/.deskgrid/agent.sh
fi
echo "deskgrid: no disk labelled CONTEXT or CIDATA with an agent" >/dev/console
