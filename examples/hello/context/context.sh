#!/bin/sh
# Runs at the end of the machine's boot, as root, with /scratch as working directory. What it leaves there is the result.
echo "hello from $(uname -n), $(uname -s) $(uname -r) on $(uname -m)"

{
    echo "Hello from a virtual machine on somebody's PC."
    echo "It was made for this job only and is gone by now."
    uname -a
} >hello.txt

mkdir numbers
for n in 1 2 3; do
    echo "step $n of 3"
    sleep 1 # so that there is something to watch
    echo $((n * n)) >"numbers/$n"
done
echo "bye"
