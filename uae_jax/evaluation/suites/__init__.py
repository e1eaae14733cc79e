"""The benchmarks of `uae-jax evaluate`: one file per suite, found by name.

A `Suite` makes images for an official scorer; a `Task` is scored here.
"""

import importlib

from uae_jax.evaluation.suites.spec import Suite
from uae_jax.evaluation.suites.task import Task

# Name -> one-line summary; the file of the same name defines `SUITE`.
SUITES = {
  "geneval": "objects, counts, colors and positions, scored by a detector",
  "geneval_plus": "GenEval++: combined constraints, scored by GPT-4.1",
  "dpg_bench": "dense prompts, scored by mPLUG questions on grids of four samples",
  "t2i_compbench": "attribute binding, relations, counts and complex prompts, ten samples per prompt",
  "wise": "WISE_Verified: world knowledge, scored 0 or 1 by a vision-language model",
  "vqa": "questions about images, with choices or free answers; accuracy by category",
  "captions": "one captioning run for CAPTURE (DetailCaps) and CompreCap",
  "unified_bench": "caption, reconstruct and score; or compare captions with a judge model",
  "text": "image-text scores by length of the prompt, and what was cut",
  "diversity": "statistics of several samples per prompt that show reward hacking",
  "transfer": "similarity of reconstructions by domain, a folder each",
}


def find(name: str) -> Suite | Task:
  """Returns the suite of a name.

  Raises:
    ValueError: there is no such suite; the message lists them.
  """
  if name not in SUITES:
    raise ValueError(f"--suite {name}: no such suite; there are {', '.join(SUITES)}")
  return importlib.import_module(f"{__name__}.{name}").SUITE
