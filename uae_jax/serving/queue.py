"""A queue in front of the model: one thread owns the devices, and waiting requests of one kind share a batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
import logging
import threading
from typing import Any

from uae_jax.serving.requests import Request, RequestError

# (requests of one group) -> the results of each.
Work = Callable[[Sequence[Request]], Sequence[list]]


class Queue:
  """Requests that wait for the model, in order of arrival.

  The oldest request takes along those that have its settings, up to a batch; nothing waits for a batch to fill.

  Args:
    work: answers the requests of one group; called from one thread only.
    batch_size: results of a batch; a request of more is a batch of its own.
  """

  def __init__(self, work: Work, batch_size: int):
    self._work, self._batch_size = work, batch_size
    self._waiting: list[tuple[Request, Future]] = []
    self._changed = threading.Condition()
    self._is_open = True
    self._thread = threading.Thread(target=self._run, name="model")
    self._thread.start()

  def submit(self, request: Request) -> Future:
    """Returns the future list of `request.count` results; to cancel it takes the request out of the queue.

    Raises:
      RequestError: the queue is closed.
    """
    future: Future = Future()
    with self._changed:
      if not self._is_open:
        raise RequestError("the server is shutting down", status=503)
      self._waiting.append((request, future))
      self._changed.notify()
    return future

  def close(self) -> None:
    """Refuses further requests, and returns when the waiting ones are answered."""
    with self._changed:
      self._is_open = False
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    while batch := self._next():
      running = [(request, future) for request, future in batch if future.set_running_or_notify_cancel()]
      if running:
        self._answer(running)

  def _next(self) -> list[tuple[Request, Future]]:
    """Takes the next batch out of the queue; empty once the queue is closed and empty."""
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or not self._is_open)
      batch: list[tuple[Request, Future]] = []
      rest = []
      rows = 0
      for request, future in self._waiting:
        fits = not batch or (request.group == batch[0][0].group and rows + request.count <= self._batch_size)
        if fits:
          batch.append((request, future))
          rows += request.count
        else:
          rest.append((request, future))
      self._waiting = rest
      return batch

  def _answer(self, batch: Sequence[tuple[Request, Future]]) -> None:
    """Sets the results of a batch; if it fails, each request is tried alone, which shows whose failure it is."""
    results: Sequence[Any] = ()
    try:
      results = self._work([request for request, _ in batch])
    except Exception as error:  # The model must not end with one request.
      if len(batch) == 1:
        logging.getLogger("uae_jax").warning("a request failed: %s", error)
        batch[0][1].set_exception(error)
        return
      for one in batch:
        self._answer([one])
      return
    for (_, future), result in zip(batch, results, strict=True):
      future.set_result(result)
