# Prints how many of so many darts hit.
BEGIN {
    srand(seed)
    for (i = 0; i < darts; i++) {
        x = rand(); y = rand()
        if (x * x + y * y < 1) hits++
    }
    print hits, darts
    print "seed", seed, "done" >"/dev/stderr"
}
