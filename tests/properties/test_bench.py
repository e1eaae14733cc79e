"""Unified-Bench, protocol 1: pairs, scores, result file, table and page."""

import csv
import json

import numpy as np
from PIL import Image
import pytest

from uae_jax import cli, embedders
from uae_jax.commands.bench import parse_embedders
from uae_jax.evaluation import unified_bench

pytestmark = pytest.mark.fast


def save(folder, name, level):
  folder.mkdir(exist_ok=True)
  Image.new("RGB", (20, 16), (level, 255 - level, 0)).save(folder / name)


class ByColor:
  """An embedder with known similarities: the angle of an embedding is the red level of the image."""

  def embed(self, files):
    levels = np.asarray([np.asarray(Image.open(file).convert("RGB"), np.float32)[0, 0, 0] / 255 for file in files])
    return np.stack([np.cos(levels), np.sin(levels)], axis=-1)


@pytest.fixture
def folders(tmp_path):
  originals, generated = tmp_path / "originals", tmp_path / "generated"
  for name in ("same.png", "stem.png", "prefixed.png", "lost.png", "torn.png"):
    save(originals, name, 100)
  save(generated, "same.png", 100)
  save(generated, "stem.bmp", 0)
  save(generated, "recon_prefixed.png", 255)
  save(generated, "recon_same.png", 7)
  (generated / "torn.png").write_bytes(b"no image")
  return originals, generated


def test_pairing_prefers_the_name_then_the_stem_then_the_prefix(folders):
  originals, generated = map(unified_bench.image_files, folders)
  found = {
    reference.name: image and image.name for reference, image in unified_bench.pair(originals, generated).items()
  }
  assert found == {
    "same.png": "same.png",
    "stem.png": "stem.bmp",
    "prefixed.png": "recon_prefixed.png",
    "lost.png": None,
    "torn.png": "torn.png",
  }


def run(folders, tmp_path, monkeypatch, *more):
  monkeypatch.setattr(embedders, "load", lambda kind, path, dtype: ByColor())
  out = tmp_path / "results" / "scores.json"
  argv = ["bench", "--references", str(folders[0]), "--images", str(folders[1]), "--out", str(out)]
  return cli.main([*argv, "--embedders", "clip=a,dinov2=b", *more]), out


def test_result_file_has_the_official_fields(folders, tmp_path, monkeypatch, capsys):
  code, out = run(folders, tmp_path, monkeypatch)
  assert code == 1, "a missing and an unreadable file are not success"
  errors = capsys.readouterr().err
  assert "lost.png: no reconstruction" in errors and "torn.png" in errors
  result = json.loads(out.read_text())
  assert list(result) == ["model_types", "similarities_by_model", "statistics_by_model", "summary"]
  values = result["similarities_by_model"]["clip"]
  want = {"same.png": 1.0, "stem.png": np.cos(100 / 255), "prefixed.png": np.cos(155 / 255)}
  assert values["lost.png"] is None and values["torn.png"] is None
  np.testing.assert_allclose([values[name] for name in want], list(want.values()), atol=1e-5)
  figures = result["statistics_by_model"]["dinov2"]
  assert (figures["total_images"], figures["valid_pairs"]) == (5, 3)
  np.testing.assert_allclose(figures["average_similarity"], np.mean(list(want.values())), atol=1e-5)
  np.testing.assert_allclose(figures["min_similarity"], min(want.values()), atol=1e-5)
  summary = result["summary"]
  assert set(summary) == {
    "models_used",
    "average_scores_by_model",
    "overall_average",
    "best_model",
    "worst_model",
  }
  assert summary["best_model"][1] == pytest.approx(summary["overall_average"])


def test_table_and_page(folders, tmp_path, monkeypatch):
  save(folders[0], "<b>&.png", 10)
  save(folders[1], "<b>&.png", 10)
  _, out = run(folders, tmp_path, monkeypatch, "--pairs", "2")
  with open(out.with_suffix(".csv"), newline="") as file:
    rows = {row["reference"]: row for row in csv.DictReader(file)}
  assert rows["lost.png"]["clip"] == "" and rows["same.png"]["mean"] == "1.000000"
  assert rows["prefixed.png"]["reconstruction"] == "recon_prefixed.png"
  page = out.with_suffix(".html").read_text()
  assert "<b>&.png" not in page and "&lt;b&gt;&amp;.png" in page
  assert page.count('alt="same.png"') >= 1 and "http" not in page.replace("http-equiv", "")
  worst = page.split("Worst pairs")[1]
  assert worst.index("prefixed.png") < worst.index("stem.bmp")


def test_nothing_in_common_is_an_error(tmp_path, monkeypatch, capsys):
  save(tmp_path / "a", "one.png", 1)
  save(tmp_path / "b", "two.png", 1)
  code, out = run((tmp_path / "a", tmp_path / "b"), tmp_path, monkeypatch)
  assert code == 1 and not out.exists()
  assert "no reference has a readable reconstruction" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["clip", "clip=", "sam=x", "clip=a,clip=b", ""])
def test_mistyped_embedders(text):
  with pytest.raises(ValueError, match="expected KIND=PATH"):
    parse_embedders(text)


def test_one_protocol_at_a_time(tmp_path, capsys):
  for more in ([], ["--embedders", "clip=a", "--judge-url", "http://x/v1"], ["--embedders", "clip=a"]):
    with pytest.raises(SystemExit) as exit_code:
      cli.main(["bench", "--references", str(tmp_path), *more])
    assert exit_code.value.code == 2
  assert capsys.readouterr().err.count("uae-jax bench: error:") == 3
