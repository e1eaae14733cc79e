"""Handling of preemption: SIGTERM, which Cloud TPU sends too, and Ctrl-C end a run after its state is saved."""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading

import jax
from jax.sharding import Mesh

from uae_jax.training.processes import AnyProcess

INTERRUPTED = 130  # The exit code of a process that Ctrl-C ended.


class Preempted(Exception):
  """Raised after SIGTERM or Ctrl-C, once the state is saved."""


class PreemptionNotice:
  """Context manager that detects SIGTERM and Ctrl-C in any process; all processes get the same answer.

  A second Ctrl-C ends the process at once, without saving. It handles the signals inside the `with` block only. Create
  it after `processes.join`, whose signal handler it replaces.

  Attributes:
    is_interrupt: whether this process received Ctrl-C.
  """

  def __init__(self, mesh: Mesh):
    self.is_interrupt = False
    self._received = False
    self._ends_at_once = False
    self._any = AnyProcess(mesh)

  def __enter__(self) -> "PreemptionNotice":
    self._previous = {name: signal.signal(name, self._receive) for name in (signal.SIGTERM, signal.SIGINT)}
    # Python runs handlers between two instructions of the main thread, which a compilation can delay by minutes. The
    # numbers of signals arrive at this file descriptor at once.
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    self._watcher = threading.Thread(target=_watch, args=(self._reader,), name="ctrl-c", daemon=True)
    self._watcher.start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._previous_fd)
    for name, handler in self._previous.items():
      signal.signal(name, handler)
    os.close(self._writer)
    self._watcher.join()

  def _receive(self, signal_number: int, _):
    self._received = True
    self.is_interrupt = self.is_interrupt or signal_number == signal.SIGINT
    if self._ends_at_once:
      raise Preempted("nothing was unsaved")

  def __call__(self) -> bool:
    """Returns whether a signal was received; every process must call it after every step.

    With several processes, the answer is that of the previous call.
    """
    return self._any(self._received)

  @contextlib.contextmanager
  def nothing_unsaved(self) -> Iterator[None]:
    """Context in which there is no unsaved work, so that a signal ends the run at once instead of after the next step.

    With several processes, one cannot end alone: a signal is then handled after the block.

    Raises:
      Preempted: a signal was received before or inside the block.
    """
    alone = jax.process_count() == 1
    if alone and self._received:
      raise Preempted("nothing was unsaved")
    self._ends_at_once = alone
    try:
      yield
    finally:
      self._ends_at_once = False


def _watch(reader: int) -> None:
  """Answers each Ctrl-C at once: the first with a message, the second by ending the process."""
  count = 0
  while received := os.read(reader, 1):
    if received[0] != signal.SIGINT:
      continue
    count += 1
    if count == 1:
      print(
        "\ninterrupted: the run saves and ends after this step; Ctrl-C again ends it at once",
        file=sys.stderr,
        flush=True,
      )
    else:
      print("\nended without saving", file=sys.stderr, flush=True)
      os._exit(INTERRUPTED)
  os.close(reader)
