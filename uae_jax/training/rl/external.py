"""Rewards that are computed between two phases: arrays to the host, tokens to text, rewards back to all processes."""

from collections.abc import Callable
import dataclasses

import jax
from jax.experimental import multihost_utils
import numpy as np

from uae_jax.data.processing import Processor
from uae_jax.options import EXTERNAL
from uae_jax.rewards.external import Answer, ExternalReward, RewardError
from uae_jax.rewards.image_text import ImageTextReward
from uae_jax.training import processes
from uae_jax.training.rl.phases import RewardInputs


def in_shares(name: str, size: int, compute: Callable[[slice], list]) -> list:
  """Computes JSON values of rows in all processes, each for its share of the rows.

  Args:
    name: name of the reward, for messages.
    size: number of rows.
    compute: rows of a share -> their values.

  Raises:
    RewardError: `compute` failed in a process; on every process, because each waits for the others.
  """
  share = slice(*(size * (jax.process_index() + i) // jax.process_count() for i in range(2)))
  own: list | str
  cause = None
  try:
    own = compute(share)
  except Exception as error:  # Catches everything, because the other processes wait for the values.
    own, cause = f"{name}: {type(error).__name__}: {error}", error
  parts = processes.gather(own)
  for part in parts:
    if isinstance(part, str):
      raise RewardError(part) from cause
  return [row for part in parts for row in part]


def make_external_reward(
  reward: ExternalReward, processor: Processor, metadata_of: Callable[[int], dict] | None = None
) -> Callable[[dict, RewardInputs], dict]:
  """Makes external_reward(batch, reward_inputs) -> {"http": float32[prompts, rollouts]}.

  Every process sends the requests of its share of the prompts; all get the same rewards.

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

    def request(share: slice) -> list[dict]:
      texts = captions(tokens[share], images.shape[1])
      if metadata_of is None:
        answers = reward.request(texts, rows[share], images[share])
      else:
        answers = reward.request(texts, None, images[share], [metadata_of(int(index)) for index in rows[share]])
      return [dataclasses.asdict(answer) for answer in answers]

    # All processes see all answers, so all of them continue or none does.
    answers = in_shares(EXTERNAL, len(images), request)
    return {EXTERNAL: reward.accept([Answer(**answer) for answer in answers])}

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

    def measure(share: slice) -> list[list[float]]:
      texts = [
        [processor.caption_text(row) for row in np.broadcast_to(group, (images.shape[1], group.shape[-1]))]
        for group in tokens[share]
      ]
      return reward(texts, images[share]).tolist() if texts else []

    return {name: np.asarray(in_shares(name, len(images), measure), np.float32)}

  return image_text_reward
