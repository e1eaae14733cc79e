"""The settings of `uae-jax evaluate` that move a number: recorded in results.json, and repeated by `--like`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.commands import command_line, model_arguments

AUTO = "auto"  # the dtype of weights that are used as they are stored
CAPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
# Options that take the value of another result where the command line leaves them open.
REPEATED = ("seed", "samples", "steps", "guidance", "height", "width", *CAPTIONS, "embedders")
# Settings that the table shows.
SHOWN = (
  *("steps", "guidance", "shift", "height", "width"),
  *CAPTIONS,
  *("repetition_penalty", "embedders", "samples", "seed", "weights"),
)


def common(arguments: argparse.Namespace, suite: str, prompts: Sequence, uae: Any) -> dict[str, Any]:
  """Settings of every suite."""
  from uae_jax.evaluation import results

  return {
    "suite": suite,
    "prompts": results.prompts_hash(prompts),
    "num_prompts": len(prompts),
    "seed": arguments.seed,
    "dtype": arguments.dtype or AUTO,
    "int8": arguments.int8,
    "weights": uae.fingerprint(),
    "model": str(arguments.model),
    "versions": results.versions(),
  }


def images(arguments: argparse.Namespace, uae: Any) -> dict[str, Any]:
  """Settings of generated images."""
  default = uae.inference
  return {
    "height": arguments.height or default.resolution_px,
    "width": arguments.width or default.resolution_px,
    "steps": arguments.steps or default.steps,
    "guidance": default.guidance if arguments.guidance is None else arguments.guidance,
    "shift": default.shift,
    "sampler": "euler",
    "negative_prompt": uae.processor.negative_prompt,
    "text_tower": default.text_tower,
  }


def captions(arguments: argparse.Namespace, task: Any, uae: Any) -> dict[str, Any]:
  """Settings of sampled captions and answers; `task` has defaults of its own."""
  given = command_line.given(arguments, *CAPTIONS)
  default = {name: getattr(uae.inference, name) for name in CAPTIONS if name != "temperature"}
  own = {"temperature": task.temperature}
  if task.max_new_tokens:
    own["max_new_tokens"] = task.max_new_tokens
  return {
    **default,
    **own,
    **given,
    "repetition_penalty": uae.inference.repetition_penalty,
    "question": uae.processor.question,
  }


def options(settings: Mapping[str, Any], arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings as options of `UAE.caption` and of `UAE.generate`."""
  batch = {"batch_size": arguments.batch_size} if arguments.batch_size else {}
  texts = {name: settings[name] for name in CAPTIONS if name in settings}
  pictures = {name: settings[name] for name in ("steps", "guidance", "height", "width") if name in settings}
  return texts | {"batch_size": arguments.batch_size or model_arguments.WINDOW}, pictures | batch
