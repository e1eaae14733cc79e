"""A judge outside: captions and pictures go out as JSON over HTTP, numbers come back.

One POST a group, all groups of a batch at once up to a limit:

    request   {"captions": [text, ...], "images": [base64 PNG, ...], "original": base64 PNG}
    answer    {"rewards": [number or null, ...]}, one for every caption

It runs on the host, between the phases of a step and never inside a jitted program. JSON and PNG, no pickle: an answer
cannot run code here.
"""

import base64
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import http.client
import io
import json
import math
import os
import random
import time
import urllib.error
import urllib.request

from absl import logging
import numpy as np
from PIL import Image

from uae_jax.algorithms.losses import require

FAILURES = ("drop", "zero", "fail")
MAX_ANSWER_BYTES = 1 << 20
# Statuses that a second try may cure: timeouts, too many requests, and errors of the server.
RETRIED_STATUSES = (408, 425, 429)


class RewardError(RuntimeError):
  """A judge gave no usable answer and the run shall not go on without it."""


class _Refused(Exception):
  """An answer that trying again will not change."""


@dataclasses.dataclass(frozen=True)
class ExternalRewardOptions:
  """
  Attributes:
    url: http:// or https:// address of the judge; "" for none.
    timeout_seconds: of one try, from connecting to the last byte.
    retries: further tries after a failed one.
    backoff_seconds: wait before the first of them; it doubles each time, with up to as much again at random.
    max_concurrency: groups that are judged at the same time.
    on_failure: what a rollout without a finite number gets: "drop" leaves it out of its group's statistics with
      advantage 0, "zero" gives the reward 0, "fail" ends the run.
    sends_images: False sends captions alone.
    token_variable: name of the environment variable that holds a bearer token; "" for none.
  """

  url: str = ""
  timeout_seconds: float = 30.0
  retries: int = 3
  backoff_seconds: float = 0.5
  max_concurrency: int = 8
  on_failure: str = "drop"
  sends_images: bool = True
  token_variable: str = ""

  def __post_init__(self):
    require("on_failure", self.on_failure, FAILURES)
    if self.url and not self.url.startswith(("http://", "https://")):
      raise ValueError(f"http_reward.url = {self.url!r}: expected http:// or https://")
    for name, least in (("timeout_seconds", 1e-3), ("retries", 0), ("backoff_seconds", 0), ("max_concurrency", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"http_reward.{name} = {getattr(self, name)}: expected {least} or more")
    if self.token_variable and not os.environ.get(self.token_variable):
      raise ValueError(f"http_reward.token_variable: the environment has no {self.token_variable}")


class ExternalReward:
  """Asks one judge about whole batches."""

  def __init__(self, options: ExternalRewardOptions):
    if not options.url:
      raise ValueError("http_reward.url is empty: 'http' in reward_weights needs the address of a judge")
    self.options = options
    self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if options.token_variable:
      self._headers["Authorization"] = f"Bearer {os.environ[options.token_variable]}"

  def __call__(self, captions: Sequence[Sequence[str]], originals: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Rewards of a batch.

    Args:
      captions: of every rollout of every prompt.
      originals: uint8[prompts, H, W, 3].
      painted: uint8[prompts, rollouts, H, W, 3].

    Returns:
      float32[prompts, rollouts]; NaN where the judge failed under on_failure = "drop".

    Raises:
      RewardError: it failed under on_failure = "fail".
    """
    with concurrent.futures.ThreadPoolExecutor(self.options.max_concurrency) as pool:
      rows = list(pool.map(self._group, captions, originals, painted))
    rewards = np.asarray([row for row, _ in rows], np.float32)
    errors = [error for _, error in rows if error]
    if errors:
      num_failed = int(np.sum(~np.isfinite(rewards)))
      line = f"{self.options.url}: {num_failed} of {rewards.size} rollouts were not judged ({errors[0]})"
      if self.options.on_failure == "fail":
        raise RewardError(line)
      logging.warning("%s", line)
    if self.options.on_failure == "zero":
      rewards = np.where(np.isfinite(rewards), rewards, np.float32(0))
    return rewards

  def _group(self, captions: Sequence[str], original: np.ndarray, painted: np.ndarray) -> tuple[list[float], str]:
    """(one number a caption, NaN where there is none; what went wrong, or "")."""
    content = {"captions": list(captions)}
    if self.options.sends_images:
      content |= {"original": png_base64(original), "images": [png_base64(image) for image in painted]}
    body, problem = json.dumps(content).encode(), ""
    for attempt in range(self.options.retries + 1):
      if attempt:
        pause = self.options.backoff_seconds * 2 ** (attempt - 1)
        time.sleep(pause * (1 + random.random()))
      try:
        values = self._ask(body, len(captions))
      except _Refused as error:
        problem = str(error)
        break
      except (OSError, http.client.HTTPException, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        continue
      missing = sum(not math.isfinite(value) for value in values)
      return values, f"{missing} of {len(values)} rewards of a group are no finite numbers" if missing else ""
    return [math.nan] * len(captions), problem

  def _ask(self, body: bytes, count: int) -> list[float]:
    """One try.

    Raises:
      _Refused: trying again will not help.
      OSError, http.client.HTTPException, ValueError: it may.
    """
    deadline = time.monotonic() + self.options.timeout_seconds
    request = urllib.request.Request(self.options.url, data=body, headers=self._headers, method="POST")
    try:
      with urllib.request.urlopen(request, timeout=self.options.timeout_seconds) as response:
        answer = _read(response, deadline)
    except urllib.error.HTTPError as error:
      if error.code < 500 and error.code not in RETRIED_STATUSES:
        raise _Refused(f"HTTP status {error.code}") from error
      raise
    answer = json.loads(answer)
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != count:
      raise ValueError(f"expected {count} rewards, got {str(rewards)[:80]}")
    return [_number(value) for value in rewards]


def _read(response, deadline: float) -> bytes:
  """The body of an answer; the socket's own timeout bounds one read, the deadline all of them."""
  parts, size = [], 0
  while part := response.read1(65536):
    parts.append(part)
    size += len(part)
    if size > MAX_ANSWER_BYTES:
      raise _Refused(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    if time.monotonic() > deadline:
      raise TimeoutError("the answer took too long")
  return b"".join(parts)


def _number(value) -> float:
  """A reward as float; what is no number, or none that a float holds, as NaN."""
  try:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
  except OverflowError:
    return math.nan


def png_base64(image: np.ndarray) -> str:
  """uint8[H, W, 3] as base64 of a PNG."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()
