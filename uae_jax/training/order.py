"""The order in which a run goes through its stages, and the folders of their checkpoints."""

REINFORCEMENT = ("generation_for_understanding", "understanding_for_generation")


def stage_runs(config) -> list[tuple[str, str]]:
  """(folder, stage) in run order; with several rounds the RL stages take turns."""
  once = [(name, name) for name in config.stages if name not in REINFORCEMENT]
  in_turn = [name for name in config.stages if name in REINFORCEMENT]
  if config.rounds == 1:
    return once + [(name, name) for name in in_turn]
  return once + [(f"{name}_round{k + 1}", name) for k in range(config.rounds) for name in in_turn]
