"""One file per stage, each of which defines a `SPEC`: a loss, or the phases of an RL step."""
