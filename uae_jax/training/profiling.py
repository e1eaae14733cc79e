"""Records xprof traces of chosen steps of a stage."""

import contextlib
from pathlib import Path

import jax


class Profiler:
  """Traces a stage's steps `first_step .. first_step + num_steps - 1`, on every process.

  A resumed stage traces those of the steps that it still has to do.

  Args:
    folder: folder of the traces, to be opened by xprof or TensorBoard.
    first_step: first traced step, counted from 1.
    num_steps: number of traced steps; 0 disables tracing.
  """

  def __init__(self, folder: Path, *, first_step: int, num_steps: int):
    self._folder = folder
    self._steps = range(first_step, first_step + num_steps)
    self._is_tracing = False

  @contextlib.contextmanager
  def step(self, number: int):
    """Context for the host's work of one step, which it marks in the trace."""
    if number in self._steps and not self._is_tracing:
      options = jax.profiler.ProfileOptions()
      # A trace of every Python call would hide the annotations.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._is_tracing = True
    with jax.profiler.StepTraceAnnotation("step", step_num=number):
      yield

  def end_step(self, number: int, state) -> None:
    """Ends the trace after its last step, once `state`, the result of the step, is computed."""
    if self._is_tracing and number + 1 not in self._steps:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes the trace of a stage that ends early."""
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    self.close()
