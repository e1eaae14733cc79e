"""Suites write what the official scorers open, whose file discovery is rewritten here, and read what they write."""

import collections
import json
import os
import re
import types

import numpy as np
from PIL import Image
import pytest

from uae_jax import cli
from uae_jax.commands import evaluate, model_arguments
from uae_jax.evaluation import generation, results, suites
from uae_jax.evaluation.suites.spec import Scores, SuiteError
from uae_jax.weights.checkpoint import InferenceSettings

pytestmark = pytest.mark.fast

SIDE, LATENTS = 8, (1, 1, 16)

GENEVAL = [
  {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
  {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
  {"tag": "counting", "include": [{"class": "cat", "count": 3}], "prompt": "a photo of three cats"},
]
WISE = [
  {"prompt_id": 1, "Prompt": "mooncakes", "Category": "Cultural knowledge", "Subcategory": "Festival"},
  {"prompt_id": 700, "Prompt": "a wilting plant", "Category": "Biology", "Subcategory": "State"},
]


def lines(rows) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)


def write_prompts(folder, name):
  """Two or three prompts of a suite in its official format; returns the path for --prompts."""
  path = folder / "prompts"
  if name == "geneval":
    path.write_text(lines(GENEVAL))
  elif name == "geneval_plus":
    path.write_text(lines(dict(row, tag="size_spatial_attr") for row in GENEVAL))
  elif name == "dpg_bench":
    path.mkdir()
    for stem in ("partiprompts12", "0"):
      (path / f"{stem}.txt").write_text(f"a long text about {stem}\n")
  elif name == "wise":
    path.write_text(json.dumps(WISE))
  else:
    path.mkdir()
    (path / "color_val.txt").write_text("a green bench and a blue bowl\nred/pink roses\n")
    (path / "spatial_val.txt").write_text("a dog on the left of a cat\tdog\tcat\n")
  return path


class Painter:
  """Stands for a model: an image whose gray level is a function of its noise; counts its calls."""

  def __init__(self, fails_on=""):
    self.texts, self.fails_on = [], fails_on

  def __call__(self, texts, latents):
    if self.fails_on and self.fails_on in texts:
      raise ValueError(f"cannot draw {self.fails_on}")
    self.texts += texts
    return [gray(noise) for noise in latents]


def level(noise) -> int:
  return int(np.abs(noise).sum() * 1e4) % 256


def gray(noise) -> Image.Image:
  return Image.new("RGB", (SIDE, SIDE), (level(noise),) * 3)


def make(suite, prompts, out, paint, *, samples=None, batch_size=3):
  samples = samples or suite.num_samples
  jobs = generation.missing(suite, prompts, samples, out, (SIDE, SIDE))
  return generation.run(suite, jobs, paint, out, seed=7, latents_shape=LATENTS, batch_size=batch_size)


def expected(prompt, sample) -> int:
  return level(generation.noise(7, prompt, sample, LATENTS))


def shade(file, box=None) -> int:
  with Image.open(file) as image:
    return int(np.asarray(image.crop(box) if box else image).mean().round())


@pytest.fixture
def made(tmp_path, request):
  """(suite, prompts, output folder) of the suite that the test names, with all images."""
  suite = suites.find(request.param)
  prompts = suite.read_prompts(write_prompts(tmp_path, suite.name))
  assert not make(suite, prompts, tmp_path / "out", Painter())
  return suite, prompts, tmp_path / "out"


@pytest.mark.parametrize("made", ["geneval"], indirect=True)
def test_geneval_finds_four_samples_and_the_record_of_every_prompt(made):
  suite, prompts, out = made
  found = {}
  for subfolder in os.listdir(out):
    if not (out / subfolder).is_dir() or not subfolder.isdigit():
      continue
    record = json.loads((out / subfolder / "metadata.jsonl").read_text())
    names = [name for name in os.listdir(out / subfolder / "samples") if re.match(r"\d+\.png", name)]
    found[record["prompt"]] = [shade(out / subfolder / "samples" / name) for name in sorted(names)]
  assert found == {prompt.text: [expected(prompt, k) for k in range(4)] for prompt in prompts}


@pytest.mark.parametrize("made", ["geneval_plus"], indirect=True)
def test_geneval_plus_finds_one_jpg_per_line(made):
  _, prompts, out = made
  assert [shade(out / f"{number + 1}.jpg") for number in range(3)] == [expected(prompt, 0) for prompt in prompts]


@pytest.mark.parametrize("made", ["dpg_bench"], indirect=True)
def test_dpg_bench_crops_the_samples_in_order(made):
  _, prompts, out = made
  keys = {name.split(".")[0] for name in os.listdir(out)}
  assert keys == {"0", "partiprompts12"}
  s = SIDE
  crops = [(0, 0, s, s), (s, 0, 2 * s, s), (0, s, s, 2 * s), (s, s, 2 * s, 2 * s)]
  for prompt in prompts:
    assert [shade(out / f"{prompt.key}.png", box) for box in crops] == [expected(prompt, k) for k in range(4)]


@pytest.mark.parametrize("made", ["t2i_compbench"], indirect=True)
def test_t2i_compbench_numbers_the_images_of_a_category(made):
  _, prompts, out = made
  for category, count in (("color", 20), ("spatial", 10)):
    names = sorted(os.listdir(out / category / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [int(name.split("_")[1].split(".")[0]) for name in names] == list(range(count))
    own = [prompt for prompt in prompts if prompt.category == category]
    assert [name.split("_")[0] for name in names[::10]] == [prompt.text.replace("/", " ") for prompt in own]
    assert [shade(out / category / "samples" / name) for name in names] == [
      expected(prompt, k) for prompt in own for k in range(10)
    ]


@pytest.mark.parametrize("made", ["wise"], indirect=True)
def test_wise_finds_images_by_prompt_id(made):
  _, prompts, out = made
  assert [shade(out / f"{key}.png") for key in (1, 700)] == [expected(prompt, 0) for prompt in prompts]


def test_whole_files_are_not_made_again_and_damaged_ones_are(tmp_path):
  suite = suites.find("geneval")
  prompts, out = suite.read_prompts(write_prompts(tmp_path, "geneval")), tmp_path / "out"
  make(suite, prompts, out, Painter())
  file = out / "00001/samples/0002.png"
  whole = file.read_bytes()
  file.write_bytes(whole[: len(whole) // 2])
  again = Painter()
  make(suite, prompts, out, again, batch_size=8)
  assert again.texts == [prompts[1].text]
  assert file.read_bytes() == whole


def test_a_failing_prompt_is_named_and_the_others_are_made(tmp_path):
  suite = suites.find("geneval")
  prompts, out = suite.read_prompts(write_prompts(tmp_path, "geneval")), tmp_path / "out"
  failed = make(suite, prompts, out, Painter(fails_on=prompts[1].text), batch_size=5)
  assert sorted(failed) == [f"00001/samples/{k:04}.png" for k in range(4)]
  assert all("cannot draw" in why for why in failed.values())
  assert len(generation.missing(suite, prompts, 4, out, (SIDE, SIDE))) == 4


@pytest.mark.parametrize("name", ["geneval_plus", "wise", "dpg_bench"])
def test_samples_that_the_scorer_would_not_open_are_refused(tmp_path, name):
  suite = suites.find(name)
  (prompt, *_) = suite.read_prompts(write_prompts(tmp_path, name))
  with pytest.raises(SuiteError, match="--samples 3"):
    suite.targets(prompt, 3)


# --- Results ----------------------------------------------------------------------------------------------------------


def geneval_rows(correct) -> list[dict]:
  return [
    {"filename": f"out/{i:05}/samples/{k:04}.png", "tag": row["tag"], "prompt": row["prompt"], "correct": right}
    for i, row in enumerate(GENEVAL)
    for k, right in enumerate(correct[i])
  ]


@pytest.mark.parametrize("made", ["geneval"], indirect=True)
def test_geneval_scores_are_those_of_its_summary(made):
  suite, prompts, out = made
  correct = [[True, True, False, False], [True] * 4, [False, False, False, True]]
  (out / "results.jsonl").write_text(lines(geneval_rows(correct)))
  scores = suite.read_results(suite.result_files(out), prompts)
  by_tag = collections.defaultdict(list)
  for row in geneval_rows(correct):
    by_tag[row["tag"]].append(row["correct"])
  assert scores.categories == {tag: pytest.approx(np.mean(values)) for tag, values in by_tag.items()}
  assert scores.overall == pytest.approx(np.mean([np.mean(values) for values in by_tag.values()]))
  assert scores.items == {"0": 0.5, "1": 1.0, "2": 0.25} and not scores.notes


@pytest.mark.parametrize("made", ["geneval_plus"], indirect=True)
def test_geneval_plus_counts_unjudged_images_as_wrong_and_says_so(made):
  suite, prompts, out = made
  rows = [
    {"id": k + 1, "tag": "size_spatial_attr", "prompt": row["prompt"], "result": {"correct": correct}}
    for k, (row, correct) in enumerate(zip(GENEVAL, (1, 0, -1), strict=True))
  ]
  (out / "Output.json").write_text(json.dumps({"overall_results": rows}))
  scores = suite.read_results(suite.result_files(out), prompts)
  assert scores.overall == pytest.approx(1 / 3)
  assert any("1 images were not judged" in note for note in scores.notes)


@pytest.mark.parametrize("made", ["dpg_bench"], indirect=True)
def test_dpg_bench_scores_come_from_its_tables(made):
  suite, prompts, out = made
  report = (
    "/x, y/0.png, 0.5, 1.0, 0.75, 0.75, 0.75\n/x, y/partiprompts12.png, 1.0, 1.0, 1.0, 1.0, 1.0\nModel: out\n"
    "L1 category scores:\n\tentity: 90.5\n\trelation: 80.0\nL2 category scores:\n\tentity - whole: 90.5\n"
    "Image path: out\nSave results to: x\nDPG-Bench score: 87.5\n"
  )
  (out / "dpg-bench_20260101-000000_results.txt").write_text(report)
  (out / "dpg-bench_20260101-000000_results_detail.txt").write_text("")
  scores = suite.read_results(suite.result_files(out), prompts)
  assert scores.overall == pytest.approx(0.875)
  assert scores.categories == {"entity": pytest.approx(0.905), "relation": pytest.approx(0.8)}
  assert scores.items == {"0": 0.75, "partiprompts12": 1.0}


@pytest.mark.parametrize("made", ["t2i_compbench"], indirect=True)
def test_t2i_compbench_maps_question_ids_to_prompts(made):
  suite, prompts, out = made
  for category, folder, answers in (
    ("color", "annotation_blip", [1.0] * 10 + [0.5] * 10),
    ("spatial", "labels/annotation_obj_detection_2d", [0.2] * 10),
  ):
    file = out / category / folder / "vqa_result.json"
    file.parent.mkdir(parents=True)
    # Scorers write strings or numbers, and the detector its rows in any order.
    rows = [{"question_id": k, "answer": f"{answer:.4f}"} for k, answer in enumerate(answers)]
    file.write_text(json.dumps(rows[::-1]))
  scores = suite.read_results(suite.result_files(out), prompts)
  assert scores.items == {"color/0": pytest.approx(1), "color/1": pytest.approx(0.5), "spatial/0": pytest.approx(0.2)}
  assert scores.categories == {"color": pytest.approx(0.75), "spatial": pytest.approx(0.2)}


@pytest.mark.parametrize("made", ["wise"], indirect=True)
def test_wise_weighs_the_categories(made):
  suite, prompts, out = made
  folder = out / "Results-qwen35"
  folder.mkdir()
  (folder / "all_scores_results.jsonl").write_text(
    lines([{"prompt_id": 1, "score": 1}, {"prompt_id": 700, "score": 0}])
  )
  scores = suite.read_results(suite.result_files(out), prompts)
  assert scores.overall == pytest.approx(0.40 / 0.52)
  assert "no score in TIME" in scores.notes[-1]


def test_results_with_missing_rows_say_so(tmp_path):
  suite = suites.find("geneval")
  prompts = suite.read_prompts(write_prompts(tmp_path, "geneval"))
  (tmp_path / "results.jsonl").write_text(lines(geneval_rows([[True] * 4, [], [True] * 2])))
  scores = suite.read_results([tmp_path / "results.jsonl"], prompts)
  assert scores.notes == (
    "1 of 3 prompts have no score, the first is '1'",
    "1 prompts have fewer than 4 scored images, the first is '2'",
  )


@pytest.mark.parametrize(
  "rows, message",
  [
    ([dict(geneval_rows([[True], [], []])[0], prompt="a photo of a car")], "prompt of another run"),
    ([dict(geneval_rows([[True], [], []])[0], filename="x/00044/samples/0000.png")], "no prompt of this run"),
    ([{"filename": "x/00000/samples/0000.png", "prompt": "a photo of a bench"}], "field 'correct'"),
    ([], "has no score"),
  ],
)
def test_results_of_another_run_are_refused(tmp_path, rows, message):
  suite = suites.find("geneval")
  prompts = suite.read_prompts(write_prompts(tmp_path, "geneval"))
  (tmp_path / "results.jsonl").write_text(lines(rows))
  with pytest.raises(SuiteError, match=message):
    suite.read_results([tmp_path / "results.jsonl"], prompts)


@pytest.mark.parametrize("name, other", [("geneval", "geneval_plus"), ("geneval_plus", "geneval"), ("wise", "geneval")])
def test_prompts_of_another_benchmark_are_refused(tmp_path, name, other):
  with pytest.raises(SuiteError, match=r"prompts.*(line 1|not JSON|record 1)"):
    suites.find(name).read_prompts(write_prompts(tmp_path, other))


# --- The command -----------------------------------------------------------------------------------------------------


class StandIn:
  """A model that draws gray images, for the command."""

  inference = InferenceSettings(resolution_px=SIDE, steps=4, guidance=1.0)
  processor = types.SimpleNamespace(negative_prompt="bad")

  def __init__(self):
    self.made = 0

  def fingerprint(self):
    return "0123456789abcdef"

  def latents_shape(self, height, width):
    return LATENTS

  def generate(self, prompts, steps, guidance, height, width, *, latents, batch_size, guidance_interval):
    self.made += len(prompts)
    return [gray(noise) for noise in latents]


def test_the_command_makes_reads_resumes_and_repeats(tmp_path, monkeypatch, capsys):
  uae = StandIn()
  monkeypatch.setattr(model_arguments, "load", lambda arguments: uae)
  prompts, out = write_prompts(tmp_path, "geneval"), tmp_path / "out"
  images = ["evaluate", "--suite", "geneval", "--prompts", str(prompts), "--model", "m", "--out"]
  read = ["evaluate", "--suite", "geneval", "--prompts", str(prompts), "--out", str(out)]

  assert cli.main(read) == 1 and "--model makes the images first" in capsys.readouterr().err
  assert cli.main([*images, str(out), "--seed", "7"]) == 0
  assert uae.made == 12 and "run the official scorer" in capsys.readouterr().out
  assert shade(out / "00001/samples/0002.png") == expected(suites.find("geneval").read_prompts(prompts)[1], 2)

  scored = tmp_path / "elsewhere.jsonl"
  scored.write_text(lines(geneval_rows([[True] * 4] * 3)))
  assert cli.main([*read, "--results", str(scored)]) == 0
  shown = capsys.readouterr().out
  assert re.search(r"overall +1\.0000", shown) and "0.86 (published)" in shown and "steps 4" in shown
  assert results.read(out)["prompt_files"]["1"][2] == "00001/samples/0002.png"
  assert cli.main([*images, str(out), "--seed", "7"]) == 0  # makes nothing, and keeps the scores
  assert uae.made == 12 and results.read(out)["scores"]["overall"] == 1.0

  assert cli.main([*images, str(out), "--seed", "8"]) == 1
  assert "seed: 7, 8" in capsys.readouterr().err
  again = tmp_path / "again"
  like = [
    "evaluate",
    "--like",
    str(out / "results.json"),
    "--prompts",
    str(prompts),
    "--model",
    "m",
    "--out",
    str(again),
  ]
  assert cli.main(like) == 0
  assert (again / "00002/samples/0003.png").read_bytes() == (out / "00002/samples/0003.png").read_bytes()

  (again / "results.json").unlink()  # Images of an unknown model would count as those of this one.
  assert cli.main([*images, str(again)]) == 1
  assert "again has 00000/samples/0000.png but no results.json" in capsys.readouterr().err


# --- Results of others ------------------------------------------------------------------------------------------------

SETTINGS = {"suite": "geneval", "prompts": "p", "num_prompts": 4, "samples": 4, "seed": 3, "steps": 40, "weights": "w"}


def write_result(folder, **settings):
  scores = Scores({"0": 1.0}, {}, 0.0)
  results.write(folder, SETTINGS | settings, {"files": 1, "failed": {}}, scores, 1.0)
  return folder / results.FILE


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda result: result.update(version=2), "version = 2: this release of uae_jax reads version 1"),
    (lambda result: result.update(failed=["a"]), "failed = "),
    (lambda result: result["settings"].pop("weights"), "settings lacks field 'weights'"),
    (lambda result: result["settings"].update(num_prompts=0), "settings.num_prompts = 0: expected 1 or more"),
    (lambda result: result["settings"].update(steps="40"), "settings.steps = '40'"),
    (lambda result: result["scores"]["items"].update({"0": "1"}), "scores.items.0 = '1'"),
    (lambda result: result["scores"].pop("items"), "items"),
    (lambda result: result["scores"].update(metrics={"clip": {"overall": 1.0}}), "scores.metrics.clip"),
    (lambda result: result.update(scores=None) or result.update(failed=[]), "failed = "),
    (lambda result: result["scores"].update(overall=float("nan")), "NaN"),
  ],
)
def test_a_result_that_another_tool_wrote_is_refused_by_field(tmp_path, capsys, change, named):
  file = write_result(tmp_path / "a")
  result = json.loads(file.read_text())
  change(result)
  file.write_text(json.dumps(result))
  for command in (["compare", str(file), str(file)], ["evaluate", "--like", str(file), "--out", str(tmp_path / "b")]):
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert str(file) in error and named in error and error.count("\n") == 1


def test_like_leaves_what_is_given(tmp_path):
  file = write_result(tmp_path, dtype="float32", int8=True)
  for given, seed in (([], 3), (["--seed", "7"], 7)):
    arguments = evaluate.parser().parse_args(["--out", "b", *given])
    evaluate.take_settings(arguments, file)
    assert (arguments.seed, arguments.dtype, arguments.int8) == (seed, "float32", True)
