"""Suites over pictures and prompts that are scored here: files of other scorers, similarities, statistics."""

import json
import sys
import types

import numpy as np
import pytest
from stand_in import StandIn, gray

from uae_jax import cli, embedders
from uae_jax.commands import bench, model_arguments
from uae_jax.evaluation import image_statistics, results
from uae_jax.evaluation.suites import text

pytestmark = pytest.mark.fast


class Shade:
  """An embedder that turns gray levels into angles: similarity is the cosine of a difference of levels."""

  params = {"w": np.ones(1)}

  def embed(self, images, **options):
    angles = np.asarray([np.asarray(image).mean() for image in images]) / 100
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


class ShadeOfText(Shade):
  """The same, with a text tower that reads up to 3 words and takes the last one of them as the level."""

  text = types.SimpleNamespace(max_tokens=3)

  def __init__(self):
    self.text.embed = lambda texts: (self._of(texts), [len(text.split()) for text in texts])

  def _of(self, texts):
    return Shade().embed([gray(int(text.split()[-1])) for text in texts])


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
  """(function that runs `uae-jax evaluate` on the stand-in, its result, the stand-in)."""
  uae = StandIn()
  monkeypatch.setattr(model_arguments, "load", lambda arguments: uae)
  monkeypatch.setattr(embedders, "load", lambda kind, path, **options: Shade())

  def run(suite, prompts, *more, code=0):
    argv = ["evaluate", "--suite", suite, "--prompts", str(prompts), "--model", "m", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, *more]) == code
    return results.read(tmp_path / "out")

  return run, uae


def pictures(folder, **levels):
  for name, level in levels.items():
    file = folder / f"{name.replace('__', '/')}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    gray(level).save(file)
  return folder


def test_one_captioning_run_writes_the_files_of_every_scorer(evaluate, tmp_path):
  run, uae = evaluate
  scores = run("captions", pictures(tmp_path / "in", a=10, b=20))["scores"]
  out = tmp_path / "out"
  # CompreCap joins the key to its folder of images; CAPTURE takes the first caption of a list.
  assert json.loads((out / "comprecap.json").read_text()) == {"a.png": "gray 10", "b.png": "gray 20"}
  assert json.loads((out / "capture_predictions.json").read_text()) == {"a.png": ["gray 10"], "b.png": ["gray 20"]}
  lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
  assert [line["caption"] for line in lines] == ["gray 10", "gray 20"]
  assert scores["overall"] == 2.0 and uae.count("caption") == 2


def test_capture_is_scored_by_its_package_where_there_are_references(evaluate, tmp_path, monkeypatch):
  run, _ = evaluate
  pictures(tmp_path, a=10)
  (tmp_path / "in.jsonl").write_text(json.dumps({"image": "a.png", "references": ["gray", "dark"]}) + "\n")
  seen = []

  class Capture:
    def compute_score(self, references, predictions):
      seen.append((references, predictions))
      return 0.5, [0.5]

  package = types.ModuleType("capture_metric.capture")
  package.CAPTURE = Capture
  monkeypatch.setitem(sys.modules, "capture_metric", types.ModuleType("capture_metric"))
  monkeypatch.setitem(sys.modules, "capture_metric.capture", package)
  found = run("captions", tmp_path / "in.jsonl")
  assert found["scores"]["metrics"]["CAPTURE"]["overall"] == 0.5
  assert seen == [({"a.png": ["gray", "dark"]}, {"a.png": ["gray 10"]})]


def test_unified_bench_is_captioned_reconstructed_and_scored(evaluate, tmp_path, capsys):
  run, uae = evaluate
  folder = pictures(tmp_path / "in", a=10, sub__b=20, c=30)
  uae.generate = lambda prompts, **options: [gray(int(prompt.split()[-1]) + 10) for prompt in prompts]
  found = run("unified_bench", folder, "--embedders", "clip=x,dinov2=y", "--limit", "2")
  official = json.loads((tmp_path / "out/unified_bench.json").read_text())
  assert official["summary"]["overall_average"] == pytest.approx(np.cos(0.1), abs=1e-6)
  assert found["scores"]["overall"] == official["summary"]["overall_average"]
  assert found["scores"]["categories"] == official["summary"]["average_scores_by_model"]
  assert set(found["scores"]["items"]) == {"a.png", "c.png"}
  shown = capsys.readouterr()
  assert "86.09 (published)" in shown.out and "no reconstruction" not in shown.err


def test_unified_bench_gives_captions_to_the_judge(evaluate, tmp_path, monkeypatch):
  run, _ = evaluate
  asked = []
  monkeypatch.setattr(bench, "judge", lambda arguments: asked.append(arguments) or 0)
  judge = ("--judge-url", "http://h/v1", "--judge-model", "m1", "--judge-model", "m2", "--against", "b.jsonl")
  run("unified_bench", pictures(tmp_path / "in", a=10), *judge)
  assert asked[0].judge_model == ["m1", "m2"] and asked[0].captions == tmp_path / "out/captions.jsonl"
  assert cli.main(["evaluate", "--suite", "unified_bench", "--prompts", "in", "--out", "o", *judge[:4]]) == 1


