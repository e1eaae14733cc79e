"""Rewards that a server has given, by the content of the rollout: what is known is not asked for again."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
import math
import threading
from typing import Any


class KnownRewards:
  """The latest rewards, at most `size`; for threads.

  Args:
    size: number of rewards that are kept.
  """

  def __init__(self, size: int):
    self._size, self._lock = size, threading.Lock()
    self._rewards: OrderedDict[bytes, float] = OrderedDict()

  def complete(
    self, common: Mapping[str, Any], items: Sequence[Any], ask: Callable[[Sequence[int]], list[float]]
  ) -> list[float]:
    """Returns the rewards of the rollouts of a group, in order; asks for each unknown one once.

    Args:
      common: JSON object of what the group has in common.
      items: JSON value of each rollout.
      ask: indices of rollouts -> their rewards; not called if all are known.
    """
    prefix = json.dumps(common, sort_keys=True)
    keys = [hashlib.sha256(f"{prefix}\n{json.dumps(item)}".encode()).digest() for item in items]
    with self._lock:
      found = {key: self._rewards[key] for key in keys if key in self._rewards}
    unknown = {key: i for i, key in enumerate(keys) if key not in found}
    new = dict(zip(unknown, ask(list(unknown.values())), strict=True)) if unknown else {}
    with self._lock:
      for key, reward in (found | new).items():
        if math.isfinite(reward):
          self._rewards[key] = reward
          self._rewards.move_to_end(key)
      while len(self._rewards) > self._size:
        self._rewards.popitem(last=False)
    return [(found | new)[key] for key in keys]
