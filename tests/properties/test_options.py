"""Every option can be set from the command line and is documented; options that cannot work or have no effect raise."""

import argparse
from collections.abc import Iterator, Mapping
import dataclasses
import inspect
from pathlib import Path
import re
import subprocess
import sys
import types
import typing
from typing import Any

import pytest

from uae_jax import options
from uae_jax.commands import config_file
from uae_jax.commands.command_line import Parser
from uae_jax.options import Experiment, GenerationOptions, OptimizerOptions, Options, new_config, read_config
from uae_jax.options.flags import override, split_flags

pytestmark = pytest.mark.fast

SCENES = Path(__file__).parents[2] / "configs" / "scenes.py"
STAGE2, STAGE3, TOKENS = "generation_for_understanding", "understanding_for_generation", "image_tokens"
JOINT = "joint_tokens"


def all_fields(kind: type = Experiment, path: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """(dotted path, field, type) of every field that is not a section; of `embedders`, the entry of CLIP."""
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    name, hint = f"{path}{field.name}", hints[field.name]
    if dataclasses.is_dataclass(hint):
      yield from all_fields(hint, f"{name}.")
    elif typing.get_origin(hint) is Mapping:
      yield f"{name}.clip", field, typing.get_args(hint)[1]
    else:
      yield name, field, hint


FIELDS = {path: (field, hint) for path, field, hint in all_fields()}

# Valid values of fields whose type alone does not suggest one.
VALUES = {
  "data.buckets": ("16x32", "32x16"),
  "objective.delta": 3.0,
  "options.reward_weights": (("dinov2", 0.5), ("clip", 0.0)),
  "options.held_out_embedder": "dinov2",
  "options.window_range": (0, 4),
  "options.noising_range": (0.25, 0.75),
  "guidance_interval": (0.25, 0.75),
  "options.num_rollouts": 12,
  "http_reward.url": "http://127.0.0.1:1/",
  "optimizer.spike_factor": 2.0,
  "rounds": 2,
  "xla_flags": "--xla_a=1",
  "libtpu_init_args": "--xla_tpu_a=1",
  "metric_writers": ("wandb", "module:make"),
  "mesh.data": 2,
  "mesh.fsdp": 2,
  "stages": ("clip", "pretrain"),
  "cold_start.options.gradient_steps": 5,
  "text_rewards.forbidden_tokens": (3, 5),
  "num_microbatches": 2,
  "num_minibatches": 2,
  "replay_chunks": 2,
  "caption_tokens": 600,
  "options.max_new_tokens": 26,
  "options.top_k": 5,
  "objective.sampling_cap": 2.0,
  "evaluation.suites.names": ("transfer:pictures", "captions:pictures"),
  "sampler_steps": 11,
  "evaluation.batch_size": 32,
  "batch_size": 64,
  f"{STAGE3}.options.temperature": 0.5,
  f"{TOKENS}.options.temperature": 0.5,
  f"{TOKENS}.options.image_top_k": 5,
  f"{JOINT}.options.image_top_k": 5,
  f"{STAGE3}.options.sampler": "cps",
}
REWARDS = '(("clip",1.0),("length",0.1),("repetition",0.1),("format",0.1))'
# field -> other flags that it requires; without them it would have no effect and is refused.
COMPANIONS = {
  "data.image_field": (("data.source", "jsonl:a.jsonl"),),
  "data.caption_field": (("data.source", "jsonl:a.jsonl"),),
  "data.caption_choice": (("data.source", "jsonl:a.jsonl"),),
  "data.buckets": (("data.source", "folder:a"),),
  "data.max_crop": (("data.source", "folder:a"), ("data.buckets", "16x32")),
  "profile.first_step": (("profile.num_steps", "1"),),
  "checkpoints.metric": (("checkpoints.best", "1"),),
  "checkpoints.mode": (("checkpoints.best", "1"),),
  **{
    f"cold_start.options.{name}": (("cold_start.options.captions", "sampled"),)
    for name in ("temperature", "top_k", "top_p", "min_p")
  },
  **{
    f"{section}.guidance_interval": ((f"{section}.guidance", "3.0"),)
    for section in ("evaluation", *(f"{stage}.options" for stage in ("cold_start", STAGE2, STAGE3)))
  },
  **{
    f"{stage}.objective.{name}": ((f"{stage}.objective.{other}", value),)
    for stage in (STAGE2, TOKENS, JOINT)
    for name, other, value in (
      ("ratio_cap", "loss", "cispo"),
      ("temperature_positive", "loss", "sapo"),
      ("temperature_negative", "loss", "sapo"),
      *((name, "loss", "vespo") for name in ("k_positive", "k_negative", "lambda_positive", "lambda_negative")),
      ("sampling_correction", "sampling_cap", "2.0"),
      ("kl", "beta", "0.1"),
      ("is_kl_weighted", "beta", "0.1"),
    )
  },
  f"{STAGE3}.objective.kl": ((f"{STAGE3}.objective.beta", "0.1"),),
  f"{STAGE3}.objective.divergence_threshold": ((f"{STAGE3}.objective.trust_region", "divergence"),),
  f"{STAGE3}.objective.mix": ((f"{STAGE3}.objective.loss", "nft"),),
  f"{STAGE3}.objective.advantage_mode": ((f"{STAGE3}.objective.loss", "nft"),),
  f"{STAGE3}.objective.max_advantage": ((f"{STAGE3}.objective.loss", "nft"),),
  f"{STAGE3}.objective.weight": ((f"{STAGE3}.objective.loss", "awm"),),
  f"{STAGE3}.objective.average_beta": (
    (f"{STAGE3}.objective.loss", "awm"),
    (f"{STAGE3}.options.old_decay", "0.5"),
  ),
  f"{STAGE3}.options.window_stride": ((f"{STAGE3}.options.window_strategy", "progressive"),),
  f"{STAGE3}.options.window_hold": ((f"{STAGE3}.options.window_strategy", "progressive"),),
  f"{STAGE3}.options.noising_points": ((f"{STAGE3}.objective.loss", "nft"),),
  f"{STAGE3}.options.noising_density": ((f"{STAGE3}.objective.loss", "nft"),),
  f"{STAGE3}.options.noising_range": ((f"{STAGE3}.objective.loss", "nft"),),
  f"{STAGE3}.options.old_decay": ((f"{STAGE3}.objective.loss", "nft"),),
  **{
    f"{STAGE3}.options.{name}": ((f"{STAGE3}.objective.loss", "nft"), (f"{STAGE3}.options.old_decay", "0.5"))
    for name in ("old_decay_slope", "old_decay_start")
  },
  **{f"{stage}.ema_interval": ((f"{stage}.ema_decay", "0.9"),) for stage in options.STAGES},
  **{f"{stage}.reference.interval": ((f"{stage}.objective.beta", "0.1"),) for stage in (STAGE2, STAGE3, TOKENS, JOINT)},
  **{
    f"{stage}.reference.alpha": ((f"{stage}.objective.beta", "0.1"), (f"{stage}.reference.interval", "2"))
    for stage in (STAGE2, STAGE3, TOKENS, JOINT)
  },
  f"{STAGE3}.options.samples_from": (
    (f"{STAGE3}.objective.loss", "nft"),
    (f"{STAGE3}.options.old_decay", "0.5"),
  ),
  **{
    f"{STAGE2}.text_rewards.{name}": ((f"{STAGE2}.options.reward_weights", REWARDS),)
    for name in ("length_free_tokens", "repetition_ngram", "forbidden_tokens")
  },
  **{
    f"{stage}.http_reward.url": ((f"{stage}.options.reward_weights", '(("clip",1.0),("http",0.1))'),)
    for stage in (STAGE2, STAGE3, TOKENS, JOINT)
  },
}


def other_value(path: str, field: dataclasses.Field, hint: Any) -> Any:
  """A valid value of the field other than its default."""
  for end, value in VALUES.items():
    if path == end or path.endswith("." + end):
      return value
  default = current(new_config(), path) if not path.startswith("embedders.") else ""
  if field.metadata.get("choices"):
    return next(choice for choice in field.metadata["choices"] if choice != default)
  if isinstance(hint, types.UnionType):
    return 0.5
  if hint is bool:
    return not default
  if hint is int:
    return default + 1
  if hint is float:
    return default / 2 if default else 0.5
  return "other" if hint is str else ("clip",)


def text_of(value: Any) -> str:
  """The value as a user types it."""
  if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
    return ",".join(value)
  return str(value).lower() if isinstance(value, bool) else str(value)


def current(config, path: str) -> Any:
  for name in path.split("."):
    config = config[name] if hasattr(config, "keys") else getattr(config, name)
  return config


def refusal(*flags: tuple[str, Any]) -> str:
  """The error of a config with these overrides."""
  config = new_config()
  with pytest.raises(ValueError) as caught:
    for path, value in flags:
      override(config, path, text_of(value))
    read_config(config)
  return str(caught.value)


# --- All fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_can_be_set(path):
  value = other_value(path, *FIELDS[path])
  if not path.startswith("embedders."):
    assert value != current(Experiment(), path)
  config = new_config()
  for name, text in COMPANIONS.get(path, ()):
    override(config, name, text)
  override(config, path, text_of(value))
  if path in ("clip.num_microbatches", "dinov2.num_microbatches"):
    assert current(config, path) == value
    with pytest.raises(ValueError, match=rf"^config\.{path} = 2: a contrastive loss needs all negatives"):
      read_config(config)
    return
  found = current(read_config(config), path)
  assert found == value and type(found) is type(value)


def test_all_sections_are_reached():
  kinds = {kind for kind in vars(options).values() if isinstance(kind, type) and issubclass(kind, Options)}
  sections = {type(value) for value in sections_of(Experiment())}
  bases = {base for kind in sections for base in kind.__mro__}
  assert kinds <= bases
  assert len(FIELDS) > 200


def sections_of(section: Options) -> Iterator[Options]:
  yield section
  for field in dataclasses.fields(section):
    if isinstance(getattr(section, field.name), Options):
      yield from sections_of(getattr(section, field.name))


@pytest.mark.parametrize("kind", sorted({type(x) for x in sections_of(Experiment())}, key=lambda kind: kind.__name__))
def test_every_field_is_documented(kind):
  documented = set()
  for base in kind.__mro__:
    _, _, attributes = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
    documented |= set(re.findall(r"^  (\w+): \S", attributes, re.MULTILINE))
  assert {field.name for field in dataclasses.fields(kind)} <= documented


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def parse(monkeypatch):
  """Runs `config_file.parse` on flags; they come from the call, not from the arguments of this process."""
  monkeypatch.setattr(sys, "argv", ["pytest"])

  def parsed(*flags: str) -> Experiment:
    return config_file.parse(Parser("train", "Trains."), [f"--config={SCENES}:smoke", *flags])[1]

  return parsed


@pytest.mark.parametrize(
  "flags, path, value",
  [
    (["--config.seed=3"], "seed", 3),
    (["--config.seed", "3"], "seed", 3),
    (["--config.tensorboard=false"], "tensorboard", False),
    (["--config.tensorboard=0"], "tensorboard", False),
    (["--noconfig.tensorboard"], "tensorboard", False),
    (["--noconfig.tensorboard", "--config.tensorboard"], "tensorboard", True),
    (["--config.pretrain.optimizer.learning_rate=1e-4"], "pretrain.optimizer.learning_rate", 1e-4),
    (["--config.pretrain.trainable=^(a|b)=.*$"], "pretrain.trainable", "^(a|b)=.*$"),
    (["--config.embedders.clip=weights/clip"], "embedders.clip", "weights/clip"),
    (["--config.embedders.siglip2=weights/siglip2"], "embedders.siglip2", "weights/siglip2"),
    ([f"--config.{STAGE3}.objective.clip_low=0.5"], f"{STAGE3}.objective.clip_low", 0.5),
    ([f"--config.{STAGE3}.objective.clip_low=none"], f"{STAGE3}.objective.clip_low", None),
    (["--config.pretrain.batch_size=8", "--config.pretrain.batch_size=16"], "pretrain.batch_size", 16),
  ],
)
def test_flags_are_read_from_the_arguments(parse, flags, path, value):
  assert current(parse(*flags), path) == value


def test_paths_are_of_this_machine(parse, monkeypatch):
  """A home folder is expanded in every field that is a path; an address is refused with the name of its field.

  What is only read may be in a bucket.
  """
  monkeypatch.setenv("HOME", "/home/me")
  fields = ("init.weights", "init.checkpoint", "processor", "data.data_dir", "embedders.clip")
  for path in fields:
    found = parse(f"--config.{path}=~/a:b", "--config.data.source=jsonl:x")
    for name in path.split("."):
      found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == "/home/me/a:b"
    with pytest.raises(argparse.ArgumentError, match=rf"config\.{path} = s3://b/a: an address"):
      parse(f"--config.{path}=s3://b/a", "--config.data.source=jsonl:x")
  assert parse("--config.data.source=folder:~/a").data.source == "folder:/home/me/a"
  assert parse("--config.data.source=tfds:coco", "--config.data.data_dir=gs://b").data.data_dir == "gs://b"
  with pytest.raises(argparse.ArgumentError, match=r"config\.data\.source = s3://b/x"):
    parse("--config.data.source=arrayrecord:s3://b/x")
  for source in ("arrayrecord:gs://b/x-*", "mix:1.0*folder:gs://b/x;2.0*jsonl:gs://b/y"):
    assert parse(f"--config.data.source={source}").data.source == source
  for path in ("init.checkpoint", "data.index_dir"):
    with pytest.raises(argparse.ArgumentError, match=rf"config\.{path} = gs://b/a: an address"):
      parse(f"--config.{path}=gs://b/a", "--config.data.source=jsonl:x")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("def get_config():\n  return unknown\n", r"c\.py:2: NameError: name 'unknown' is not defined"),
    ("def get_config():\n  raise ValueError('no')\n", r"c\.py:2: ValueError: no"),
    ("import neighbor\n\n\ndef get_config():\n  neighbor.fail()\n", r"neighbor\.py:2: KeyError: 'lost'"),
    ("def get_config(:\n", r"c\.py:1: SyntaxError"),
    ("import absent_module\n", r"c\.py:1: ModuleNotFoundError"),
    (
      "from uae_jax.options import new_config\ndef get_config():\n  config = new_config()\n  config.sed\n",
      r"c\.py:4: AttributeError",
    ),
    ("x = 1\n", "the file defines no get_config"),
    ("def get_config():\n  return 3\n", "get_config returned int"),
  ],
)
def test_an_error_in_a_config_names_file_and_line(tmp_path, text, expected):
  (tmp_path / "neighbor.py").write_text("def fail():\n  return {}['lost']\n")
  (tmp_path / "c.py").write_text(text)
  with pytest.raises(ValueError, match=expected) as error:
    config_file.load_config(str(tmp_path / "c.py"))
  assert str(error.value).startswith(f"--config={tmp_path}/c.py: ")
  sys.modules.pop("neighbor", None)


