"""xprof traces of chosen steps of a stage."""

import contextlib
from pathlib import Path

import jax


class Profiler:
  """Traces a stage's steps `first_step .. first_step + num_steps - 1`, counted from 1; none of them for 0.

  On every process, into one folder that xprof and TensorBoard open. A resumed stage traces those that it still passes.
  """

  def __init__(self, folder: Path, *, first_step: int, num_steps: int):
    self._folder = folder
    self._steps = range(first_step, first_step + num_steps)
    self._is_tracing = False

  @contextlib.contextmanager
  def step(self, number: int):
    """Around what the host does for a step; marks it in a trace."""
    if number in self._steps and not self._is_tracing:
      options = jax.profiler.ProfileOptions()
      # Every Python call would bury the annotations.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._is_tracing = True
    with jax.profiler.StepTraceAnnotation("step", step_num=number):
      yield

  def end_step(self, number: int, state) -> None:
    """Ends the trace after its last step, once the devices have done it. state: what the step returned."""
    if self._is_tracing and number + 1 not in self._steps:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes what a stage that ends early has traced."""
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    self.close()
