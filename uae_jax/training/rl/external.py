"""Calls the external reward on a batch: arrays to the host, tokens to text, and the rewards back to all processes."""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
import numpy as np

from uae_jax.data.processing import Processor
from uae_jax.options import EXTERNAL
from uae_jax.rewards.external import ExternalReward, RewardError
from uae_jax.training import processes
from uae_jax.training.rl.phases import RewardInputs


def make_external_reward(
  reward: ExternalReward, processor: Processor, metadata_of: Callable[[int], dict] | None = None
) -> Callable[[dict, RewardInputs], dict]:
  """Makes external_reward(batch, reward_inputs) -> {"http": float32[prompts, rollouts]}.

  With several processes, process 0 sends the requests of all of them: every group is sent once, and all processes get
  the same rewards.

  Args:
    reward: client of the server.
    processor: turns tokens into text.
    metadata_of: index of a record -> JSON values that are sent in place of the original, which prompts do not have;
      None sends the original.

  Raises (external_reward):
    RewardError: see `ExternalReward`; on every process.
  """

  def captions(tokens: np.ndarray, num_rollouts: int) -> list[list[str]]:
    texts = [[processor.caption_text(row) for row in group] for group in tokens]
    return [group * num_rollouts if len(group) == 1 else group for group in texts]

  def external_reward(batch: dict, reward_inputs: RewardInputs) -> dict:
    # The rows are identified by their originals, or by the indices of their prompts.
    rows = batch["image" if metadata_of is None else "index"]
    rows, tokens, images = multihost_utils.process_allgather(
      (rows, reward_inputs.tokens, reward_inputs.images), tiled=True
    )
    outcome = cause = None
    if jax.process_index() == 0:
      try:
        texts = captions(tokens, images.shape[1])
        if metadata_of is None:
          outcome = reward(texts, rows, images).tolist()
        else:
          outcome = reward(texts, None, images, [metadata_of(int(index)) for index in rows]).tolist()
      except Exception as error:  # Catches everything, because the other processes wait for the outcome.
        outcome, cause = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}", error
    outcome = processes.of_first(outcome)
    if isinstance(outcome, str):
      raise RewardError(outcome) from cause
    return {EXTERNAL: np.asarray(outcome, np.float32)}

  return external_reward