def test_other_arguments_stay():
  argv = ["--config=FILE", "--config.seed=1", "--workdir", "DIR", "--noconfig.tensorboard"]
  assert split_flags(argv) == (
    [("seed", "1"), ("tensorboard", "false")],
    ["--config=FILE", "--workdir", "DIR"],
  )


@pytest.mark.parametrize(
  "text, value",
  [
    ("clip", ("clip",)),
    ("clip,dinov2", ("clip", "dinov2")),
    ("clip, dinov2", ("clip", "dinov2")),
    ("('clip',)", ("clip",)),
    ("('clip')", ("clip",)),
    ('("clip", "dinov2")', ("clip", "dinov2")),
    ("['clip']", ("clip",)),
  ],
)
def test_tuples_of_names(parse, text, value):
  assert parse(f"--config.stages={text}").stages == value
  assert parse(f"--config.evaluation.embedders={text}").evaluation.embedders == value


@pytest.mark.parametrize("text", ["()", "[]", ""])
def test_empty_tuples(parse, text):
  assert parse(f"--config.evaluation.embedders={text}").evaluation.embedders == ()
  config = new_config()
  override(config, "stages", text)
  assert config.stages == ()
  with pytest.raises(ValueError, match=r"^config\.stages = \(\): expected some of clip, "):
    read_config(config)


