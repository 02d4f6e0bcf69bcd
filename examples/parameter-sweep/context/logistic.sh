# Follow x -> r x (1 - x) from a start for a while, and write where it goes round then.
cd /scratch
cp /context/title.txt orbit.txt
awk -v r="$1" -v x="$2" -v steps="$STEPS" 'BEGIN {
    for (i = 1; i <= steps; i++) {
        x = r * x * (1 - x)
        if (i > steps - 16) printf "%.4f\n", x
    }
}' >>orbit.txt
