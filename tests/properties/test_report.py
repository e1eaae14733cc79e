"""The report of a run: complete, escaped, self-contained, and explicit about failures and missing files."""

from html.parser import HTMLParser
import json
from pathlib import Path
import re
import time

from PIL import Image
import pytest
from synthetic_workdir import EVALUATIONS, figures, write_json, write_workdir

from uae_jax.report import charts
from uae_jax.report.findings import findings
from uae_jax.report.page import write_report
from uae_jax.report.reconstructions import Pair, write_page
from uae_jax.report.run import Stage, read_run

pytestmark = pytest.mark.fast

GENERATION = "generation_for_understanding"
EVIL = "<script>alert('x')</script>"


class Balanced(HTMLParser):
  """An HTML parser that fails on tags that are not closed in order."""

  VOID = {"meta", "img", "input", "link", "br", "hr"}

  def __init__(self):
    super().__init__()
    self.open = []

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    pass

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture
def workdir(tmp_path):
  return write_workdir(tmp_path / "demo")


def page(workdir) -> str:
  html = write_report(workdir).read_text()
  parser = Balanced()
  parser.feed(html)
  assert parser.open == []
  return html


def text_of(html: str) -> str:
  return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_has_every_section(workdir):
  html = page(workdir)
  for part in ("figures", "gallery", "captions", "curves", "time", "config"):
    assert f'id="{part}"' in html
  text = text_of(html)
  assert "Before RL" in text and "After stage 2" in text and "After stage 3" in text
  assert "0.961" in text and "+0.531" in text and "14.9 of 14.9" in text
  for title in ("Reward", "Caption length", "Recall and precision", "KL to the reference", "Clip fraction", "Entropy"):
    assert f"<h3>{title}</h3>" in html
  assert "truth 14.9" in text
  assert "generation_for_understanding" in text and "clip.low" in text
  assert "No warnings" in text and "finished" in text


def test_the_page_needs_no_network(workdir):
  html = page(workdir)
  assert not re.findall(r'(?:src|href)="(?!data:image/|#)', html)
  assert not re.search(r"https?://|url\(|@import", html)
  assert html.count("data:image/png;base64,") == 3 * 4 + 1
  assert "image-rendering: pixelated" in html


def test_everything_from_the_run_is_escaped(tmp_path):
  workdir = write_workdir(tmp_path / "run&<b>")
  folder = workdir / "samples" / GENERATION
  gallery = json.loads((folder / "gallery.json").read_text())
  gallery["items"][0] |= {
    "name": EVIL,
    "true_caption": EVIL,
    "words": [[EVIL, "right"], [EVIL, '"><script>']],
    "missing": [EVIL],
  }
  gallery["items"][1] |= {"caption": EVIL, "words": []}
  write_json(folder / "gallery.json", gallery)
  write_json(workdir / "config.json", {EVIL: EVIL, "stages": [EVIL], "data": {EVIL: [EVIL]}})
  write_json(workdir / "evaluation" / "<img>.json", {"psnr": 1.0, EVIL: 2.0})
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"stage": GENERATION, "step": 1, f'{EVIL}" onload="x': 1.0}) + "\n")
    file.write(json.dumps({"stage": EVIL, "step": 1, "loss": 1.0}) + "\n")
  html = page(workdir)
  assert html.count("<script>") == 1
  assert "<b>" not in html.split("<h1>")[1].split("</h1>")[0]
  assert "<img>" not in html and 'onload="x' not in html
  assert "&lt;script&gt;" in html


def test_images_outside_the_samples_are_not_read(workdir):
  folder = workdir / "samples" / GENERATION
  Image.new("RGB", (8, 8)).save(workdir / "secret.png")
  gallery = json.loads((folder / "gallery.json").read_text())
  gallery["items"][0] |= {"reconstruction": "../../secret.png"}
  gallery["items"][1] |= {"reconstruction": "absent.png"}
  (folder / "recon_2.png").write_bytes(b"no image")
  write_json(folder / "gallery.json", gallery)
  assert page(workdir).count("no image</div>") == 3


def test_photographs_are_reduced(workdir):
  Image.new("RGB", (900, 600)).save(workdir / "samples" / GENERATION / "recon_0.png")
  assert "data:image/jpeg" in page(workdir)


def test_words_are_marked(workdir):
  folder = workdir / "samples" / GENERATION
  entry = {"step": 3, "caption": "red circle", "words": [["red", "wrong"], ["circle", "right"]], "missing": ["large"]}
  write_json(folder / "captions.json", {"image": "orig.png", "true_caption": "large blue circle", "steps": [entry]})
  html = page(workdir)
  assert '<span class="wrong">red</span>' in html
  assert '<span class="right">circle</span>' in html
  assert '<span class="missing">large</span>' in html


def warnings(workdir) -> str:
  return " | ".join(finding.title for finding in findings(read_run(workdir)))


