"""Before a run trains: readable data, captions where needed, no unnoticed changes, and cut captions counted."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pytest

from tests.processors import processor_of
from uae_jax import sharding
from uae_jax.data.caption_lengths import LENGTHS_FILE, read_lengths
from uae_jax.options import Experiment, new_config, read_config
from uae_jax.report.page import write_report
from uae_jax.small_world.processor import make_tokenizer
from uae_jax.training import batches as batches_lib
from uae_jax.training.batches import Batches
from uae_jax.training.data_check import check_data, read_fingerprints, write_fingerprints
from uae_jax.training.stages import spec

SHORT, LONG = "large red circle ;", "large red circle ; small blue square ; small green square ;"
PROCESSOR = processor_of(make_tokenizer())


@pytest.fixture
def folder(tmp_path):
  Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
  return tmp_path


def config(folder: Path, stages=("pretrain",), **data) -> Experiment:
  made = new_config()
  made.stages = stages
  made.evaluation.num_images = 0
  made.data.update({"source": f"jsonl:{folder}/train.jsonl", "image_px": 8, "caption_tokens": 8} | data)
  made.pretrain.batch_size = 4
  made.generation_for_understanding.options.max_new_tokens = 4
  return read_config(made)


def write(folder: Path, records) -> None:
  (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def records(*captions):
  return [{"image": "a.png", "caption": caption} for caption in captions]


def make_batches(config: Experiment) -> Batches:
  return Batches(config, "pretrain", PROCESSOR, sharding.make_mesh(devices=jax.devices()[:1]), 0, needs_captions=True)


# --- Before anything is loaded ----------------------------------------------------------------------------------------


def test_which_stages_train_on_captions():
  options = read_config(new_config())
  needing = {
    name
    for name in ("clip", "vae", "captioner", "pretrain", "cold_start")
    + ("generation_for_understanding", "understanding_for_generation")
    if spec.find(name).needs_captions(options.section(name).options)
  }
  assert needing == {"clip", "captioner", "pretrain", "cold_start"}
  cold_start = spec.find("cold_start").needs_captions
  sampled = dataclasses.replace(options.cold_start.options, captions="sampled")
  assert not cold_start(sampled) and cold_start(dataclasses.replace(sampled, flow_weight=0.1))
  last = dataclasses.replace(options.understanding_for_generation.options, captions="dataset")
  assert spec.find("understanding_for_generation").needs_captions(last)


@pytest.mark.parametrize("record", [{"image": "a.png", "label": 1}, {"image": "a.png", "caption": " "}])
def test_a_stage_that_needs_captions_is_refused_by_name(folder, record):
  write(folder, [record] * 3)
  message = r"pretrain trains on captions, but none of 3 records of data\.source = 'jsonl:.*train\.jsonl' .*caption"
  with pytest.raises(ValueError, match=message):
    check_data(config(folder), folder / "run")
  check_data(config(folder, ("generation_for_understanding",)), folder / "run")
  write(folder, [record] * 300 + records(SHORT))
  check_data(config(folder), folder / "run")


def test_folders_without_captions_are_refused_by_name(folder):
  with pytest.raises(ValueError, match=r"pretrain trains on captions, .* \.txt file of the same name"):
    check_data(config(folder, source=f"folder:{folder}"), folder / "run")
  (folder / "a.txt").write_text(SHORT)
  check_data(config(folder, source=f"folder:{folder}"), folder / "run")


@pytest.mark.parametrize("stage", ["pretrain", "generation_for_understanding"])
def test_data_without_one_readable_record_are_refused(folder, stage):
  write(folder, [{"image": "b.png", "caption": SHORT}] * 3)
  with pytest.raises(ValueError, match=r"\(train\): none of 3 records .* line 1 \(cannot read .*b\.png: no such file"):
    check_data(config(folder, (stage,)), folder / "run")


def test_the_small_world_needs_no_check(tmp_path):
  assert check_data(config(tmp_path, source="scenes"), tmp_path / "run") == {}


# --- Changed data -----------------------------------------------------------------------------------------------------


def test_changed_data_are_noticed_when_a_run_resumes(folder, caplog):
  write(folder, records(SHORT, SHORT))
  run = folder / "run"
  found = check_data(config(folder), run)
  run.mkdir()
  write_fingerprints(run, found)
  write(folder, records(SHORT, SHORT, LONG))
  # Nothing is trained yet: nothing to protect.
  assert check_data(config(folder), run)["train"]["records"] == 3
  (run / "checkpoints" / "pretrain" / "10").mkdir(parents=True)
  message = r"'jsonl:.*' is not what this run was trained on \(train: records 2 -> 3; train: checksum .*--accept"
  with pytest.raises(ValueError, match=message):
    check_data(config(folder), run)
  write_fingerprints(run, check_data(config(folder), run, accepts_changes=True))
  assert "records 2 -> 3" in caplog.text and read_fingerprints(run)["train"]["records"] == 3
  check_data(config(folder), run)
  # A changed caption alone is noticed too, and a finished run does not look.
  write(folder, records(SHORT, LONG, SHORT))
  with pytest.raises(ValueError, match="checksum"):
    check_data(config(folder), run)
  (run / "checkpoints" / "pretrain" / "10" / "params").mkdir()
  assert check_data(config(folder), run) == {}


def test_the_held_out_split_is_noted_too(folder):
  write(folder, records(SHORT))
  (folder / "train.jsonl").rename(folder / "x_train.jsonl")
  (folder / "x_held_out.jsonl").write_text((folder / "x_train.jsonl").read_text() * 2)
  made = new_config()
  made.stages = ("pretrain",)
  made.data.source = f"jsonl:{folder}/x_{{split}}.jsonl"
  found = check_data(read_config(made), folder / "run")
  assert {split: values["records"] for split, values in found.items()} == {"train": 1, "held_out": 2}


@pytest.mark.parametrize("content", ["", "[1]", '{"train": 3}', '{"train":'])
def test_a_damaged_note_is_no_obstacle(folder, content):
  write(folder, records(SHORT))
  (folder / "checkpoints" / "pretrain" / "10").mkdir(parents=True)
  (folder / "data.json").write_text(content)
  found = check_data(config(folder), folder)
  write_fingerprints(folder, found)
  assert read_fingerprints(folder) == found


def test_processes_with_different_data_are_refused(monkeypatch):
  monkeypatch.setattr(batches_lib.processes, "gather", lambda value: [value, {"records": 4}])
  batches_lib.check_same({"records": 4}, "jsonl:x")
  with pytest.raises(ValueError, match=r"'jsonl:x' is not the same on all processes: .* on process 1"):
    batches_lib.check_same({"records": 3}, "jsonl:x")


# --- Cut captions -----------------------------------------------------------------------------------------------------


def test_cut_captions_are_counted(folder, caplog):
  write(folder, records(SHORT, LONG, SHORT, SHORT) * 2)
  batches = make_batches(config(folder))
  described = "8 captions have 5 to 13 tokens (half up to 5, 90 % up to 13, 99 % up to 13)"
  assert f"{described}; data.caption_tokens = 8 cuts 2, which lose 5 tokens on average" in caplog.text
  cut = [int(np.sum(np.asarray(next(batches)["length"]) == 8)) for _ in range(2)]
  assert sum(cut) == 2 and batches.counts() == {"bad_records": 0.0, "cut_captions": 0.25}
  cut = int(np.sum(np.asarray(next(batches)["length"]) == 8))
  assert batches.counts()["cut_captions"] == cut / 4
  # A caption that just fits, with its closing token, is not cut.
  batches = make_batches(config(folder, caption_tokens=len(PROCESSOR.encode(LONG)) + 1))
  next(batches)
  assert batches.counts()["cut_captions"] == 0.0


def test_the_lengths_of_captions_are_noted_and_reported(folder):
  write(folder, records(*[SHORT] * 6, *[LONG] * 2))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  Batches(config(folder), "pretrain", PROCESSOR, mesh, 0, needs_captions=True, workdir=folder)
  noted = read_lengths(folder)["pretrain"]
  assert noted["histogram"][0] == [5, 6, 6] and noted["histogram"][-1] == [13, 14, 2]
  (folder / "config.json").write_text("{}")
  html = write_report(folder).read_text()
  assert "Captions of the data" in html and "13 to 14" in html
  (folder / LENGTHS_FILE).write_text("{torn")
  assert "Captions of the data" not in write_report(folder).read_text()


@pytest.mark.parametrize("limit, is_refused", [(0.0, True), (0.2, True), (0.25, False)])
def test_the_limit_on_cut_captions(folder, limit, is_refused):
  write(folder, records(SHORT, LONG, SHORT, SHORT))
  if not is_refused:
    make_batches(config(folder, max_cut_fraction=limit))
    return
  message = rf"pretrain: 1 of 4 captions .* data\.caption_tokens = 8 .* data\.max_cut_fraction = {limit}"
  with pytest.raises(ValueError, match=message):
    make_batches(config(folder, max_cut_fraction=limit))


def test_a_sample_is_not_taken_for_the_whole(folder, monkeypatch):
  """What a sample contains by chance is left to the exact count, which ends the run."""
  monkeypatch.setattr(batches_lib, "NUM_CAPTIONS", 4)
  monkeypatch.setattr(batches_lib, "LEAST_ROWS", 4)
  write(folder, records(LONG, *[SHORT] * 8, LONG))
  batches = make_batches(config(folder, max_cut_fraction=0.19))
  next(batches), next(batches), next(batches), next(batches), next(batches)
  with pytest.raises(ValueError, match=r"4 of 20 captions so far .* data\.max_cut_fraction = 0\.19"):
    batches.counts()


def test_records_without_captions_are_bad_where_they_are_needed(folder):
  write(folder, records(SHORT, "", SHORT, SHORT))
  batches = make_batches(config(folder, max_bad_fraction=0.3))
  assert all(1 not in np.asarray(next(batches)["index"]) for _ in range(3))
  assert batches.counts()["bad_records"] == 1.0
