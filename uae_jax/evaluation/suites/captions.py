"""One captioning run over pictures, for the scorers of captions.

| file | scorer that opens it |
|---|---|
| `captions.jsonl` | ours: `uae-jax bench --captions`; image and caption per line |
| `comprecap.json` | CompreCap, `evaluate.py --longcap_file`: {file name: caption} |
| `capture_predictions.json`, `capture_references.json` | CAPTURE: {key: [caption]}, {key: references} |

CAPTURE needs the references of DetailCaps in the field `references` of each line, and is scored here if the package
`capture_metric` is installed. The metric of this suite itself is the number of words, which reinforcement learning
moves.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from uae_jax import files
from uae_jax.evaluation.suites import pictures
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.evaluation.suites.task import Rows, Run, Task, summarize


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with the `caption`."""
  indices = [prompt.index for prompt in prompts]
  captions = run.uae.caption(pictures.load(prompts), seed=run.seed, indices=indices, **run.captions)
  return [{"caption": caption} for caption in captions]


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """Writes the files of the scorers; counts words, and scores CAPTURE where that is possible."""
  done = [prompt for prompt in prompts if prompt.key in rows]
  captions = {prompt.key: rows[prompt.key]["caption"] for prompt in done}
  pictures.write_captions(run, done, rows)
  # CompreCap looks captions up by the name of the file.
  _write_json(run, "comprecap.json", {prompt.record["image"].name: captions[prompt.key] for prompt in done})
  predictions = {key: [caption] for key, caption in captions.items()}
  references = {prompt.key: prompt.record.get("references") for prompt in done}
  _write_json(run, "capture_predictions.json", predictions)
  scores = summarize({key: float(len(caption.split())) for key, caption in captions.items()}, prompts)
  metrics, notes = {}, list(scores.notes)
  if all(references.values()):
    _write_json(run, "capture_references.json", references)
    overall, note = capture(references, predictions)
    notes += [note] if note else []
    if overall is not None:
      metrics["CAPTURE"] = Scores({}, {}, overall)
  return dataclasses.replace(scores, notes=tuple(notes), metrics=metrics)


def _write_json(run: Run, name: str, content: Mapping[str, Any]) -> None:
  files.write_whole(run.out / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def capture(references: Mapping[str, Any], predictions: Mapping[str, Any]) -> tuple[float | None, str]:
  """Scores captions by the published package; returns (score or None, note)."""
  try:
    from capture_metric.capture import CAPTURE  # type: ignore[import-not-found]
  except ImportError:
    return None, "CAPTURE is not scored here: pip install 'uae_jax[capture]', or run its package on the two files"
  try:
    overall, _ = CAPTURE().compute_score(references, predictions)
  except Exception as error:  # It loads models of its own, which may fail in any way; the captions are kept.
    return None, f"CAPTURE failed: {type(error).__name__}: {error}"[:300]
  return float(overall), ""


SUITE = Task(
  name="captions",
  prompts_file="a folder of pictures, or JSON lines with image and maybe references",
  read_prompts=pictures.read,
  work=work,
  score=score,
  makes=("captions",),
  metric="words per caption",
)
