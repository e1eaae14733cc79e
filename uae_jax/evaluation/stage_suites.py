"""Suites of `uae-jax evaluate` at small size on the averaged policy of a stage, before, while and after it trains.

The newest result of a stage is in `evaluation/suites/<stage>/<suite>` of the workdir, so that `uae-jax compare` puts
two stages side by side.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from pathlib import Path
import re
import shutil
import tempfile
from typing import Any

from absl import logging
import jax
import numpy as np
from PIL import Image

from uae_jax.data.images import ImageSource, read_image
from uae_jax.evaluation import rows, settings, suites, tasks
from uae_jax.evaluation.reconstruction import Reconstructor
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.evaluation.suites.task import Run, Task
from uae_jax.models.system import nets_of
from uae_jax.options import Experiment, SuiteEvaluationOptions

BATCH = 8  # items per call of a suite


def check(config: Experiment) -> None:
  """Checks that the suites of a config can run, before anything is loaded or written.

  Raises:
    ValueError: one cannot; the message names the field.
  """
  evaluation = config.evaluation
  if not evaluation.suites.names:
    return
  if not evaluation.num_images:
    raise ValueError("config.evaluation.suites.names needs config.evaluation.num_images of 1 or more")
  try:
    opened = find(evaluation.suites)
  except (ValueError, OSError) as error:
    raise ValueError(f"config.evaluation.suites.names: {error}") from error
  for task, _ in opened:
    if task.embedders == "needed" and not evaluation.embedders:
      raise ValueError(f"config.evaluation.suites.names: {task.name} needs config.evaluation.embedders")


def find(options: SuiteEvaluationOptions) -> list[tuple[Task, list[Prompt]]]:
  """Opens the suites of a config.

  Raises:
    ValueError: a suite is unknown, is not scored here, needs what a run does not have, or its prompts are not readable.
  """
  found = []
  for name in options.names:
    suite, _, path = name.partition(":")
    task = suites.find(suite)
    if not isinstance(task, Task) or not is_able(suite):
      able = [name for name in suites.SUITES if is_able(name)]
      raise ValueError(f"{suite} cannot run while a stage trains; expected some of {', '.join(able)}")
    if not Path(path).exists():
      raise ValueError(f"{path}: no such file; {suite} needs {task.prompts_file}")
    found.append((task, task.read_prompts(Path(path))[: options.limit]))
  return found


def is_able(name: str) -> bool:
  """Whether a suite is scored here with nothing but the model and image embedders."""
  suite = suites.find(name)
  return isinstance(suite, Task) and not suite.runs_bench and suite.embedders != "text"


@dataclasses.dataclass(frozen=True)
class StageEmbedder:
  """An embedder of the run, in the form of `embedders.host.Embedder`.

  Attributes:
    reconstructor: runs the embedders of the run.
    params: parameters of the run.
    kind: name of the embedder.
  """

  reconstructor: Reconstructor
  params: dict
  kind: str

  def embed(self, images: Sequence[ImageSource]) -> np.ndarray:
    """Embeds images of any size as unit-norm float32[B, E]; each is stretched to the embedder's square."""
    side = self.reconstructor.networks.embedders[self.kind].image_px
    pixels = [np.asarray(read_image(image).resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return self.reconstructor.embed(self.params, self.kind, np.stack(pixels))


class StageSuites:
  """The suites of `config.evaluation.suites`; all processes of a run work on them together.

  Args:
    opened: result of `find`.
    uae: the model of the run, an `api.UAE`; its parameters are replaced by those of each call.
    reconstructor: runs the embedders of the run.
    kinds: embedders of suites that use some.
    workdir: folder of the run.
  """

  def __init__(
    self,
    opened: Sequence[tuple[Task, list[Prompt]]],
    uae: Any,
    reconstructor: Reconstructor,
    kinds: Sequence[str],
    workdir: Path,
  ):
    self._opened, self._uae, self._reconstructor, self._kinds = opened, uae, reconstructor, kinds
    self._folder = Path(workdir) / "evaluation" / "suites"

  def evaluate(self, folder: str, step: int, params: dict) -> dict[str, float]:
    """Runs all suites.

    Args:
      folder: name of the stage's folder.
      step: number of updates done in it.
      params: averaged parameters of the UAE and the embedders.

    Returns:
      "suite_<name>", and "suite_<name>_<category or metric>" -> score.
    """
    self._uae.params = nets_of(params)
    figures: dict[str, float] = {}
    for task, prompts in self._opened:
      with self._out(folder, task.name) as out:
        scores = self._scores(task, prompts, out, f"{folder}, step {step}", params)
      if scores is not None:
        figures |= figures_of(f"suite_{task.name}", scores)
    self._uae.params = {}  # or they would stay in memory
    return figures

  def _scores(self, task: Task, prompts: list[Prompt], out: Path, weights: str, params: dict) -> Scores | None:
    uae = self._uae
    plain = settings.of_task({}, task, prompts, uae, weights)
    captions, images = settings.options(plain, None, BATCH)
    used = self._kinds if task.embedders else ()
    if used:
      plain["embedders"] = ",".join(used)
    embedders = {kind: StageEmbedder(self._reconstructor, params, kind) for kind in used}
    run = Run(
      out=out, uae=uae, bench=None, samples=plain["samples"], captions=captions, images=images, embedders=embedders
    )
    failed = rows.make(task, run, prompts, (0, 1), BATCH)
    for key, why in failed.items():
      logging.warning("%s: %s: %s", task.name, key, why)
    scores, _ = tasks.finish(task, run, prompts, rows.read(out), failed, plain)
    return scores

  @contextlib.contextmanager
  def _out(self, folder: str, name: str) -> Iterator[Path]:
    """An empty folder: process 0 keeps its files, the others write the same ones to nowhere."""
    if jax.process_index() > 0:
      with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
      return
    out = self._folder / folder / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    yield out


def figures_of(name: str, scores: Scores) -> dict[str, float]:
  """Scores as metrics: overall, by category, and the overall of each further metric."""
  found = {name: scores.overall}
  further = {title: metric.overall for title, metric in scores.metrics.items()}
  for title, value in (dict(scores.categories) | further).items():
    found[f"{name}_{re.sub(r'[^0-9a-zA-Z]+', '_', title).strip('_')}"] = value
  return {title: float(value) for title, value in found.items()}
