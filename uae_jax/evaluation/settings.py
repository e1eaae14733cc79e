"""The settings of `uae-jax evaluate` that move a number: recorded in results.json, and repeated by `--like`."""

from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.evaluation import results
from uae_jax.evaluation.suites.task import Task
from uae_jax.options.sampling import EVERYWHERE

AUTO = "auto"  # the dtype of weights that are used as they are stored
CAPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
IMAGES = ("steps", "guidance", "guidance_interval", "height", "width")
# Options that take the value of another result where the command line leaves them open.
REPEATED = ("seed", "samples", *IMAGES, *CAPTIONS, "embedders")
# Settings that the table shows.
SHOWN = (
  *("steps", "guidance", "guidance_interval", "shift", "height", "width"),
  *CAPTIONS,
  *("repetition_penalty", "embedders", "samples", "seed", "weights"),
)


def common(given: Mapping[str, Any], suite: str, prompts: Sequence, weights: str) -> dict[str, Any]:
  """Settings of every suite.

  Args:
    given: options of the command line by name; None stands for an option that is left open.
    suite: name of the suite.
    prompts: its prompts.
    weights: identifies the weights: their fingerprint, or stage and step of a run.
  """
  return {
    "suite": suite,
    "prompts": results.prompts_hash(prompts),
    "num_prompts": len(prompts),
    "seed": given.get("seed") or 0,
    "dtype": given.get("dtype") or AUTO,
    "int8": bool(given.get("int8")),
    "weights": weights,
    "model": str(given.get("model", "")),
    "versions": results.versions(),
  }


def of_task(given: Mapping[str, Any], task: Task, prompts: Sequence, uae: Any, weights: str) -> dict[str, Any]:
  """Settings of a suite that is scored here, but for its embedders; arguments as for `common`, and the model."""
  settings = common(given, task.name, prompts, weights)
  settings["samples"] = given.get("samples") or task.num_samples
  if "captions" in task.makes:
    settings |= captions(given, task, uae)
  if "images" in task.makes:
    settings |= images(given, uae)
  return settings


def images(given: Mapping[str, Any], uae: Any) -> dict[str, Any]:
  """Settings of generated images."""
  default = uae.inference
  guidance = default.guidance if given.get("guidance") is None else given["guidance"]
  interval = given.get("guidance_interval") or (EVERYWHERE if guidance == 1 else default.guidance_interval)
  return {
    "height": given.get("height") or default.resolution_px,
    "width": given.get("width") or default.resolution_px,
    "steps": given.get("steps") or default.steps,
    "guidance": guidance,
    "guidance_interval": [float(limit) for limit in interval],
    "shift": default.shift,
    "sampler": default.sampler,
    "negative_prompt": uae.processor.negative_prompt,
    "text_tower": default.text_tower,
  }


def captions(given: Mapping[str, Any], task: Task, uae: Any) -> dict[str, Any]:
  """Settings of sampled captions and answers; `task` has defaults of its own."""
  default = {name: getattr(uae.inference, name) for name in CAPTIONS if name != "temperature"}
  own: dict[str, Any] = {"temperature": task.temperature}
  if task.max_new_tokens:
    own["max_new_tokens"] = task.max_new_tokens
  return {
    **default,
    **own,
    **{name: given[name] for name in CAPTIONS if given.get(name) is not None},
    "repetition_penalty": uae.inference.repetition_penalty,
    "question": uae.processor.question,
  }


def options(settings: Mapping[str, Any], batch_size: int | None, window: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings as options of `UAE.caption` and of `UAE.generate`.

  Args:
    settings: result of `of_task`.
    batch_size: that of both; None: `window` for captions, and the default of `UAE.generate` for images.
    window: items per call of the task.
  """
  batch = {"batch_size": batch_size} if batch_size else {}
  texts = {name: settings[name] for name in CAPTIONS if name in settings}
  pictures = {name: settings[name] for name in IMAGES if name in settings}
  return texts | {"batch_size": batch_size or window}, pictures | batch
