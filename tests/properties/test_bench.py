"""Unified-Bench, protocol 1: pairs, scores, result file, table and page."""

import csv
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from uae_jax import cli, embedders
from uae_jax.commands.bench import parse_embedders
from uae_jax.data import image_files
from uae_jax.evaluation import unified_bench

pytestmark = pytest.mark.fast


def save(folder, name, level):
  folder.mkdir(exist_ok=True)
  Image.new("RGB", (20, 16), (level, 255 - level, 0)).save(folder / name)


class ByColor:
  """An embedder with known similarities: the angle of an embedding is the red level of the image's first pixel."""

  def embed(self, images):
    levels = np.asarray([np.asarray(image.convert("RGB"), np.float32)[0, 0, 0] / 255 for image in images])
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
  save(generated, "orphan.png", 7)
  (generated / "torn.png").write_bytes(b"no image")
  return originals, generated


def pairs_of(images, references):
  found = unified_bench.pair([Path(name) for name in images], [Path(name) for name in references])
  return {str(image): reference and str(reference) for image, reference in found.items()}


def test_the_original_has_the_name_then_the_stem_or_the_stem_after_the_prefix():
  references = ("a.jpg", "b.jpg", "b.png", "c.png", "recon_c.png", "x/d.png")
  assert pairs_of(
    (
      "a.jpg",
      "a.png",
      "recon_a.png",
      "b.png",
      "recon_b.png",
      "b.webp",
      "recon_c.png",
      "recon_c.jpg",
      "y/d.png",
      "e.png",
    ),
    references,
  ) == {
    "a.jpg": "a.jpg",
    "a.png": "a.jpg",
    "recon_a.png": "a.jpg",
    "b.png": "b.png",
    "recon_b.png": "b.jpg",
    "b.webp": "b.jpg",
    "recon_c.png": "recon_c.png",
    "recon_c.jpg": "c.png",
    "y/d.png": "x/d.png",
    "e.png": None,
  }


@pytest.mark.parametrize("names", [("a.jpg", "b.png"), ("a.jpg", "a.png"), ("a.jpg", "recon_a.png")])
def test_what_reconstruct_writes_is_paired(names):
  originals = [Path(name) for name in names]
  written = image_files.result_names(originals)
  assert pairs_of(written, names) == dict(zip(written, names, strict=True))


def run(folders, tmp_path, monkeypatch, *more):
  monkeypatch.setattr(embedders, "load", lambda kind, path, dtype: ByColor())
  out = tmp_path / "results" / "scores.json"
  argv = ["bench", "--references", str(folders[0]), "--images", str(folders[1]), "--out", str(out)]
  return cli.main([*argv, "--embedders", "clip=a,dinov2=b", *more]), out


def test_result_file_is_the_official_one(folders, tmp_path, monkeypatch, capsys):
  """Keys, counts and fields are those of the official script, which goes through the reconstructions."""
  (folders[1] / "deep").mkdir()
  save(folders[1] / "deep", "recon_stem.png", 100)
  save(folders[1], "no_image_there.gif", 9)
  code, out = run(folders, tmp_path, monkeypatch)
  assert code == 1, "a missing and an unreadable file are not success"
  errors = capsys.readouterr().err
  assert "lost.png: no reconstruction" in errors and "torn.png" in errors and "orphan.png: no original" in errors
  result = json.loads(out.read_text())
  assert list(result) == ["model_types", "similarities_by_model", "statistics_by_model", "summary"]
  values = result["similarities_by_model"]["clip"]
  want = {
    "recon_stem.png": 1.0,
    "orphan.png": None,
    "recon_prefixed.png": np.cos(155 / 255),
    "recon_same.png": np.cos(93 / 255),
    "same.png": 1.0,
    "stem.bmp": np.cos(100 / 255),
    "torn.png": None,
  }
  assert list(values) == list(want)
  assert [values[name] is None for name in want] == [value is None for value in want.values()]
  valid = [value for value in want.values() if value is not None]
  np.testing.assert_allclose([value for value in values.values() if value is not None], valid, atol=1e-5)
  figures = result["statistics_by_model"]["dinov2"]
  assert (figures["total_images"], figures["valid_pairs"]) == (7, 5)
  np.testing.assert_allclose(figures["average_similarity"], np.mean(valid), atol=1e-5)
  np.testing.assert_allclose(figures["min_similarity"], min(valid), atol=1e-5)
  assert list(result["summary"]) == [
    "models_used",
    "average_scores_by_model",
    "overall_average",
    "best_model",
    "worst_model",
  ]
  assert result["summary"]["best_model"] == ["clip", pytest.approx(result["summary"]["overall_average"])]


def test_without_a_readable_pair_the_summary_is_empty(tmp_path, monkeypatch):
  save(tmp_path / "a", "one.png", 1)
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "one.png").write_text("no image")
  code, out = run((tmp_path / "a", tmp_path / "b"), tmp_path, monkeypatch)
  result = json.loads(out.read_text())
  assert code == 1 and result["summary"] == {} and result["statistics_by_model"] == {}
  assert result["similarities_by_model"] == {"clip": {"one.png": None}, "dinov2": {"one.png": None}}


