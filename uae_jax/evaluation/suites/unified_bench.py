"""Unified-Bench in one command: caption, reconstruct, and score as `uae-jax bench` does, which it runs.

`--embedders` scores the reconstructions by protocol 1, `--judge-url` the captions by protocol 2. Official results are
`unified_bench.json` and `judge.json` in the output folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uae_jax.evaluation import intervals
from uae_jax.evaluation.suites import pictures
from uae_jax.evaluation.suites.spec import Prompt, Scores, SuiteError, missing_note, read_json
from uae_jax.evaluation.suites.task import Rows, Run, Task

OFFICIAL = ("clip", "longclip", "dinov2", "dinov3")


def read_prompts(folder: Path) -> list[Prompt]:
  """Reads the folder of original pictures."""
  return pictures.read_folder(folder)


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with `caption` and `reconstruction`."""
  _, _, rows = pictures.reconstruct(run, prompts)
  return rows


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores | None:
  """Runs both protocols where their options are given; the scores are those of protocol 1."""
  done = [prompt for prompt in prompts if prompt.key in rows]
  captions = pictures.write_captions(run, done, rows)
  if run.judge:
    models = [part for model in run.judge["judge_model"] for part in ("--judge-model", model)]
    arguments = ["--captions", str(captions), "--against", str(run.judge["against"]), *models]
    arguments += ["--cache", str(run.out / "judge_cache")]
    run_bench(run, done, "judge.json", ["--judge-url", run.judge["judge_url"], *arguments])
  if not run.embedder_paths:
    return None
  embedders = ",".join(f"{kind}={path}" for kind, path in run.embedder_paths.items())
  arguments = ["--images", str(run.out / pictures.RECONSTRUCTIONS), "--embedders", embedders, "--suffixes", "all"]
  file = run_bench(run, done, "unified_bench.json", arguments)
  return official_scores(file, prompts, rows)


def run_bench(run: Run, done: Sequence[Prompt], name: str, arguments: Sequence[str]) -> Path:
  """Runs `uae-jax bench` on the pictures that are done; returns its result file."""
  file, first = run.out / name, done[0]
  folder = first.record["image"].parents[len(Path(first.key).parts) - 1]
  if run.bench is None:
    raise SuiteError("unified_bench is scored by uae-jax bench, which does not run while a stage trains")
  run.bench(
    ["--references", str(folder), "--out", str(file), *arguments],
    [prompt.record["image"] for prompt in done],
  )
  return file


def official_scores(file: Path, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """The scores of an official result: per picture the mean over the embedders, per embedder its average."""
  result = read_json(file)
  by_kind, items = result["similarities_by_model"], {}
  for prompt in prompts:
    if prompt.key in rows:
      name = Path(rows[prompt.key]["reconstruction"]).name
      values = [value for found in by_kind.values() if (value := found.get(name)) is not None]
      if len(values) == len(by_kind):
        items[prompt.key] = sum(values) / len(values)
  if not items:
    raise SuiteError(f"{file}: no picture has a similarity under every embedder")
  averages = result["summary"]["average_scores_by_model"]
  ends = {
    kind: intervals.bootstrap([value for value in by_kind[kind].values() if value is not None]) for kind in averages
  }
  ends["overall"] = intervals.bootstrap(list(items.values()))
  missing = [prompt.key for prompt in prompts if prompt.key not in items]
  notes = missing_note(missing, len(prompts))
  if set(by_kind) != set(OFFICIAL):
    notes.append(f"the published overall scores are means over {', '.join(OFFICIAL)}")
  metrics = {}
  if len(by_kind) > 1:
    keys = {Path(rows[prompt.key]["reconstruction"]).name: prompt.key for prompt in prompts if prompt.key in rows}
    for kind, found in by_kind.items():
      known = {keys[name]: value for name, value in found.items() if value is not None and name in keys}
      metrics[kind] = Scores(known, {}, averages[kind], intervals={"overall": ends[kind]})
  return Scores(items, averages, result["summary"]["overall_average"], tuple(notes), ends, metrics)


SUITE = Task(
  name="unified_bench",
  prompts_file="the folder of original pictures",
  read_prompts=read_prompts,
  work=work,
  score=score,
  makes=("captions", "images"),
  runs_bench=True,
  metric="mean similarity",
  scale=100.0,
  published={"UAE": 86.09, "GPT-4o-Image": 85.95, "BAGEL": 83.48, "Janus-Pro": 82.77},  # arXiv 2509.09666
)
