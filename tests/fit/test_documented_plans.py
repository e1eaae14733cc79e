"""Documented plans match the current configs, and the page about pods follows from their numbers."""

import json
from pathlib import Path
import runpy

import pytest

from uae_jax.options import read_config
from uae_jax.planning import pods, stage_programs
from uae_jax.planning.chips import CHIPS

pytestmark = pytest.mark.fast

PLANS = Path(__file__).parents[2] / "docs" / "plans"


def documented() -> list[dict]:
  return [json.loads(file.read_text()) for file in sorted(PLANS.glob("*.json"))]


def program(phase: str, *, flops: float, bytes_: float, links: float) -> dict:
  seconds = max(flops / CHIPS["v5e"].flops, bytes_ / CHIPS["v5e"].hbm_bandwidth)
  work = {"flops": flops, "bytes": bytes_, "seconds": seconds}
  return {"stage": "rl", "phase": phase, "work": work, "link_seconds": links, "seconds": max(seconds, links)}


@pytest.fixture
def plan() -> dict:
  """A plan with 2 s of decoding, 1 s of image generation and 4 s of links: 7 s for 280 images and 140 captions."""
  chip = CHIPS["v5e"]
  phases = (
    program("rollout", flops=0.1 * chip.flops, bytes_=2 * chip.hbm_bandwidth, links=1.0),
    program("reward", flops=chip.flops, bytes_=0.5 * chip.hbm_bandwidth, links=0.0),
    program("update", flops=chip.flops, bytes_=chip.hbm_bandwidth, links=4.0),
  )
  about = {"model": "net", "image_px": 512, "num_chips": 10, "chip": "v5e", "mesh": {"data": 1, "fsdp": 10}}
  return about | {"stages": {"rl": {"images": 280, "captions": 140}}, "programs": phases}


def test_a_chip_paints_its_share_in_the_time_of_all_phases(plan):
  (row,) = pods.throughput_rows(plan)
  assert row == "| net, 512 px, 10 x v5e (fsdp 10) | rl | 7 | 4 / 2.4 / 1.6 | 2 / 1.2 / 0.8 |"


def test_the_longest_time_names_the_bound(plan):
  assert [row.split("|")[-2].strip() for row in pods.bound_rows(plan)] == ["HBM", "matrix units", "links"]


def test_the_page_in_the_docs_is_of_the_plans_beside_it():
  plans = documented()
  assert plans and (PLANS / "pods.md").read_text() == pods.page(plans)


@pytest.mark.parametrize("plan", documented(), ids=lambda plan: f"{plan['topology']} {' '.join(plan['stages'])}")
def test_a_documented_plan_is_of_the_config_as_it_is(plan):
  flags = dict(word.split("=", 1) for word in plan["command"] if "=" in word)
  file, _, variant = flags["--config"].partition(":")
  config = runpy.run_path(str(PLANS.parents[1] / file))["get_config"](variant)
  for flag, value in flags.items():
    if flag.startswith("--config."):
      name = flag.removeprefix("--config.")
      config.update_from_flattened_dict({name: int(value) if value.isdecimal() else value})
  config.stages = tuple(plan["stages"])
  config = read_config(config)
  assert plan["model"] == config.model and plan["image_px"] == config.data.image_px
  for stage, settings in plan["stages"].items():
    assert settings == stage_programs.settings_of(config, stage)
  fits = [program["memory"]["total"] <= program["memory"]["limit"] for program in plan["programs"]]
  assert plan["fits"] == all(fits) and len(fits) >= len(plan["stages"])