def evaluate(workdir, **changes):
  write_json(workdir / "evaluation" / f"{GENERATION}.json", EVALUATIONS[GENERATION] | changes)


def test_a_good_run_has_no_warnings(workdir):
  assert warnings(workdir) == ""


def test_falling_precision_is_hallucination(workdir):
  evaluate(workdir, caption_precision=0.40)
  assert "Captions are hallucinating: precision falls from 0.889 to 0.400" in warnings(workdir)
  assert "hallucinating" in page(workdir)


def test_captions_longer_than_the_truth_are_hallucination(workdir):
  evaluate(workdir, caption_length=19.9)
  assert "hallucinating: captions have 19.9 tokens on held-out images, the true ones 14.9" in warnings(workdir)


def test_a_length_beyond_the_truth_is_not_praised(workdir):
  evaluate(workdir, caption_length=19.9)
  assert '<span class="change bad">+12.3</span>' in page(workdir)


def test_the_vae_is_no_baseline_of_images_from_captions(workdir):
  """It reconstructs the originals: that the first captions lead to less is no loss."""
  config = json.loads((workdir / "config.json").read_text())
  write_json(workdir / "config.json", config | {"stages": ["vae", *config["stages"]]})
  write_json(workdir / "evaluation" / "vae.json", {"psnr": 30.2, "object_accuracy": 0.93})
  run = read_run(workdir)
  first, second = [stage for stage in run.stages if "reward_similarity" in run.evaluations.get(stage, {})][:2]
  assert run.stages[0].name == "vae" and {"psnr"} <= run.evaluations[first].keys() & run.evaluations[second].keys()
  assert run.evaluated_before(first, "psnr") is None
  assert run.evaluated_before(second, "psnr") == first


def test_a_reward_that_rises_alone_is_hacking(workdir):
  evaluate(workdir, held_out_similarity=0.3)
  assert "Reward hacking" in warnings(workdir)


def test_falling_psnr_is_told(workdir):
  evaluate(workdir, psnr=11.0)
  assert "PSNR falls from 12.06 to 11.00" in warnings(workdir)


def rl_lines(workdir, **curves):
  lines = [
    {"stage": GENERATION, "step": step + 1, "round": 0, "seconds": float(step)}
    | {name: curve(step / 39) for name, curve in curves.items()}
    for step in range(40)
  ]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_is_still_going_is_judged_by_its_curves(workdir):
  (workdir / "evaluation" / f"{GENERATION}.json").unlink()
  (workdir / "evaluation" / "understanding_for_generation.json").unlink()
  rl_lines(
    workdir,
    reward=lambda t: 0.4 + 0.3 * t,
    held_out_reward=lambda t: 0.4 - 0.1 * t,
    caption_precision=lambda t: 0.9 - 0.3 * t,
    caption_length=lambda t: 8 + 10 * t,
    truncated_fraction=lambda t: 0.5 * t,
    zero_std_fraction=lambda t: 0.9,
    loss=lambda t: None if t > 0.5 else 0.0,
  )
  found = warnings(workdir)
  for expected in (
    "hallucinating",
    "Reward hacking",
    "cut off",
    "no reward difference",
    "loss is not finite at step 21",
  ):
    assert expected in found


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "evaluation", "samples"])
def test_a_missing_piece_leaves_the_rest(workdir, missing):
  (workdir / missing).rename(workdir / "moved")
  assert "demo" in page(workdir)