@pytest.mark.parametrize("text", ["(0,3)", "0,3", "[0,3]", "(0, 3)"])
def test_tuples_of_numbers(parse, text):
  assert parse(f"--config.{STAGE3}.options.window_range={text}").understanding_for_generation.options.window_range == (
    0,
    3,
  )


def test_pairs_of_rewards_and_weights(parse):
  found = parse(f'--config.{STAGE3}.options.reward_weights=(("clip",0.5),("siglip2",1))')
  assert found.understanding_for_generation.options.reward_weights == (("clip", 0.5), ("siglip2", 1.0))


@pytest.mark.parametrize(
  "path, text",
  [
    (f"{STAGE3}.options.window_range", "(0.0,3.0)"),
    (f"{STAGE3}.options.window_range", "(0,3,5)"),
    (f"{STAGE3}.options.window_range", "3"),
    (f"{STAGE3}.options.reward_weights", '("clip",0.5)'),
    (f"{STAGE3}.options.reward_weights", "clip"),
    ("stages", "(clip,)"),
    ("stages", "(1,2)"),
    ("clip.total_steps", "1e3"),
    ("clip.batch_size", "4.5"),
    ("clip.batch_size", "eight"),
    ("tensorboard", "maybe"),
    ("pretrain.optimizer.learning_rate", "fast"),
    (f"{STAGE2}.objective.delta", "much"),
  ],
)
def test_texts_of_another_type_are_refused(path, text):
  config = new_config()
  before = config.to_json()
  with pytest.raises(ValueError, match=rf"^config\.{path} = .*{re.escape(text)}.*: expected "):
    override(config, path, text)
  assert config.to_json() == before


