"""Measures the time of a stage's steps by phase, and its throughput: images, tokens, FLOP/s and MFU."""

from collections.abc import Callable, Mapping
import contextlib
import math
import time

import jax
import numpy as np

from uae_jax.training.state import State

# Peak dense bfloat16 FLOP/s per chip, by the `device_kind` of JAX. Devices that are not listed have no MFU.
# Source: cloud.google.com/tpu/docs, pages of v4, v5e, v5p, v6e, 7x; NVIDIA data sheets A100, H100 SXM, H200 SXM.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}
# Number of devices as which JAX shows one chip, if not 1.
DEVICES_PER_CHIP = {"TPU7x": 2}


class StepClock:
  """Measures the steps between two log lines. The first step of each shape, which compiles, is not counted.

  Args:
    flops: () -> matrix FLOPs of the last step on all chips together.
    num_rollouts: number of images generated per image of the batch; 1 for supervised stages.
  """

  def __init__(self, flops: Callable[[], float], *, num_rollouts: int = 1):
    self._flops, self._num_rollouts = flops, num_rollouts
    kind = jax.devices()[0].device_kind
    self._num_chips = jax.device_count() / DEVICES_PER_CHIP.get(kind, 1)
    self._peak_flops = PEAK_FLOPS.get(kind)
    self._shapes: set[tuple[int, ...]] = set()
    self._of_step: dict[str, float] = {}
    self._begin()

  def _begin(self) -> None:
    self._num_steps, self._num_images, self._step_flops = 0, 0, 0.0
    self._num_tokens: list[tuple[jax.Array, int]] = []
    self._seconds: dict[str, float] = {}
    self._start = self._end = time.perf_counter()

  def _add_seconds(self, name: str, seconds: float) -> None:
    self._of_step[name] = self._of_step.get(name, 0.0) + seconds

  @contextlib.contextmanager
  def phase(self, name: str):
    """Context whose wall time on the host is added to `seconds_<name>`; also marked in a trace."""
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
      yield
    self._add_seconds(f"seconds_{name}", time.perf_counter() - start)

  @contextlib.contextmanager
  def paused(self, state: State):
    """Context whose time does not count, for evaluation and saving; first waits until `state` is computed."""
    jax.block_until_ready(state)
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    self._start, self._end = self._start + seconds, self._end + seconds

  def end_step(self, state: State, batch: dict, metrics: Mapping) -> None:
    """Counts one step.

    Args:
      state: state after the step.
      batch: batch of the step, with `image` uint8[B, ..., H, W, 3].
      metrics: metrics of the step. Reads `seconds_*`, host floats, and `caption_length`, the mean number of tokens per
        image, without waiting for it.
    """
    for name, value in metrics.items():
      if name.startswith("seconds_"):
        self._add_seconds(name, value)
    of_step, self._of_step = self._of_step, {}
    shape = batch["image"].shape
    if shape not in self._shapes:
      self._shapes.add(shape)
      jax.block_until_ready(state)
      now = time.perf_counter()
      self._start, self._end = self._start + now - self._end, now
      return
    self._end = time.perf_counter()
    for name, value in of_step.items():
      self._seconds[name] = self._seconds.get(name, 0.0) + value
    num_images = math.prod(shape[:-3]) * self._num_rollouts
    self._num_steps += 1
    self._step_flops += self._flops()
    self._num_images += num_images
    if "caption_length" in metrics:
      self._num_tokens.append((metrics["caption_length"], num_images))

  def read(self, state: State) -> dict[str, float]:
    """Returns the measurements since the last call; empty if there was no step.

    Args:
      state: state after the last step; it is waited for.

    Returns:
      `seconds_step`, the mean wall time per step, and its parts `seconds_data`, `seconds_rollout`, ...;
      `images_per_second_per_chip`, `tokens_per_second_per_chip`, `tflops_per_second_per_chip`; and `mfu`, the fraction
      of the chip's peak FLOP/s, if the peak is known.
    """
    jax.block_until_ready(state)
    seconds, steps = time.perf_counter() - self._start, self._num_steps
    measured = {}
    if steps:
      chip_seconds = seconds * self._num_chips
      flops = self._step_flops / chip_seconds
      measured = {"seconds_step": seconds / steps}
      measured |= {name: value / steps for name, value in self._seconds.items()}
      measured["images_per_second_per_chip"] = self._num_images / chip_seconds
      if self._num_tokens:
        num_tokens = sum(float(np.asarray(length)) * count for length, count in self._num_tokens)
        measured["tokens_per_second_per_chip"] = num_tokens / chip_seconds
      measured["tflops_per_second_per_chip"] = flops / 1e12
      if self._peak_flops is not None:
        measured["mfu"] = flops / self._peak_flops
    self._begin()
    return measured