def test_torn_and_foreign_files_are_noted(workdir):
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"stage": "x"}\n[1]\nnonsense\n{"stage": "generation_for_understanding", "st')
  (workdir / "evaluation" / "pretrain.json").write_text("{torn")
  write_json(workdir / "samples" / GENERATION / "gallery.json", [])
  html = page(workdir)
  assert "3 unreadable lines of metrics.jsonl were skipped" in html
  assert "pretrain.json could not be read" in html and "gallery.json could not be read" in html


@pytest.mark.parametrize("value", [True, 7, {"a": 1}])
def test_samples_of_another_form_are_left_out(workdir, value):
  for name, field in (("gallery.json", "items"), ("captions.json", "steps")):
    write_json(workdir / "samples" / GENERATION / name, {field: value})
  run = read_run(workdir)
  assert not any(stage.name == GENERATION for stage in (*run.galleries, *run.captions))
  assert "demo" in page(workdir)


def test_a_run_that_has_just_begun(tmp_path):
  write_json(tmp_path / "config.json", {"stages": ["pretrain"]})
  assert "not started" in page(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 1, "loss": 2.0, "seconds": 1.0}\n')
  assert "in Stage 0 · Decoder pre-training, step 1" in page(tmp_path)


def test_a_missing_and_a_foreign_folder_are_one_error(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere: no such workdir"):
    write_report(tmp_path / "nowhere")
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(ValueError, match="not the workdir of a run"):
    write_report(tmp_path)
  assert not (tmp_path / "report").exists()


def test_rounds_alternate_in_run_order(workdir):
  for stage in (GENERATION, "understanding_for_generation"):
    (workdir / "evaluation" / f"{stage}.json").unlink()
    for number in (1, 2, 10):
      evaluation = figures(0.9, 0.9, 14.0, 0.9, 0.9, 0.9, 0.9, 20.0)
      write_json(workdir / "evaluation" / f"{stage}_round{number}.json", evaluation)
  (workdir / "metrics.jsonl").write_text(json.dumps({"stage": GENERATION, "step": 5, "round": 2, "reward": 0.5}) + "\n")
  run = read_run(workdir)
  rl = [
    stage.key.replace("_for_understanding", "").replace("_for_generation", "") for stage in run.stages if stage.round
  ]
  assert rl == [f"{name}_round{k}" for k in (1, 2, 10) for name in ("generation", "understanding")]
  assert run.metrics[Stage(GENERATION, 2)][0]["reward"] == 0.5
  assert "Stage 2 · Generation for Understanding, round 10" in page(workdir)


def test_lines_of_one_step_are_merged(tmp_path):
  lines = [{"stage": "pretrain", "step": 2, "loss": 1.0}, {"stage": "pretrain", "step": 2, "psnr": 9.0}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (line,) = read_run(tmp_path).metrics[Stage("pretrain")]
  assert line["loss"] == 1.0 and line["psnr"] == 9.0


def test_a_long_run_is_drawn_from_a_sample_that_misses_no_failure(tmp_path):
  """The time and memory of a report are bounded: at quadratic cost, this test would take minutes."""
  lines = 100_000
  with (tmp_path / "metrics.jsonl").open("w") as file:
    for step in range(1, lines + 1):
      loss = None if step == 77_777 else 1 / step
      file.write(json.dumps({"stage": "pretrain", "step": step, "round": 0, "loss": loss, "seconds": step / 2}) + "\n")
    file.write(json.dumps({"stage": "cold_start", "step": 1, "round": 0, "loss": 1.0, "seconds": step / 2 + 1}) + "\n")
  begin = time.monotonic()
  run = read_run(tmp_path)
  text = text_of(page(tmp_path))
  assert time.monotonic() - begin < 20
  assert len(run.metrics[Stage("pretrain")]) < 10_000
  assert [line["step"] for line in run.metrics[Stage("pretrain")]][:: len(run.metrics[Stage("pretrain")]) - 1] == [
    1,
    lines,
  ]
  assert findings(run)[0].title == "loss is not finite at step 77777"
  assert len(run.metrics[Stage("cold_start")]) == 1
  assert "lines per stage: pretrain 100,000" in text
  assert "13 h 53 min" in text


def test_time_is_split_by_phase(workdir):
  from uae_jax.report.curves import times

  rows = {row["title"]: row for row in times(read_run(workdir))["rows"]}
  parts = {part.label: part.value for part in rows["Stage 2 · Generation for Understanding"]["parts"]}
  assert parts["rollout"] == pytest.approx(120 * 0.55)
  assert parts["step"] == pytest.approx(120 * (1.15 - 0.55 - 0.12 - 0.43 - 0.02))
  assert sum(parts.values()) == pytest.approx(120 * 1.25)


def test_rates_of_a_chip_are_shown_where_they_were_logged(workdir):
  text = text_of(page(workdir))
  assert "102 images/s · 1,530 tokens/s · 41.2 % of its peak" in text
  assert text.count("images/s") == 2


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.91, 0.97, [0.92, 0.94, 0.96]), (3, 3, [3]), (-5, 120, [0, 25, 50, 75, 100])],
)
def test_ticks_are_round_numbers(low, high, expected):
  assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
  "ys", [[], [1.0], [2.0, 2.0], [float("nan")] * 3, [1.0, float("nan"), float("inf"), 3.0], [1e-9, 1e9], [-1.0] * 900]
)
def test_a_chart_of_anything_is_valid(ys):
  svg = charts.line_chart([charts.Line("y", list(range(len(ys))), ys)], title="y")
  assert "nan" not in svg and "inf" not in svg.replace("infinite", "")


@pytest.mark.parametrize(
  ("value", "text"),
  [(0, "0"), (0.96123, "0.961"), (14.95, "14.9"), (12345.6, "12,346"), (2e-7, "2.0e-07"), (-0.02, "-0.02")],
)
def test_labels_are_short(value, text):
  assert charts.label(value) == text


def test_the_page_of_reconstructions_is_escaped(tmp_path):
  image = Image.new("RGBA", (64, 32))
  pairs = [Pair.of(Path(f"{EVIL}.png"), image, EVIL, "recon_a b#?.png", image)]
  html = write_page(tmp_path, pairs, [EVIL], "only scenes").read_text()
  assert "<script>" not in html
  assert "only scenes" in html and 'src="recon_a%20b%23%3F.png"' in html
