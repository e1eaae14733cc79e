"""The files of a processor's folder, in the layouts of transformers 4 and 5: one reader for all users of them."""

from collections.abc import Collection, Mapping
import math
import os
from pathlib import Path
from typing import Any
import warnings

from uae_jax import json_files
from uae_jax.options.sampling import TokenOptions
from uae_jax.plain import from_plain

IMAGE_SETTINGS, WHOLE_PROCESSOR, GENERATION = (
  "preprocessor_config.json",
  "processor_config.json",
  "generation_config.json",
)
TRANSFORMERS_TOP_K = 50
# JSON files that transformers reads for a tokenizer.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
)
# Settings of an image processor that change no pixel.
HARMLESS = frozenset(
  "image_processor_type feature_extractor_type processor_class auto_map _valid_processor_keys data_format "
  "input_data_format return_tensors device disable_grouping default_to_square".split()
)
# Fields of generation_config.json that change what is sampled, and the values with which they change nothing. Captions
# are sampled at the temperature of the call, so `temperature` and `do_sample` are not among them.
OTHER_SAMPLING: dict[str, tuple] = {
  "typical_p": (None, 1),
  "epsilon_cutoff": (None, 0),
  "eta_cutoff": (None, 0),
  "top_h": (None,),
  "num_beams": (None, 1),
  "num_beam_groups": (None, 1),
  "diversity_penalty": (None, 0),
  "length_penalty": (None, 1),
  "penalty_alpha": (None, 0),
  "no_repeat_ngram_size": (None, 0),
  "encoder_repetition_penalty": (None, 1),
  "encoder_no_repeat_ngram_size": (None, 0),
  "bad_words_ids": (None,),
  "force_words_ids": (None,),
  "constraints": (None,),
  "sequence_bias": (None,),
  "suppress_tokens": (None, []),
  "begin_suppress_tokens": (None, []),
  "forced_bos_token_id": (None,),
  "forced_eos_token_id": (None,),
  "exponential_decay_length_penalty": (None,),
  "min_length": (None, 0),
  "min_new_tokens": (None, 0),
  "stop_strings": (None,),
  "guidance_scale": (None, 1),
  "watermarking_config": (None,),
  "dola_layers": (None,),
}


def image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
  """The settings of the image processor, and the file that they are from.

  As in transformers, the entry `image_processor` of `processor_config.json` comes before `preprocessor_config.json`.

  Raises:
    ValueError: there are no such settings, or a file is not JSON.
  """
  whole, file = folder / WHOLE_PROCESSOR, folder / IMAGE_SETTINGS
  settings = json_files.read_object(whole, default={}).get("image_processor")
  if settings is not None:
    if not isinstance(settings, dict):
      raise ValueError(f"{whole}: image_processor is {settings!r:.60}, expected an object")
    return whole, settings
  if not file.exists():
    raise ValueError(
      f"{folder}: no {IMAGE_SETTINGS}, and no {WHOLE_PROCESSOR} with image_processor, so this is not the folder of a "
      "processor"
    )
  return file, json_files.read_object(file)


def check_fixed(file: Path, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
  """Checks settings that have one supported value each, which is also what null or nothing means.

  Raises:
    ValueError: a setting has another value.
  """
  for name, expected in fixed.items():
    found = settings.get(name)
    if isinstance(expected, float):
      is_equal = isinstance(found, int | float) and math.isclose(found, expected, rel_tol=1e-3)
    else:
      is_equal = found == expected
    if found is not None and not is_equal:
      raise ValueError(f"{file}: {name} is {found!r:.100}, only {expected!r} is supported")


def warn_unknown(file: Path, settings: Mapping[str, Any], known: Collection[str]) -> None:
  """Names the settings of an image processor that are neither known nor empty in a warning."""
  unknown = [name for name, value in settings.items() if value and name not in known and name not in HARMLESS]
  if unknown:
    warnings.warn(f"{file}: fields that are not known were ignored: {', '.join(unknown)[:500]}", stacklevel=4)


def is_statistic(values: Any, *, is_divisor: bool = False) -> bool:
  """Whether a value of a JSON file is a mean of three channels, or a standard deviation to divide by."""
  return (
    isinstance(values, list)
    and len(values) == 3
    and all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6 for value in values)
    and not (is_divisor and 0 in values)
  )