@pytest.mark.parametrize(
  "path, message",
  [
    ("sead", "config (Experiment) has no field 'sead', did you mean config.seed?"),
    ("pretrain.batchsize", "config.pretrain (PretrainStage) has no field 'batchsize', did you mean config.pretrain"),
    (
      "pretrain.optimizer.learning_rat",
      "config.pretrain.optimizer (OptimizerOptions) has no field 'learning_rat', did you mean "
      "config.pretrain.optimizer.learning_rate?",
    ),
    ("pretrian.batch_size", "config (Experiment) has no field 'pretrian', did you mean config.pretrain?"),
    ("pretrain.learning_rate", "did you mean config.pretrain.optimizer.learning_rate?"),
    *(
      (f"{stage}.num_microbatches", f"did you mean config.{stage}.updates.num_microbatches?")
      for stage in (STAGE2, STAGE3)
    ),
    ("xyzzy", "config (Experiment) has no field 'xyzzy'; it has captioner, checkpoints, clip"),
    ("pretrain.optimizer", "config.pretrain.optimizer is a section: set one of its fields (learning_rate, "),
    ("embedders", "config.embedders is a section"),
    ("embedders.clip.folder", "config.embedders.clip is a value, not a section: it has no field 'folder'"),
    ("seed.x", "config.seed is a value, not a section: it has no field 'x'"),
    ("pretrain..seed", "has no field ''"),
  ],
)
def test_unknown_fields_name_the_nearest(path, message):
  with pytest.raises(ValueError) as caught:
    override(new_config(), path, "1")
  assert message in str(caught.value)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "flags, message",
  [
    # Out of range; the error starts with the path.
    ([("pretrain.batch_size", 0)], "config.pretrain.batch_size = 0: expected 1 or more"),
    ([("pretrain.optimizer.b1", 1.0)], "config.pretrain.optimizer.b1 = 1.0: expected 0 or more and less than 1"),
    ([("pretrain.optimizer.learning_rate", "nan")], "config.pretrain.optimizer.learning_rate = nan: expected a finite"),
    ([("dtype", "int8")], "config.dtype = 'int8': expected one of 'bfloat16', 'float32'"),
    ([("init.weights", "a"), ("init.checkpoint", "b")], "config.init.weights and checkpoint are both set"),
    # RL settings that cannot learn.
    ([(f"{STAGE2}.objective.clip_high", 0.0)], f"config.{STAGE2}.objective.clip_high = 0.0: expected more than 0"),
    ([(f"{STAGE3}.objective.clip_low", 0.0)], f"config.{STAGE3}.objective.clip_low = 0.0: expected more than 0"),
    ([(f"{STAGE2}.options.num_rollouts", 1)], f"config.{STAGE2}.options.num_rollouts = 1: expected 2 or more"),
    ([(f"{STAGE3}.options.num_rollouts", 1)], f"config.{STAGE3}.options.num_rollouts = 1: expected 2 or more"),
    ([(f"{STAGE2}.options.temperature", 0.0)], f"config.{STAGE2}.options.temperature = 0.0: expected more than 0"),
    ([(f"{STAGE3}.options.noise_level", 0.0)], f"config.{STAGE3}.options.noise_level = 0.0: expected more than 0"),
    ([(f"{STAGE3}.options.sampler", "flwo")], f"config.{STAGE3}.options.sampler = 'flwo': expected one of 'ode'"),
    ([(f"{STAGE2}.options.top_k", 1)], f"config.{STAGE2}.options.top_k = 1: all captions of a group would be the same"),
    ([(f"{STAGE2}.options.min_p", 1.0)], f"config.{STAGE2}.options.min_p = 1.0: expected 0 or more and less than 1"),
    ([(f"{STAGE2}.options.max_new_tokens", 1)], f"config.{STAGE2}.options.max_new_tokens = 1: expected 2 or more"),
    ([(f"{STAGE2}.options.guidance", 0.0)], f"config.{STAGE2}.options.guidance = 0.0: expected more than 0"),
    (
      [(f"{STAGE3}.options.sampler", "cps"), (f"{STAGE3}.options.noise_level", 2.0)],
      f"config.{STAGE3}.options.noise_level = 2.0: sampler = 'cps' has its largest noise at 1",
    ),
    (
      [(f"{STAGE2}.options.reward_weights", '(("clip",1e999),)')],
      f"config.{STAGE2}.options.reward_weights = (('clip', inf),): expected finite weights",
    ),
    ([(f"{STAGE2}.options.top_k", -1)], f"config.{STAGE2}.options.top_k = -1: expected 0 or more"),
    ([(f"{STAGE2}.options.top_p", 0.0)], f"config.{STAGE2}.options.top_p = 0.0: expected more than 0 and 1 or less"),
    ([(f"{STAGE2}.options.min_p", 1.5)], f"config.{STAGE2}.options.min_p = 1.5: expected 0 or more and less than 1"),
    (
      [(f"{STAGE2}.options.reward_weights", '(("clip",0.0),)')],
      f"config.{STAGE2}.options.reward_weights = (('clip', 0.0),): no reward has a weight",
    ),
    # Rules of the whole config.
    ([("stages", "pretrian")], "config.stages: unknown stage 'pretrian'"),
    ([("stages", "clip,clip")], "config.stages = ('clip', 'clip'): a stage is named twice"),
    ([("mesh.data", 3)], "config.pretrain.batch_size = 32 is not divisible by mesh.data * mesh.fsdp"),
    # Options that would have no effect.
    (
      [("pretrain.optimizer.schedule", "constant"), ("pretrain.optimizer.end_factor", 0.5)],
      "config.pretrain.optimizer.end_factor = 0.5 does nothing with schedule = 'constant'",
    ),
    (
      [("data.source", "folder:photographs"), ("data.variant", "dense")],
      "config.data.variant = 'dense' does nothing with source = 'folder:photographs'",
    ),
    (
      [("cold_start.options.temperature", 0.5)],
      "config.cold_start.options.temperature = 0.5 does nothing with captions = 'dataset'",
    ),
    (
      [(f"{STAGE3}.options.temperature", 0.0), (f"{STAGE3}.options.top_k", 5)],
      f"config.{STAGE3}.options.top_k = 5 does nothing with temperature = 0",
    ),
    (
      [(f"{STAGE3}.options.captions", "dataset"), (f"{STAGE3}.options.top_p", 0.5)],
      f"config.{STAGE3}.options.top_p = 0.5 does nothing with captions = 'dataset'",
    ),
    (
      [("evaluation.conditioning", "answer"), ("evaluation.text_tower", "policy")],
      "config.evaluation.text_tower = 'policy' does nothing with conditioning = 'answer' and no guidance",
    ),
    ([("checkpoints.metric", "psnr")], "config.checkpoints.metric = 'psnr' does nothing with best = 0"),
    ([("pretrain.ema_interval", 8)], "config.pretrain.ema_interval = 8 does nothing with ema_decay = 0"),
    ([("clip.ema_interval", 8)], "config.clip.ema_interval = 8 does nothing with ema_decay = 0"),
    ([(f"{STAGE2}.reference.interval", 8)], f"config.{STAGE2}.reference.interval = 8 does nothing with objective.beta"),
    ([(f"{STAGE3}.reference.interval", 8)], f"config.{STAGE3}.reference.interval = 8 does nothing with objective.beta"),
    (
      [(f"{STAGE3}.objective.beta", 0.1), (f"{STAGE3}.reference.alpha", 0.5)],
      f"config.{STAGE3}.reference.alpha = 0.5 does nothing with interval = 0",
    ),
    ([(f"{STAGE3}.objective.advantage_mode", "binary")], f"config.{STAGE3}.objective.advantage_mode = 'binary' does"),
    ([("checkpoints.mode", "max")], "config.checkpoints.mode = 'max' does nothing with best = 0"),
    ([("profile.first_step", 3)], "config.profile.first_step = 3 does nothing with num_steps = 0"),
    ([(f"{STAGE2}.text_rewards.repetition_ngram", 2)], f"config.{STAGE2}.text_rewards.repetition_ngram does nothing"),
    ([(f"{STAGE2}.http_reward.url", "http://a/")], f"config.{STAGE2}.http_reward.url does nothing"),
    (
      [(f"{STAGE2}.objective.is_kl_weighted", False)],
      f"config.{STAGE2}.objective.is_kl_weighted = False does nothing with beta = 0",
    ),
    ([(f"{STAGE2}.objective.kl", "k1")], f"config.{STAGE2}.objective.kl = 'k1' does nothing with beta = 0"),
    ([(f"{STAGE3}.objective.mix", 0.5)], f"config.{STAGE3}.objective.mix = 0.5 does nothing with loss = 'flow_grpo'"),
    ([(f"{STAGE3}.options.noising_points", 5)], f"config.{STAGE3}.options.noising_points does nothing with objective"),
  ],
)
def test_what_cannot_work_or_does_nothing_is_an_error(flags, message):
  assert refusal(*flags).startswith(message)


