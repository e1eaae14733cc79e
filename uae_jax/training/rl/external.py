"""Rewards that are computed between two phases: arrays to the host, tokens to text, rewards back to all processes."""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
import numpy as np

from uae_jax.data.processing import Processor
from uae_jax.options import EXTERNAL
from uae_jax.rewards.external import ExternalReward, RewardError
from uae_jax.rewards.image_text import ImageTextReward
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


def make_image_text_reward(name: str, reward: ImageTextReward, processor: Processor) -> Callable:
  """Makes image_text_reward(batch, reward_inputs) -> {name: float32[prompts, rollouts]}.

  Every process measures its share of the prompts on one of its devices; all get the same rewards.

  Raises (image_text_reward):
    RewardError: the networks cannot be loaded or run; on every process.
  """

  def image_text_reward(batch: dict, reward_inputs: RewardInputs) -> dict:
    del batch  # It needs no original.
    tokens, images = multihost_utils.process_allgather((reward_inputs.tokens, reward_inputs.images), tiled=True)
    share = slice(*(len(images) * (jax.process_index() + i) // jax.process_count() for i in range(2)))
    texts = [
      [processor.caption_text(row) for row in np.broadcast_to(group, (images.shape[1], group.shape[-1]))]
      for group in tokens[share]
    ]
    own = cause = None
    try:
      own = reward(texts, images[share]).tolist() if texts else []
    except Exception as error:  # Catches everything, because the other processes wait for the outcome.
      own, cause = f"{name}: {type(error).__name__}: {error}", error
    parts = processes.gather(own)
    for part in parts:
      if isinstance(part, str):
        raise RewardError(part) from cause
    return {name: np.asarray([row for part in parts for row in part], np.float32)}

  return image_text_reward
