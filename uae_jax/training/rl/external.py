"""Makes the rewards on the host: arrays to the host, tokens to text, rewards back to all processes."""

from collections.abc import Callable
from concurrent.futures import Future
import dataclasses

from jax.experimental import multihost_utils
import numpy as np

from uae_jax.data.processing import Processor
from uae_jax.options import EXTERNAL
from uae_jax.rewards.external import Answer, ExternalReward
from uae_jax.rewards.image_text import ImageTextReward
from uae_jax.training.rl.host_rewards import Begun, HostReward, RewardInputs, own_share


def make_external_reward(
  reward: ExternalReward, processor: Processor, metadata_of: Callable[[int], dict] | None = None
) -> HostReward:
  """Makes the external reward, "http".

  Every process sends the requests of its share of the prompts; all get the same rewards.

  Args:
    reward: client of the server; its errors are those of `HostReward.finish`.
    processor: turns tokens into text.
    metadata_of: index of a record -> JSON values that are sent in place of the original, which prompts do not have;
      None sends the original.
  """

  def captions(tokens: np.ndarray, num_rollouts: int) -> list[list[str]]:
    texts = [[processor.caption_text(row) for row in group] for group in tokens]
    return [group * num_rollouts if len(group) == 1 else group for group in texts]

  def start(rows: np.ndarray, tokens: np.ndarray, images: np.ndarray) -> list[Future[Answer]]:
    texts = captions(tokens, images.shape[1])
    if metadata_of is None:
      return reward.start(texts, rows, images)
    return reward.start(texts, None, images, [metadata_of(int(index)) for index in rows])

  def begin(batch: dict, reward_inputs: RewardInputs) -> Begun:
    # The rows are identified by their originals, or by the indices of their prompts.
    rows = batch["image" if metadata_of is None else "index"]
    arrays = multihost_utils.process_allgather((rows, reward_inputs.tokens, reward_inputs.images), tiled=True)
    share = own_share(len(arrays[0]))
    started: Future[list[Future[Answer]]] = Future()
    try:
      started.set_result(start(*(array[share] for array in arrays)))
    except Exception as error:  # The other processes have begun, and learn of it when all finish.
      started.set_exception(error)
    return lambda: [dataclasses.asdict(answer.result()) for answer in started.result()]

  # All processes see all answers, so all of them continue or none does.
  def accept(values: list) -> np.ndarray:
    return reward.accept([Answer(**value) for value in values])

  return HostReward(EXTERNAL, begin, accept, reward.cancel)


def make_image_text_reward(name: str, reward: ImageTextReward, processor: Processor) -> HostReward:
  """Makes the reward `name`, the match of image and text; its networks are loaded when they are needed.

  Every process measures its share of the prompts on one of its devices, after the last piece; all get the same rewards.
  """

  def begin(batch: dict, reward_inputs: RewardInputs) -> Begun:
    del batch  # It needs no original.
    tokens, images = multihost_utils.process_allgather((reward_inputs.tokens, reward_inputs.images), tiled=True)
    share = own_share(len(images))

    def measure() -> list[list[float]]:
      texts = [
        [processor.caption_text(row) for row in np.broadcast_to(group, (images.shape[1], group.shape[-1]))]
        for group in tokens[share]
      ]
      return reward(texts, images[share]).tolist() if texts else []

    return measure

  return HostReward(name, begin, lambda values: np.asarray(values, np.float32))
