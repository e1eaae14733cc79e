"""Our side, one suite a file: `cases(world)` gives name -> a function that makes the `Case`."""

# What no peer has: curves of many cases, each of few runs; their layers are scanned, so that they compile soon.
OWN = ("prefix", "scaling", "devices")
