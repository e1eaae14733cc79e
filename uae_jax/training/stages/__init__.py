"""One file a stage: static options and a loss, or the phases of an RL step."""
