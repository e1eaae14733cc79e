"""The external reward: sends captions and images as JSON over HTTP and receives one number per caption.

One POST per group, several groups at a time, those of a step while its later groups are still being generated:

    request   {"captions": [text, ...], "images": [base64 PNG, ...], "original": base64 PNG}
    answer    {"rewards": [number or null, ...]}, one per caption

Prompts without pictures have no "original", and "metadata" with the other fields of their record.

Requests are sent by the host, between the phases of a step, never inside a jitted program. The formats are JSON and
PNG, not pickle, so an answer cannot execute code here.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import math
from typing import Any

from absl import logging
import jax
import numpy as np

from uae_jax import http_client
from uae_jax.files import png_base64
from uae_jax.options import ExternalRewardOptions
from uae_jax.rewards.known import KnownRewards

MAX_KINDS = 3  # kinds of failure that a message counts


class RewardError(RuntimeError):
  """Raised when the external reward gives no usable answer and the run must not continue without it."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the request for one group brought.

  Attributes:
    rewards: one number per caption, NaN where there is none.
    problem: error message; "" if there is none.
    refused_status: HTTP status with which the server refused the group for good; 0 otherwise.
  """

  rewards: list[float]
  problem: str = ""
  refused_status: int = 0


class ExternalReward:
  """Client of one reward server; a call computes the rewards of a whole batch.

  A call starts the requests and accepts their answers. Processes that start those of a share each accept the answers of
  all of them.

  Args:
    options: address, time limits, retries, and what happens on a failure.

  Raises:
    ValueError: there is no address, or the environment has no usable token.
  """

  def __init__(self, options: ExternalRewardOptions):
    if not options.url:
      raise ValueError("http_reward.url is empty: 'http' in reward_weights needs the address of the external reward")
    self.options = options
    self._failed_in_a_row = 0
    token = ""
    if options.token_variable:
      token = http_client.read_token("http_reward.token_variable", options.token_variable, is_required=True)
    self._client = http_client.JsonClient(options.url, options.timeout_seconds, token)
    self._pool: ThreadPoolExecutor | None = None
    self._known = KnownRewards(options.cache_size) if options.cache_size else None

  def __call__(
    self,
    captions: Sequence[Sequence[str]],
    originals: np.ndarray | None,
    generated: np.ndarray,
    metadata: Sequence[dict] | None = None,
  ) -> np.ndarray:
    """Requests the rewards of a batch.

    Args:
      captions: captions of the rollouts, one sequence per prompt.
      originals: uint8[prompts, H, W, 3]; None if there are none.
      generated: uint8[prompts, rollouts, H, W, 3], reconstructions.
      metadata: JSON values to send with each prompt; None sends none.

    Returns:
      float32[prompts, rollouts]; NaN where the request failed under on_failure = "drop".

    Raises:
      RewardError: a request failed under on_failure = "fail", the server refused every group, or no group of the last
        `max_failed_in_a_row` batches got a reward.
    """
    return self.accept([answer.result() for answer in self.start(captions, originals, generated, metadata)])

  def start(
    self,
    captions: Sequence[Sequence[str]],
    originals: np.ndarray | None,
    generated: np.ndarray,
    metadata: Sequence[dict] | None = None,
  ) -> list[Future[Answer]]:
    """Starts to request the rewards of some groups, `max_concurrency` at a time; arguments as in a call."""
    absent = [None] * len(captions)
    self._pool = self._pool or ThreadPoolExecutor(self.options.max_concurrency, "external-reward")
    groups = zip(captions, originals if originals is not None else absent, generated, metadata or absent, strict=True)
    return [self._pool.submit(self._group, *group) for group in groups]

  def cancel(self) -> None:
    """Gives up all requests that are not on their way."""
    if self._pool is not None:
      self._pool.shutdown(wait=False, cancel_futures=True)
      self._pool = None

  def accept(self, groups: Sequence[Answer]) -> np.ndarray:
    """Turns the answers for all groups of a batch, in order, into rewards, or ends the run; see a call."""
    rewards = np.asarray([group.rewards for group in groups], np.float32)
    if groups and all(group.refused_status for group in groups):
      # A wrong address or key does not resolve itself: without this error, the run would finish without learning.
      raise RewardError(
        f"http_reward.url = {self.options.url}: {groups[0].problem} for all {len(groups)} groups of a batch; "
        "the server refuses the requests: check the address and http_reward.token_variable"
      )
    problems = Counter(group.problem for group in groups if group.problem)
    self._failed_in_a_row = 0 if np.isfinite(rewards).any() else self._failed_in_a_row + 1
    if problems:
      num_failed = int(np.sum(~np.isfinite(rewards)))
      line = f"http_reward.url = {self.options.url}: {num_failed} of {rewards.size} rollouts have no external reward "
      line += f"({'; '.join(f'{problem}, {count} x' for problem, count in problems.most_common(MAX_KINDS))})"
      if self.options.on_failure == "fail":
        raise RewardError(line)
      if self._failed_in_a_row >= self.options.max_failed_in_a_row:
        raise RewardError(f"{line}, in {self._failed_in_a_row} batches in a row: check the server, then resume")
      if jax.process_index() == 0:
        logging.warning("%s", line)
    if self.options.on_failure == "zero":
      rewards = np.where(np.isfinite(rewards), rewards, np.float32(0))
    return rewards

  def _group(
    self, captions: Sequence[str], original: np.ndarray | None, generated: np.ndarray, metadata: dict | None
  ) -> Answer:
    common: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
    rollouts = {"captions": list(captions)}
    if self.options.sends_images:
      common |= {} if original is None else {"original": png_base64(original)}
      rollouts["images"] = [png_base64(image) for image in generated]

    def ask(asked: Sequence[int]) -> list[float]:
      content = common | {field: [values[i] for i in asked] for field, values in rollouts.items()}
      return http_client.with_retries(
        lambda: read_rewards(self._client.post(content), len(asked)),
        self.options.retries,
        self.options.backoff_seconds,
      )

    try:
      if self._known is None:
        values = ask(range(len(captions)))
      else:
        values = self._known.complete(common, list(zip(*rollouts.values(), strict=True)), ask)
    except http_client.HttpFailure as error:
      status = error.status if isinstance(error, http_client.RefusedError) else 0
      return Answer([math.nan] * len(captions), str(error), status)
    missing = sum(not math.isfinite(value) for value in values)
    return Answer(values, f"{missing} of {len(values)} rewards of a group are no finite numbers" if missing else "")


def read_rewards(answer: Any, count: int) -> list[float]:
  """Reads the rewards of an answer; NaN where one is missing.

  Raises:
    PassingError: the answer does not contain `count` rewards.
  """
  rewards = answer.get("rewards") if isinstance(answer, dict) else None
  if not isinstance(rewards, list):
    raise http_client.PassingError(f'expected {{"rewards": [...]}}, found {type(answer).__name__} without that list')
  if len(rewards) != count:
    raise http_client.PassingError(f"expected {count} rewards, found {len(rewards)}")
  return [_number(value) for value in rewards]


def _number(value: Any) -> float:
  """Converts a JSON value to float; NaN unless it is a representable number."""
  try:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
  except OverflowError:
    return math.nan
