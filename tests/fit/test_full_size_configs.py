"""Full-size configs are complete: every field is known, and so are the options of every stage."""

from pathlib import Path

from ml_collections import ConfigDict
import pytest

from uae_jax.commands.config_file import load_config
from uae_jax.options import REINFORCEMENT, new_config, read_config
from uae_jax.training import stage
from uae_jax.training.sizes import MODELS
from uae_jax.training.validate import validate

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("uae_3b_sd35l", "uae_3b_sd35m", "janus_pro_1b", "janus_pro_7b")
# Stages that exist only in the small world.
BASE_NETS = ("clip", "dinov2", "vae", "captioner")


def load(spec: str) -> ConfigDict:
  """Loads a config like `--config=`."""
  return load_config(str(CONFIGS / spec))


def fields(config: ConfigDict, prefix: str = "") -> set[str]:
  """Dotted names of all fields, except those of `embedders`, which is a free-form mapping."""
  found = set()
  for name, value in config.items():
    is_section = isinstance(value, ConfigDict) and name != "embedders"
    found |= fields(value, f"{prefix}{name}.") if is_section else {prefix + name}
  return found


@pytest.mark.parametrize(
  ("spec", "pixels"),
  [
    *((f"{name}.py:{pixels}", pixels) for name in NAMES[:2] for pixels in (512, 1024)),
    *((f"{name}.py", 384) for name in NAMES[2:]),
  ],
)
def test_a_config_of_full_size_is_valid(spec, pixels):
  config = load(spec)
  validate(read_config(config))
  assert config.data.image_px == pixels and not MODELS[config.model].trains_from_scratch
  # Every config has exactly the fields of the options.
  assert fields(config) == fields(new_config()) == fields(load("scenes.py"))


@pytest.mark.parametrize(
  ("name", "target", "message"),
  [
    ("pretrain", -0.1, r"config\.pretrain\.target_loss = -0.1: expected 0"),
    ("understanding_for_generation", 0.1, r"config\.understanding_for_generation has no field 'target_loss'"),
  ],
)
def test_a_target_of_no_learnable_loss_is_refused(name, target, message):
  config = load("scenes.py")
  config[name].target_loss = target
  with pytest.raises(ValueError, match=message):
    read_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_every_stage_is_known(name):
  """Losses and phases can be made from every section."""
  config = read_config(load(f"{name}.py"))

  class Built:
    """The attributes that the makers of losses and phases access before they are called."""

    class networks:
      prompts, embedders = None, dict.fromkeys(config.embedders)

    class processor:
      control_ids = ()

  for stage_name in config.stages:
    optimizer, _, _ = stage.stage_optimizer(config.section(stage_name))
    if stage_name in REINFORCEMENT:
      stage.make_phases(config, stage_name, Built, optimizer)
    else:
      assert stage.supervised_step(config, stage_name, Built, optimizer)


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
