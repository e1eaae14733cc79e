"""Results are compared prompt by prompt: ours and official files, with settings that differ shown beside them."""

import json

import numpy as np
from PIL import Image
import pytest

from uae_jax import cli
from uae_jax.evaluation import comparison, results
from uae_jax.evaluation.suites.spec import Scores

pytestmark = pytest.mark.fast

EVIL = '<script>alert("x")</script>'


def write_result(folder, items, *, shade=None, **settings):
  """A scored result of GenEval; with a shade, also with an image per prompt."""
  settings = {"suite": "geneval", "prompts": "p", "steps": 40, "weights": "w", **settings}
  about = {
    "prompt_categories": {key: "counting" if key < "2" else "colors" for key in items},
    "prompt_texts": {key: f"{EVIL} number {key}" for key in items},
    "prompt_files": {key: [f"{key}.png"] for key in items},
  }
  results.write(folder, settings, about, Scores(items, {}, float(np.mean(list(items.values())))), 1.0)
  for key in items if shade is not None else ():
    Image.new("RGB", (8, 8), (shade, int(key), 0)).save(folder / f"{key}.png")
  return folder


@pytest.fixture
def two(tmp_path):
  """Two results of four prompts; the second gains half a point on some of them and has other weights and steps."""
  one = {"0": 1.0, "1": 0.0, "2": 0.0, "3": 1.0}
  other = {"0": 0.5, "1": 0.5, "2": 0.25, "3": 1.0}
  write_result(tmp_path / "a", one, shade=1, weights="w1")
  write_result(tmp_path / "b", other, shade=2, weights="w2", steps=28)
  return tmp_path / "a", tmp_path / "b"


def test_the_prompts_of_two_results_are_paired(two, capsys):
  assert cli.main(["compare", *map(str, two), "--json"]) == 0
  shown = capsys.readouterr()
  assert "A and B differ: steps: 40, 28" in shown.err and "w1" not in shown.err
  (compared,) = json.loads(shown.out)
  rows = {row["category"]: row for row in compared["metrics"][""]}
  assert rows.keys() == {"counting", "colors", "all"}
  whole = rows["all"]
  assert (whole["count"], whole["wins"], whole["losses"]) == (4, 2, 1)
  assert whole["difference"] == pytest.approx(0.0625) and whole["low"] <= whole["difference"] <= whole["high"]


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(200):
    gains = rng.normal(0.3, 1.0, 40)
    keys = [str(k) for k in range(len(gains))]
    row = comparison._row("all", keys, dict.fromkeys(keys, 0.0), dict(zip(keys, gains, strict=True)), 400)
    covered += row["low"] <= 0.3 <= row["high"]
  assert 0.88 <= covered / 200 <= 0.98


def test_more_results_are_each_compared_with_the_first(two, tmp_path, capsys):
  third = write_result(tmp_path / "c", {"0": 0.0, "1": 0.0, "2": 0.0, "3": 0.0}, weights="w3")
  assert cli.main(["compare", *map(str, two), str(third)]) == 0
  shown = capsys.readouterr()
  assert "B - A" in shown.out and "C - A" in shown.out
  assert "A and C differ" not in shown.err


def test_results_of_other_prompts_are_refused(tmp_path, capsys):
  one, other = write_result(tmp_path / "a", {"0": 1.0}), write_result(tmp_path / "b", {"0": 1.0}, prompts="q")
  assert cli.main(["compare", str(one), str(other)]) == 1
  assert "different prompts" in capsys.readouterr().err


def test_results_without_a_common_prompt_are_refused(tmp_path, capsys):
  one, other = write_result(tmp_path / "a", {"0": 1.0}), write_result(tmp_path / "b", {"1": 1.0})
  assert cli.main(["compare", str(one), str(other)]) == 1
  assert "no scored prompt in common" in capsys.readouterr().err


