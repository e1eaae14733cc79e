"""Questions about images: layouts, prompts, judging, and the frame of suites that are scored here."""

import base64
import errno
import json

import numpy as np
import pytest
from stand_in import StandIn, gray

from uae_jax import cli, files
from uae_jax.commands import model_arguments
from uae_jax.evaluation import results, rows
from uae_jax.evaluation.suites import vqa, vqa_layouts
from uae_jax.evaluation.suites.spec import SuiteError

pytestmark = pytest.mark.fast

QUESTIONS = [
  {"image": "10.png", "question": "Which?", "choices": ["cat", "dog"], "answer": "dog", "category": "small objects"},
  {"image": "20.png", "question": "Is there a cat?", "answer": "Yes", "category": "objects"},
  {"image": "20.png", "question": "What color?", "answer": "dark red", "category": "colors"},
  {"image": "10.png", "question": "What shape?", "answer": "circle", "category": "colors"},
]
ANSWERS = {"Which?": "B. dog", "Is there a cat?": "Yes, there is.", "What color?": "The dark-red.", "What shape?": "no"}


def write(folder, questions=QUESTIONS):
  for level in (10, 20):
    gray(level).save(folder / f"{level}.png")
  file = folder / "questions.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in questions))
  return file


@pytest.fixture
def command(tmp_path, monkeypatch):
  """(function that runs the suite with the model, the model)."""
  uae = StandIn(ANSWERS)
  monkeypatch.setattr(model_arguments, "load", lambda arguments: uae)
  file = write(tmp_path)

  def run(*more, out="out"):
    return cli.main(["evaluate", "--suite", f"vqa:{file}", "--out", str(tmp_path / out), *more])

  return run, uae


def test_accuracy_by_category_with_intervals(command, tmp_path, capsys):
  run, _ = command
  assert run("--model", "m") == 0
  scores = results.read(tmp_path / "out")["scores"]
  assert scores["categories"] == {"small objects": 1.0, "objects": 1.0, "colors": 0.5}
  assert scores["overall"] == 0.75 and 0.3 < scores["intervals"]["overall"][0] < 0.75
  # The stand-in finds the first candidate most likely: A, which is wrong, and Yes, which is right.
  assert scores["metrics"]["by log-probability"]["items"] == {"0": 0.0, "1": 1.0}
  shown = capsys.readouterr().out
  assert "colors         50.00  [" in shown and "temperature 0.0" in shown and "max_new_tokens 32" in shown


def test_finished_items_are_not_asked_again(command, tmp_path):
  run, uae = command
  assert run("--model", "m", "--batch-size", "1") == 0
  whole = (tmp_path / "out/items.jsonl").read_bytes()
  cut = whole[: whole.rfind(b'{"key": "3"') + 9]  # a line that was being written
  (tmp_path / "out/items.jsonl").write_bytes(cut)
  assert uae.count("answer") == 4
  assert run("--model", "m") == 0
  assert uae.count("answer") == 5 and (tmp_path / "out/items.jsonl").read_bytes() == whole
  assert run() == 0 and uae.count("answer") == 5  # without a model, rows are scored again


def test_a_full_disk_ends_the_command_and_keeps_what_is_done(command, tmp_path, capsys):
  run, uae = command
  answer = uae.answer

  def full(images, questions, **options):
    if uae.count("answer") == 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    return answer(images, questions, **options)

  uae.answer = full
  assert run("--model", "m", "--batch-size", "1") == 1 and "No space left" in capsys.readouterr().err
  assert len((tmp_path / "out/items.jsonl").read_text().splitlines()) == 2
  uae.answer = answer
  assert run("--model", "m") == 0 and uae.count("answer") == 4


def test_equally_likely_choices_are_no_answer(command, tmp_path):
  run, uae = command
  uae.choice_log_probs = lambda images, questions, choices, batch_size: [np.zeros(len(row)) for row in choices]
  assert run("--model", "m") == 0
  assert results.read(tmp_path / "out")["scores"]["metrics"]["by log-probability"]["overall"] == 0


