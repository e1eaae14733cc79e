"""Rewards that are computed on the host, between the phases of an RL step; `rl.external` makes them.

The prompts of a step come in pieces. The rewards of a piece begin when it is generated, and are taken after the last.
"""

from collections.abc import Callable, Sequence
import dataclasses

import flax.struct
import jax
import numpy as np

from uae_jax.rewards.external import RewardError
from uae_jax.training import processes


@flax.struct.dataclass
class RewardInputs:
  """Inputs of a reward on the host.

  Made by `Phases.reward_and_inputs`; read by `HostReward.begin`.

  Attributes:
    tokens: int32[prompts, rollouts or 1, L], captions; 1 where all rollouts of a group share one caption.
    images: uint8[prompts, rollouts, H, W, 3], reconstructions.
  """

  tokens: jax.Array
  images: jax.Array


# () -> JSON values of the rows of this process's share, when they are there.
Begun = Callable[[], list]


@dataclasses.dataclass(frozen=True)
class HostReward:
  """A reward that is computed on the host, between the phases of a step.

  Made by `rl.external`; read by `training.stage.phased_step`.

  Attributes:
    name: name of the reward.
    begin: (rows of the batch, their `RewardInputs`) -> what brings the values of this process's share. Called by all
      processes; raises only what all of them raise.
    accept: JSON values of all prompts, in order -> float32[prompts, rollouts].
    cancel: gives up what has begun.
  """

  name: str
  begin: Callable[[dict, RewardInputs], Begun]
  accept: Callable[[list], np.ndarray]
  cancel: Callable[[], None] = lambda: None

  def __call__(self, batch: dict, reward_inputs: RewardInputs) -> np.ndarray:
    """Computes the rewards of a batch in one piece; see `finish`."""
    return self.finish([self.begin(batch, reward_inputs)])

  def finish(self, begun: Sequence[Begun]) -> np.ndarray:
    """Waits for the values of all pieces, and returns float32[prompts, rollouts] on all processes.

    Piece i of n has rows i, i + n, ... of the batch.

    Raises:
      RewardError: a process failed, or the values are not accepted; on every process, since each waits for the others.
    """
    own: list | str
    cause = None
    try:
      own = [piece() for piece in begun]
    except Exception as error:  # Catches everything, because the other processes wait for the values.
      own, cause = f"{self.name}: {type(error).__name__}: {error}", error
    shares = processes.gather(own)
    for share in shares:
      if isinstance(share, str):
        raise RewardError(share) from cause
    pieces = [[row for share in shares for row in share[i]] for i in range(len(begun))]
    return self.accept([row for rows in zip(*pieces, strict=True) for row in rows])


def own_share(size: int) -> slice:
  """The rows of which this process computes the values."""
  return slice(*(size * (jax.process_index() + i) // jax.process_count() for i in range(2)))