def replace_image_settings(folder: Path, changes: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
  """The file of the image settings and its whole content with some settings changed; None if nothing differs."""
  file, settings = image_settings(folder)
  if all(settings.get(name) == value for name, value in changes.items()):
    return None
  settings = settings | dict(changes)
  whole = json_files.read_object(file) | {"image_processor": settings} if file.name == WHOLE_PROCESSOR else settings
  return file, whole


def read_clip_tokenizer(folder: Path) -> Any:
  """Reads the tokenizer of CLIP, whatever its config says.

  Raises:
    ValueError: the tokenizer cannot be read.
  """
  from transformers import CLIPTokenizer  # Imported late: it loads half of transformers.

  return load_tokenizer(CLIPTokenizer, folder)


def read_tokenizer(folder: Path) -> Any:
  """Reads a transformers tokenizer; no code of the folder is run.

  Raises:
    ValueError: the tokenizer cannot be read.
  """
  from transformers import AutoTokenizer, PreTrainedConfig  # Imported late: they load half of transformers.

  # Of the model's config only the name of its type is needed; transformers would expand its sizes.
  kind = str(json_files.read_object(folder / "config.json", default={}).get("model_type", ""))
  config = PreTrainedConfig()
  vars(config)["model_type"] = kind
  return load_tokenizer(AutoTokenizer, folder, config=config, trust_remote_code=False)


def load_tokenizer(cls: Any, folder: Path, **kwargs: Any) -> Any:
  """Returns `cls.from_pretrained(folder)`.

  Raises:
    ValueError: the tokenizer cannot be read.
  """
  for name in TOKENIZER_FILES:
    json_files.read_object(folder / name, default={})
  try:
    return cls.from_pretrained(os.fspath(folder), local_files_only=True, **kwargs)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # The Rust library raises Exception itself, and panics are no Exception.
    raise ValueError(f"{folder}: the tokenizer cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
  """The first line of what a tokenizer's library says, and what to do where it asks for code of the folder."""
  text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
  if "trust_remote_code" in str(error):
    return "its files ask for code of their own (auto_map), which is never run: save it as a tokenizer of transformers"
  return text


def chat_template(folder: Path, tokenizer: Any) -> str:
  """The chat template of a folder: that of the processor, else that of the tokenizer.

  Raises:
    ValueError: there is none, or it is no text.
  """
  template = json_files.read_object(folder / "chat_template.json", default={}).get("chat_template")
  template = template or json_files.read_object(folder / WHOLE_PROCESSOR, default={}).get("chat_template")
  template = template or tokenizer.chat_template
  if isinstance(template, dict):
    template = template.get("default")
  if not template:
    raise ValueError(f"{folder}: no chat template in chat_template.json, chat_template.jinja or the tokenizer's files")
  if not isinstance(template, str):
    raise ValueError(f"{folder}: the chat template is a {type(template).__name__}, expected a text")
  return template


def guidance_scale(folder: Path) -> float | None:
  """The scale of classifier-free guidance in `generation_config.json`; None if it has none.

  Raises:
    ValueError: it is no number from 1.
  """
  file = folder / GENERATION
  scale = json_files.read_object(file, default={}).get("guidance_scale")
  if scale is None:
    return None
  if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale < 1e6:
    raise ValueError(f"{file}: guidance_scale is {scale!r:.60}, expected a number from 1, which is no guidance")
  return float(scale)


def repetition_penalty(folder: Path, *, others: Collection[str] = ()) -> float:
  """The repetition penalty of `generation_config.json`, 1 if it has none; a warning names other settings of sampling.

  Args:
    folder: the folder of the file.
    others: names of settings that are not for captions, which the warning leaves out.

  Raises:
    ValueError: it is no positive number.
  """
  file = folder / GENERATION
  settings = json_files.read_object(file, default={})
  ignored = [
    name for name, neutral in OTHER_SAMPLING.items() if settings.get(name) not in neutral and name not in others
  ]
  if ignored:
    warnings.warn(f"{file}: not applied to captions: {', '.join(ignored)}", stacklevel=2)
  penalty = settings.get("repetition_penalty")
  if penalty is None:
    return 1.0
  if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < math.inf:
    raise ValueError(f"{file}: repetition_penalty is {penalty!r}, expected a positive number")
  return float(penalty)


def kept_tokens(folder: Path) -> dict[str, Any]:
  """The settings of `generation_config.json` that say which tokens may be sampled: `top_k`, `top_p` and `min_p`.

  As in transformers, 50 tokens are kept where the file has no `top_k`, and null disables each of the three.

  Raises:
    ValueError: one of them is out of range; the message names the file.
  """
  file = folder / GENERATION
  settings = {"top_k": TRANSFORMERS_TOP_K} | json_files.read_object(file, default={})
  given = {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name) is not None}
  try:
    checked = from_plain(TokenOptions, given)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  return {name: getattr(checked, name) for name in ("top_k", "top_p", "min_p")}


def end_ids(folder: Path) -> list[int]:
  """The ids of `generation_config.json` that end a caption.

  Raises:
    ValueError: an id is no integer.
  """
  file = folder / GENERATION
  ends = json_files.read_object(file, default={}).get("eos_token_id")
  ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
  if any(type(end) is not int or end < 0 for end in ends):
    raise ValueError(f"{file}: eos_token_id is {ends!r:.60}, expected ids")
  return ends