def test_parts_of_a_job_share_a_folder(command, tmp_path):
  run, uae = command
  for part in range(2):
    assert run("--model", "m", "--shard", f"{part}/2") == 0
  assert uae.count("answer") == 4 and len(results.read(tmp_path / "out")["scores"]["items"]) == 4


def test_a_broken_image_is_named_and_the_others_are_asked(command, tmp_path, capsys):
  run, _ = command
  (tmp_path / "20.png").write_bytes((tmp_path / "20.png").read_bytes()[:40])
  assert run("--model", "m") == 1
  found = results.read(tmp_path / "out")
  assert sorted(found["failed"]) == ["1", "2"] and "20.png" in found["failed"]["1"]
  assert found["scores"]["notes"] == ["2 of 4 prompts have no score, the first is '1'"]


def test_other_settings_are_refused_and_those_of_a_result_repeated(command, tmp_path, capsys):
  run, uae = command
  assert run("--model", "m", "--max-new-tokens", "5") == 0
  assert run("--model", "m") == 1 and "max_new_tokens: 5, 32" in capsys.readouterr().err
  assert run("--model", "m", "--like", str(tmp_path / "out/results.json"), out="again") == 0
  assert results.read(tmp_path / "again")["settings"]["max_new_tokens"] == 5


@pytest.mark.parametrize(
  "name, content, expected",
  [
    ("a.json", json.dumps({"question_id": 3, "image": "x.jpg", "text": "Is it?", "label": "no"}), ("3", "no", [])),
    (
      "b.json",
      json.dumps({"07": {"imageId": "9", "question": "What?", "answer": "car", "types": {"semantic": "obj"}}}),
      ("07", "car", []),
    ),
    (
      "c.tsv",
      "index\timage\tquestion\tA\tB\tanswer\tcategory\n"
      f"5\t{base64.b64encode(files.image_bytes(gray(3))).decode()}\tWhich?\tone\ttwo\tB\tocr\n",
      ("5", "B", ["one", "two"]),
    ),
  ],
)
def test_layouts_of_other_benchmarks(tmp_path, name, content, expected):
  (tmp_path / name).write_text(content + "\n")
  (question,) = vqa_layouts.read(tmp_path / name)
  assert (question["key"], question["answer"], question["choices"]) == expected
  if name == "c.tsv":
    assert vqa.image(question).getpixel((0, 0)) == (3, 3, 3) and question["category"] == "ocr"


@pytest.mark.parametrize(
  "record, message",
  [
    ({"prompt": "a photo of a bench", "tag": "counting"}, "field 'question': no such field; is it the file of another"),
    (dict(QUESTIONS[0], answer="bird"), "neither a letter nor the text"),
    (dict(QUESTIONS[0], choices=["cat"]), "2 to 26 texts"),
    (dict(QUESTIONS[1], answer=" "), "its answer is empty"),
  ],
)
def test_wrong_questions_are_refused(tmp_path, record, message):
  with pytest.raises(SuiteError, match=message):
    vqa_layouts.read(write(tmp_path, [record]))


@pytest.mark.parametrize(
  "answer, expected",
  [
    ("B", "B"),
    ("(b)", ""),
    ("B. dog", "B"),
    ("The answer is b.", "B"),
    ("a dog", "B"),
    ("Dog!", "B"),
    ("A bird", ""),
    ("A dog", "B"),
  ],
)
def test_letters_of_answers(answer, expected):
  assert vqa.letter(answer, ["cat", "dog"]) == expected


@pytest.mark.parametrize(
  "line", ["[]", '{"key": 3}', '{"key": "a", "files": 3}', '{"key": "a", "files": [null]}', "[" * 9999]
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
  (tmp_path / "items.jsonl").write_text(f'{{"key": "a"}}\n{line}\n')
  with pytest.raises(ValueError, match=r"items\.jsonl, line 2: not the row of an item"):
    rows.whole(tmp_path)