def test_policy_tower_with_guidance_is_not_inert():
  config = new_config()
  config.evaluation.update(conditioning="answer", text_tower="policy", guidance=5.0)
  assert read_config(config).evaluation.text_tower == "policy"


def test_options_are_frozen_and_keyword_only():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Experiment().seed = 1
  with pytest.raises(TypeError):
    OptimizerOptions(1e-3)
  with pytest.raises(ValueError, match="^learning_rate = -1.0: expected more than 0"):
    dataclasses.replace(OptimizerOptions(), learning_rate=-1)


@pytest.mark.parametrize("value", ["4", 4.5, True, None])
def test_options_made_in_python_have_types(value):
  with pytest.raises(ValueError, match=f"^sampler_steps = {value!r}: expected int"):
    GenerationOptions(sampler_steps=value)


def test_the_default_config_is_the_default_experiment():
  assert read_config(new_config()) == Experiment()


def test_options_import_no_jax():
  code = (
    "import sys\n"
    "import uae_jax.options\n"
    "import uae_jax.options.flags\n"
    "from uae_jax.commands import config_file\n"
    "uae_jax.options.read_config(uae_jax.options.new_config())\n"
    "found = {'jax', 'jaxlib', 'flax', 'optax'} & set(sys.modules)\n"
    "assert not found, found\n"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


def test_pieces_of_a_step_divide_its_prompts_on_every_chip():
  def config(pieces, chips=1):
    config = new_config()
    config.stages, config.mesh.data, config.evaluation.num_images = (STAGE3,), chips, 0
    section = config[STAGE3]
    section.batch_size, section.http_reward.num_pieces = 8, pieces
    return read_config(config)

  assert config(4).section(STAGE3).http_reward.num_pieces == 4
  with pytest.raises(ValueError, match="num_pieces = 3 does not divide batch_size = 8"):
    config(3)
  with pytest.raises(ValueError, match=r"batch_size = 8 is not divisible by .*num_pieces = 4 \* 4"):
    config(4, chips=4)