def test_transfer_has_a_row_per_domain(evaluate, tmp_path):
  run, _ = evaluate
  folder = pictures(tmp_path / "in", photos__a=10, photos__b=20, art__a=30)
  found = run("transfer", folder, "--embedders", "clip=x,dinov2=y")
  assert found["scores"]["categories"] == {"art": pytest.approx(1), "photos": pytest.approx(1)}
  assert set(found["scores"]["metrics"]) == {"clip", "dinov2"} and "photos" in found["scores"]["intervals"]
  assert found["prompt_categories"]["photos/a.png"] == "photos" and "clip" in found["settings"]["embedder_weights"]
  assert len(list((tmp_path / "out/reconstructions/photos").iterdir())) == 2


def test_a_damaged_reconstruction_is_made_again(evaluate, tmp_path):
  run, uae = evaluate
  arguments = ("transfer", pictures(tmp_path / "in", art__a=10, art__b=30), "--embedders", "clip=x")
  run(*arguments)
  file = tmp_path / "out/reconstructions/art/recon_b.png"
  whole = file.read_bytes()
  file.write_bytes(whole[: len(whole) // 2])
  found = run(*arguments)
  assert uae.count("generate") == 3 and file.read_bytes() == whole and len(found["scores"]["items"]) == 2


@pytest.mark.parametrize(
  "suite, levels, more, message",
  [
    ("transfer", {"a": 1}, ["--embedders", "clip=x"], "one subfolder per domain"),
    ("transfer", {"d__a": 1}, [], "needs --embedders"),
    ("text", {"a": 1}, ["--embedders", "clip=x"], "expected a text file"),
    ("vqa", {"a": 1}, [], "expected a file of questions"),
    ("geneval", {"a": 1}, [], "in"),
    ("genval", {"a": 1}, [], "no such suite"),
  ],
)
def test_wrong_inputs_are_named(evaluate, tmp_path, capsys, suite, levels, more, message):
  run, _ = evaluate
  run(suite, pictures(tmp_path / "in", **levels), *more, code=1)
  shown = capsys.readouterr().err.strip()
  assert message in shown and shown.count("\n") == 0


def test_text_scores_by_length_and_what_was_cut(evaluate, tmp_path, monkeypatch, capsys):
  run, _ = evaluate
  monkeypatch.setattr("uae_jax.embedders.text.load", lambda kind, path: ShadeOfText())
  (tmp_path / "prompts.txt").write_text("gray 50\n" + "gray " * 20 + "30\n" + "gray " * 40 + "10\n")
  result = run("text", tmp_path / "prompts.txt", "--embedders", "clip=x")
  found = result["scores"]
  assert result["prompt_categories"]["1"] == "17 to 32 tokens"
  assert list(found["categories"]) == ["1 to 16 tokens", "17 to 32 tokens", "33 to 64 tokens"]
  assert found["overall"] == pytest.approx(1.0)
  assert "clip read 1 of 3 prompts whole, 2 were cut" in found["notes"]
  assert [text.bin_of(n) for n in (16, 17, 2048, 2049)] == [
    "1 to 16 tokens",
    "17 to 32 tokens",
    "1025 to 2048 tokens",
    "over 2048 tokens",
  ]


def test_diversity_measures_groups_of_samples(evaluate, tmp_path):
  run, uae = evaluate
  noises = []

  def generate(prompts, *, latents, **options):
    noises.append(np.asarray(latents))
    return [gray(level) for level in range(0, 100, 10)[: len(prompts)]]

  uae.generate = generate
  (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
  arguments = (tmp_path / "prompts.txt", "--samples", "3", "--batch-size", "1", "--embedders", "clip=x")
  found = run("diversity", *arguments)["scores"]
  pairs = [1 - np.cos(0.1), 1 - np.cos(0.2), 1 - np.cos(0.1)]
  assert found["metrics"]["clip distance"]["overall"] == pytest.approx(np.mean(pairs), abs=1e-6)
  assert found["overall"] == 0.0 and found["metrics"]["saturation"]["overall"] == 0.0
  assert len(list((tmp_path / "out/00001").iterdir())) == 3
  # Every sample of every prompt has noise of its own.
  assert len({noise.tobytes() for batch in noises for noise in batch}) == 6


def test_image_statistics_have_the_values_of_their_formulas():
  black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
  halves = np.concatenate([black, white], axis=1)
  assert image_statistics.edge_density(black) == 0 and image_statistics.edge_density(halves) == pytest.approx(1 / 17)
  assert image_statistics.color_entropy(white) == 0 and image_statistics.color_entropy(halves) == pytest.approx(1)
  red = np.zeros((9, 9, 3), np.uint8)
  red[..., 0] = 200
  assert image_statistics.saturation(red) == 1 and image_statistics.saturation(halves) == 0
  assert image_statistics.pairwise_distance(np.asarray([[1.0, 0], [0, 1], [1, 0]])) == pytest.approx(2 / 3)
