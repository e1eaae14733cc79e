"""The configs of full size are whole: every field is known, and every stage's options are."""

from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
import pytest

from uae_jax.options import REINFORCEMENT
from uae_jax.training import stage, supervised
from uae_jax.training.sizes import MODELS

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("uae_3b_sd35l", "uae_3b_sd35m")
# Trained in the small world alone.
BASE_NETS = ("clip", "dinov2", "vae", "captioner")


def load(path: str) -> ConfigDict:
  """As `--config=` does it: locked."""
  from absl import flags

  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
  values(["test", f"--config={CONFIGS / path}"])
  return values.config


def fields(config: ConfigDict, prefix: str = "") -> set[str]:
  """Dotted names of all fields."""
  found = set()
  for name, value in config.items():
    found |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name}
  return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pixels", [512, 1024])
def test_a_config_of_full_size_is_valid(name, pixels):
  config = load(f"{name}.py:{pixels}")
  stage.validate(config)
  assert config.is_locked and config.data.image_px == pixels and not MODELS[config.model].trains_from_scratch
  # What can be set in one config can be set in all: fields are flags, and a locked config takes no others.
  known = load("scenes.py")
  assert fields(config) == {field for field in fields(known) if field.split(".")[0] not in BASE_NETS}


@pytest.mark.parametrize(("name", "target"), [("pretrain", -0.1), ("understanding_for_generation", 0.1)])
def test_a_target_of_no_learnable_loss_is_refused(name, target):
  config = load("scenes.py")
  config[name].target_loss = target
  with pytest.raises(ValueError, match=rf"config\.{name}\.target_loss = {target}: expected 0"):
    stage.validate(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_every_stage_is_known(name):
  """Options are dataclasses: an unknown name raises."""
  config = load(f"{name}.py")

  class Built:
    """As much as the makers of losses and phases look at before they are called."""

    class networks:
      prompts, embedders = None, dict.fromkeys(config.embedders)

    class processor:
      class tokenizer:
        all_special_ids = ()

  for stage_name in config.stages:
    optimizer, _, _ = stage.stage_optimizer(config[stage_name], stage_name)
    if stage_name in REINFORCEMENT:
      stage.make_phases(config, stage_name, Built, optimizer)
    else:
      assert supervised.make_step(stage.make_loss(config, stage_name, Built, None), optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_names_fields_that_exist(name):
  import runpy

  points = []
  runpy.run_path(str(CONFIGS / f"{name}.py"))["sweep"](lambda **fields: points.append(fields))
  assert len(points) == 5
  for point in points:
    load(f"{name}.py").update_from_flattened_dict(point)


def test_an_unknown_size_is_refused():
  import runpy

  with pytest.raises(ValueError, match=r"uae_3b_sd35l.py:768: expected one of 512, 1024 \(pixels\)"):
    runpy.run_path(str(CONFIGS / "uae_3b_sd35l.py"))["get_config"]("768")
