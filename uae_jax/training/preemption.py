"""Handling of preemption: SIGTERM, the signal that Cloud TPU sends too, ends a run after its state is saved."""

from collections.abc import Iterator
import contextlib
import signal

import jax
from jax.sharding import Mesh

from uae_jax.training.processes import AnyProcess


class Preempted(Exception):
  """Raised after SIGTERM, once the state is saved."""


class PreemptionNotice:
  """Context manager that detects SIGTERM in any process; all processes get the same answer.

  It handles the signal inside the `with` block only. Create it after `processes.join`, whose signal handler it
  replaces.
  """

  def __init__(self, mesh: Mesh):
    self._received = False
    self._ends_at_once = False
    self._any = AnyProcess(mesh)

  def __enter__(self) -> "PreemptionNotice":
    self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *_):
    signal.signal(signal.SIGTERM, self._previous)

  def _receive(self, *_):
    self._received = True
    if self._ends_at_once:
      raise Preempted("nothing was unsaved")

  def __call__(self) -> bool:
    """Returns whether SIGTERM was received; every process must call it after every step.

    With several processes, the answer is that of the previous call.
    """
    return self._any(self._received)

  @contextlib.contextmanager
  def nothing_unsaved(self) -> Iterator[None]:
    """Context in which there is no unsaved work, so that SIGTERM ends the run at once instead of after the next step.

    With several processes, one cannot end alone: SIGTERM is then handled after the block.

    Raises:
      Preempted: SIGTERM was received before or inside the block.
    """
    alone = jax.process_count() == 1
    if alone and self._received:
      raise Preempted("nothing was unsaved")
    self._ends_at_once = alone
    try:
      yield
    finally:
      self._ends_at_once = False
