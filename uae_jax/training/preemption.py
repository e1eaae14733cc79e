"""An orderly end when the machine is taken away: SIGTERM, in which a preemption of Cloud TPU arrives too."""

from collections.abc import Iterator
import contextlib
import signal

import jax
from jax.sharding import Mesh

from uae_jax.training.processes import AnyProcess


class Preempted(Exception):
  """SIGTERM came; the state is saved."""


class PreemptionNotice:
  """Tells whether SIGTERM has come to any process; all processes get the same answer.

  A context manager: it listens inside. To be made after `processes.join`, whose own listener it replaces.
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
    """To be asked after every step by all processes; where there are several, the answer comes one step late."""
    return self._any(self._received)

  @contextlib.contextmanager
  def nothing_unsaved(self) -> Iterator[None]:
    """While nothing would be lost, a notice ends the run at once instead of at the next step.

    One of several processes cannot leave alone: there the notice waits until the block is over.

    Raises:
      Preempted: the notice came, before or inside the block.
    """
    alone = jax.process_count() == 1
    if alone and self._received:
      raise Preempted("nothing was unsaved")
    self._ends_at_once = alone
    try:
      yield
    finally:
      self._ends_at_once = False