def test_table_and_page(folders, tmp_path, monkeypatch):
  odd = os.fsdecode(b"caf\xe9.png")
  for name in ("<b>&.png", odd):
    save(folders[0], name, 10)
    save(folders[1], name, 10)
  _, out = run(folders, tmp_path, monkeypatch, "--pairs", "2")
  with open(out.with_suffix(".csv"), newline="") as file:
    rows = {row["reconstruction"]: row for row in csv.DictReader(file)}
  assert rows["orphan.png"]["clip"] == "" and rows["same.png"]["mean"] == "1.000000"
  assert rows["recon_prefixed.png"]["reference"] == "prefixed.png"
  assert odd in json.loads(out.read_text())["similarities_by_model"]["clip"]
  page = out.with_suffix(".html").read_text()
  assert "<b>&.png" not in page and "&lt;b&gt;&amp;.png" in page
  assert "http" not in page.replace("http-equiv", "")
  worst = page.split("Worst pairs")[1]
  assert worst.index("prefixed.png") < worst.index("stem.bmp")


def test_unusual_pixels_are_read_as_officially_and_said(tmp_path, monkeypatch, capsys):
  folders = tmp_path / "originals", tmp_path / "generated"
  for folder in folders:
    save(folder, "plain.png", 100)
  image = Image.new("RGBA", (4, 4), (100, 0, 0, 0))
  image.save(folders[0] / "clear.png")
  save(folders[1], "recon_clear.png", 100)
  for pixels, value in (("official", 1.0), ("displayed", np.cos(155 / 255))):
    code, out = run(folders, tmp_path, monkeypatch, "--pixels", pixels)
    assert json.loads(out.read_text())["similarities_by_model"]["clip"]["recon_clear.png"] == pytest.approx(value)
    reported = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert code == 0 and len(reported) == 1
    assert reported[0].startswith(
      "note: recon_clear.png: transparency of clear.png: clip official 1.0000, displayed 0.8209;"
    )


def test_other_suffixes_count_if_asked(tmp_path, monkeypatch, capsys):
  folders = tmp_path / "originals", tmp_path / "generated"
  for name in ("a.png", "b.gif"):
    save(folders[0], name, 10)
    save(folders[1], f"recon_{name[0]}.png", 10)
  assert run(folders, tmp_path, monkeypatch)[0] == 1
  assert "recon_b.png: no original; b.gif counts with --suffixes all" in capsys.readouterr().err
  assert run(folders, tmp_path, monkeypatch, "--suffixes", "all")[0] == 0


def test_one_bad_pair_fails_alone(folders, tmp_path, monkeypatch, capsys):
  """Neither an exception of the embedder nor a similarity that is not finite touches the other pairs."""

  def embed(self, images):
    levels = [image.getpixel((0, 0))[0] for image in images]
    if 7 in levels:
      raise MemoryError("too long")
    return np.asarray([[np.nan if level == 255 else 1.0] for level in levels])

  monkeypatch.setattr(ByColor, "embed", embed)
  code, out = run(folders, tmp_path, monkeypatch)
  errors = capsys.readouterr().err
  assert code == 1 and "recon_same.png: MemoryError: too long" in errors
  assert "recon_prefixed.png: its similarity under clip is not a finite number" in errors
  values = json.loads(out.read_text())["similarities_by_model"]["clip"]
  assert {name for name, value in values.items() if value is not None} == {"same.png", "stem.bmp"}


def test_results_of_an_embedder_are_kept_if_the_next_one_ends_the_command(folders, tmp_path, monkeypatch):
  calls = []

  def embed(self, images):
    calls.append(len(images))
    if len(calls) > 30:
      raise KeyboardInterrupt
    return np.ones((len(images), 1))

  monkeypatch.setattr(ByColor, "embed", embed)
  monkeypatch.setattr(unified_bench, "BATCH", 1)
  for name in range(8):
    save(folders[0], f"{name}.png", 1)
    save(folders[1], f"{name}.png", 1)
  code, out = run(folders, tmp_path, monkeypatch)
  assert code == 130 and list(json.loads(out.read_text())["similarities_by_model"]) == ["clip"]


def test_nothing_in_common_is_an_error(tmp_path, monkeypatch, capsys):
  save(tmp_path / "a", "one.png", 1)
  save(tmp_path / "b", "two.png", 1)
  code, out = run((tmp_path / "a", tmp_path / "b"), tmp_path, monkeypatch)
  assert code == 1 and not out.exists()
  assert "no reconstruction in" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["clip", "clip=", "sam=x", "clip=a,clip=b", ""])
def test_mistyped_embedders(text):
  with pytest.raises(ValueError, match="expected KIND=PATH"):
    parse_embedders(text)


def test_a_run_stands_for_all_of_its_embedders(tmp_path):
  (tmp_path / "model.json").write_text(json.dumps({"embedders": {"clip": {}, "dinov2": {}}}))
  assert parse_embedders(str(tmp_path)) == {"clip": str(tmp_path), "dinov2": str(tmp_path)}


def test_one_protocol_at_a_time(tmp_path, capsys):
  for more in ([], ["--embedders", "clip=a", "--judge-url", "http://x/v1"], ["--embedders", "clip=a"]):
    with pytest.raises(SystemExit) as exit_code:
      cli.main(["bench", "--references", str(tmp_path), *more])
    assert exit_code.value.code == 2
  assert capsys.readouterr().err.count("uae-jax bench: error:") == 3
