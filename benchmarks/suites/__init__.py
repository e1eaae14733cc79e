"""Our side of the suites, one per file: `cases(world)` returns name -> function that makes the `Case`."""

# Suites without peers: training, and curves of many cases with few runs each, whose layers are scanned to compile
# faster.
OWN = ("prefix", "scaling", "devices", "learning")