def test_official_files_are_read(tmp_path, capsys):
  records = [{"tag": "counting", "include": [], "prompt": f"{count} cows"} for count in (2, 3)]
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
  for name, correct in (("a", (True, False)), ("b", (True, True))):
    rows = [
      {"filename": f"x/{i:05}/samples/0000.png", "prompt": records[i]["prompt"], "correct": correct[i]}
      for i in range(2)
    ]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
  assert cli.main(["compare", *files]) == 1 and "--suite and --prompts" in capsys.readouterr().err
  assert cli.main(["compare", *files, "--suite", "geneval", "--prompts", str(prompts), "--json"]) == 0
  shown = capsys.readouterr()
  assert "settings" in shown.err and "are not known" in shown.err
  assert json.loads(shown.out)[0]["metrics"][""][-1]["difference"] == 0.5


def test_official_files_of_unified_bench_are_read(tmp_path, capsys):
  for name, value in (("a", 0.5), ("b", 0.75)):
    similarities = {"clip": {"recon_1.png": value, "recon_2.png": None}, "dinov2": {"recon_1.png": 0.5}}
    (tmp_path / f"{name}.json").write_text(json.dumps({"similarities_by_model": similarities}))
  assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"]) == 0
  found = json.loads(capsys.readouterr().out)[0]["metrics"]
  differences = {name: (row["count"], row["difference"]) for name, (row,) in found.items()}
  assert differences == {"mean similarity": (1, 0.125), "clip": (1, 0.25), "dinov2": (1, 0.0)}


@pytest.mark.parametrize("content, said", [("{", "--suite and --prompts"), (None, "no such file")])
def test_what_is_no_result_is_named(two, tmp_path, capsys, content, said):
  file = tmp_path / "x.json"
  if content is not None:
    file.write_text(content)
  assert cli.main(["compare", str(two[0]), str(file)]) == 1
  assert f"{file}: " in (error := capsys.readouterr().err) and said in error


def test_every_metric_with_a_score_per_prompt_is_paired_and_has_a_gallery(tmp_path, capsys):
  for name, gain in (("a", 0.0), ("b", 0.25)):
    metrics = {"clip": Scores({"1": 0.5 - gain, "2": 0.5}, {}, 0.5), "CAPTURE": Scores({}, {}, 0.1)}
    settings = {"suite": "transfer", "prompts": "p", "weights": name}
    about = {"prompt_texts": {"1": "number 1", "2": "number 2"}}
    results.write(tmp_path / name, settings, about, Scores({"1": 0.5, "2": 0.5 + gain}, {}, 0.5, metrics=metrics), 1.0)
  argv = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
  assert cli.main([*argv, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)[0]["metrics"]
  assert {name: row["difference"] for name, (row,) in found.items()} == {"mean similarity": 0.125, "clip": -0.125}
  assert cli.main([*argv, "--page", str(tmp_path / "page.html")]) == 0
  html, shown = (tmp_path / "page.html").read_text(), capsys.readouterr().out
  assert "mean similarity\n" in shown and "clip\n" in shown
  gains, losses = html.index("Largest gains of B in mean similarity"), html.index("Largest losses of B in clip")
  assert gains < html.index("number 2") < losses < html.index("number 1")


def test_the_page_shows_intervals_settings_and_both_images_of_each_prompt(two, tmp_path, capsys):
  assert cli.main(["compare", *map(str, two), "--page", str(tmp_path / "page")]) == 0
  file = tmp_path / "page" / "compare.html"
  assert capsys.readouterr().out.rstrip().endswith(str(file))
  html = file.read_text()
  assert EVIL not in html and "number 1" in html  # prompts are never markup
  gains, losses = html.index("Largest gains of B"), html.index("Largest losses of B")
  assert gains < html.index("number 1") < html.index("number 2") < losses < html.index("number 0")
  assert "number 3" not in html  # neither gained nor lost
  assert html.count("data:image/png") == 6
  assert "Not the same settings" in html and "steps: 40, 28" in html
  assert html.count('class="interval"') == 3


def test_results_of_equal_settings_have_no_warning_and_missing_images_an_empty_frame(tmp_path):
  one, other = (write_result(tmp_path / name, {"0": score}) for name, score in (("a", 0.0), ("b", 1.0)))
  file = tmp_path / "page.html"
  assert cli.main(["compare", str(one), str(other), "--page", str(file)]) == 0
  html = file.read_text()
  assert "Not the same settings" not in html and html.count("no image") == 2
