"""metrics.jsonl survives interruptions: a resume drops later lines, time continues, incomplete lines are removed."""

import json
import math

import pytest

from uae_jax.commands.command_line import one_line
from uae_jax.evaluation.evaluator import remembered
from uae_jax.metrics_file import rewind
from uae_jax.training.metrics import MetricWriter

STAGE = "generation_for_understanding"


def read(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_run(workdir, stage=STAGE, steps=(1, 2, 3), start=0):
  writer = MetricWriter(workdir, tensorboard=False)
  writer.start_stage(stage, step=start, total_steps=3)
  for step in steps:
    writer.write(stage, step, {"reward": step / 10, "loss": math.nan})
  writer.end_stage()
  writer.close()


def test_a_line_a_logging_step(tmp_path):
  write_run(tmp_path)
  lines = read(tmp_path)
  assert [line["step"] for line in lines] == [1, 2, 3]
  assert lines[0] | {"seconds": 0} == {
    "stage": STAGE,
    "step": 1,
    "round": 0,
    "seconds": 0,
    "useful_seconds": 0.0,
    "reward": 0.1,
    "loss": None,
  }


def test_resume_drops_later_lines_of_the_stage_only(tmp_path):
  write_run(tmp_path, "cold_start")
  write_run(tmp_path)
  write_run(tmp_path, steps=(2, 3), start=1)
  steps = [(line["stage"], line["step"]) for line in read(tmp_path)]
  assert steps == [(stage, step) for stage in ("cold_start", STAGE) for step in (1, 2, 3)]


def test_a_stage_begun_anew_has_no_old_lines(tmp_path):
  write_run(tmp_path, steps=(0, 1, 2))
  write_run(tmp_path, steps=(1,))
  assert [line["step"] for line in read(tmp_path)] == [1]


def test_rounds_are_told_apart(tmp_path):
  write_run(tmp_path, f"{STAGE}_round1")
  write_run(tmp_path, f"{STAGE}_round2")
  write_run(tmp_path, f"{STAGE}_round2", steps=(1,))
  assert [(line["stage"], line["round"], line["step"]) for line in read(tmp_path)] == [
    (STAGE, 1, 1),
    (STAGE, 1, 2),
    (STAGE, 1, 3),
    (STAGE, 2, 1),
  ]


def test_the_clock_goes_on(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "pretrain", "step": 9, "seconds": 100.0}) + "\n")
  write_run(tmp_path, steps=(1,))
  assert 100.0 <= read(tmp_path)[-1]["seconds"] < 110.0


def test_a_torn_line_is_dropped(tmp_path):
  write_run(tmp_path)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"stage": "generation_for_un')
  write_run(tmp_path, steps=(), start=3)
  assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
  assert not (tmp_path / "metrics.tmp").exists()


def test_a_full_disk_names_the_file(tmp_path):
  writer = MetricWriter(tmp_path, tensorboard=False)
  writer.start_stage(STAGE, step=0, total_steps=3)
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(OSError) as caught:
    writer.write(STAGE, 1, {"reward": 0.0})
  writer.close()
  assert one_line(caught.value) == f"{tmp_path / 'metrics.jsonl'}: No space left on device"


def test_rewinding_nothing_writes_nothing(tmp_path):
  assert rewind(tmp_path / "metrics.jsonl", STAGE, 0, 0) == {"seconds": 0.0, "useful_seconds": 0.0}
  assert list(tmp_path.iterdir()) == []


def test_damaged_lines_do_not_keep_a_run_from_resuming(tmp_path):
  write_run(tmp_path, "cold_start")
  file = tmp_path / "metrics.jsonl"
  good = file.read_bytes()
  damaged = (
    b'\xff\xfe\x00\n{"stage": "cold_start", "step": 2, "round": 0, "loss": \xff1.0}\n[1]\n{}\n\n' + b"[" * 5000 + b"\n"
  )
  file.write_bytes(damaged + good + damaged + good[:30])
  write_run(tmp_path, steps=(1,))
  assert [(line["stage"], line["step"]) for line in read(tmp_path)] == [
    ("cold_start", 1),
    ("cold_start", 2),
    ("cold_start", 3),
    (STAGE, 1),
  ]
  assert not (tmp_path / "metrics.tmp").exists()


def test_a_line_without_its_end_stays_whole(tmp_path):
  write_run(tmp_path, steps=(1, 2))
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(file.read_bytes().removesuffix(b"\n"))
  write_run(tmp_path, steps=(3,), start=2)
  assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_other_processes_write_nothing(tmp_path):
  writer = MetricWriter(tmp_path / "run", enabled=False)
  writer.start_stage(STAGE, step=0, total_steps=3)
  writer.write(STAGE, 1, {"loss": 1.0})
  writer.end_stage()
  writer.close()
  assert not (tmp_path / "run").exists()


def test_tensorboard_gets_scalars_images_and_texts(tmp_path):
  import numpy as np
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  writer = MetricWriter(tmp_path)
  writer.start_stage(STAGE, step=0, total_steps=1)
  writer.write(STAGE, 1, {"reward": np.float32(0.5)})
  writer.write_images(STAGE, 1, {"originals": np.zeros((1, 4, 4, 3), np.uint8)})
  writer.write_texts(STAGE, 1, {"caption": "red circle"})
  writer.close()
  events = EventAccumulator(str(tmp_path))
  events.Reload()
  tags = events.Tags()["tensors"] + events.Tags()["scalars"]
  assert {f"{STAGE}/reward", f"{STAGE}/originals"} <= set(tags)
  assert any("caption" in tag for tag in tags)


@pytest.mark.parametrize("content", [b"", b'{"steps": [{"st', b"\xff", b"[]", b'{"steps": [1]}'])
def test_damaged_captions_of_earlier_steps_do_not_end_a_run(tmp_path, content):
  (tmp_path / "captions.json").write_bytes(content)
  assert remembered(tmp_path / "captions.json") == []
