"""Our side, one suite a file: `cases(world)` gives name -> a function that makes the `Case`."""
