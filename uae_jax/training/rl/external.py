"""Rewards that are computed on the host: arrays to the host, tokens to text, rewards back to all processes.

The prompts of a step come in pieces. The rewards of a piece begin when it is generated, and are taken after the last.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
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

# () -> JSON values of the rows of this process's share, when they are there.
Begun = Callable[[], list]


@dataclasses.dataclass(frozen=True)
class HostReward:
  """A reward that is computed on the host, between the phases of a step.

  Made by `make_external_reward` and `make_image_text_reward`; read by `training.stage.phased_step`.

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
