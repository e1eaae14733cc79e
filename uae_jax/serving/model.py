"""Answers a batch of requests with a UAE."""

from collections.abc import Sequence
import itertools

from uae_jax.api import UAE
from uae_jax.serving.requests import Request


class Model:
  """Calls a UAE for requests of one group.

  The noise of result i of a request depends on the seed of the request and i only. A request without a seed takes the
  seed of the server, and in place of i the number of results that such requests had before.

  Args:
    uae: the model.
    seed: seed of requests without one.
    batch_size: rows per program; by default as for the methods of `UAE`.
  """

  def __init__(self, uae: UAE, seed: int, batch_size: int | None):
    self._uae, self._seed = uae, seed
    self._batch = {} if batch_size is None else {"batch_size": batch_size}
    self._unseeded = itertools.count()

  def __call__(self, requests: Sequence[Request]) -> list[list]:
    kind, seed, settings = requests[0].kind, requests[0].seed, dict(requests[0].settings)
    rows = [(request, index) for request in requests for index in range(request.count)]
    settings |= {
      "seed": self._seed if seed is None else seed,
      "indices": [next(self._unseeded) if seed is None else index for _, index in rows],
      **self._batch,
    }
    texts = [request.text for request, _ in rows]
    if kind == "image":
      results = self._uae.generate(texts, **settings)
    else:
      results = self._uae.answer([request.image for request, _ in rows if request.image is not None], texts, **settings)
    results = iter(results)
    return [list(itertools.islice(results, request.count)) for request in requests]
