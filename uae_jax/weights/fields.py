"""What is known of the fields in configs of others: which are read, which may have one value, which change no result.

A field that changes the result and is not supported is a problem, named with its file. A field that nobody here knows
is named in a warning: the library that the file is for ignores it too.
"""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any

# No model has a larger width, vocabulary or depth; larger numbers would only be expanded in vain.
MAX_SIZE = 2**22
MAX_LIST = 1000
# Fields of any transformers config that change no result here.
TRANSFORMERS = frozenset(
  "_name_or_path _attn_implementation architectures auto_map torch_dtype dtype transformers_version model_type "
  "return_dict output_hidden_states output_attentions use_cache bos_token_id eos_token_id pad_token_id sep_token_id "
  "decoder_start_token_id initializer_range initializer_factor attention_dropout hidden_dropout_prob dropout "
  "attention_probs_dropout_prob drop_path_rate id2label label2id tokenizer_class prefix problem_type is_decoder "
  "is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads "
  "chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss finetuning_task task_specific_params "
  "gradient_checkpointing vision_start_token_id vision_end_token_id vision_token_id video_token_id "
  "repetition_penalty temperature do_sample".split()
)
DIFFUSERS = frozenset(("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "force_upcast"))


@dataclasses.dataclass(frozen=True)
class Findings:
  """What is not understood of a config.

  Attributes:
    problems: one text per field that changes the result and is not supported.
    unknown: names of fields that have a value and are not known.
  """

  problems: list[str]
  unknown: list[str]


@dataclasses.dataclass(frozen=True)
class Fields:
  """The fields of one kind of config.

  Attributes:
    fixed: name -> supported values; an absent field has the first one.
    sizes: names of positive integers.
    numbers: names of finite numbers.
    positive: names of finite numbers above 0.
    counts: names of integers from 0.
    flags: names of booleans.
    lists: names of lists of positive integers.
    read: names of further fields that are read.
    ignored: names of fields that change no result here.
  """

  fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  sizes: tuple[str, ...] = ()
  numbers: tuple[str, ...] = ()
  positive: tuple[str, ...] = ()
  counts: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  lists: tuple[str, ...] = ()
  read: tuple[str, ...] = ()
  ignored: frozenset[str] = frozenset()

  def check(self, settings: Mapping[str, Any]) -> "Findings":
    """What is not supported in a config, and what is not known."""
    return Findings(self._problems(settings), self._unknown(settings))

  def _problems(self, settings: Mapping[str, Any]) -> list[str]:
    found = [
      f"{name} is {settings[name]!r:.100}, only {' or '.join(map(repr, values))} is supported"
      for name, values in self.fixed.items()
      if name in settings and not any(settings[name] == v and type(settings[name]) is type(v) for v in values)
    ]
    for names, lowest in ((self.sizes, 1), (self.counts, 0)):
      for name in names:
        value = settings.get(name)
        if value is not None and (type(value) is not int or not lowest <= value <= MAX_SIZE):
          found.append(f"{name} is {value!r:.100}, expected an integer from {lowest} to {MAX_SIZE}")
    for name in (*self.numbers, *self.positive):
      value = settings.get(name)
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      if value is not None and not (is_number and abs(value) < 1e9 and (value > 0 or name in self.numbers)):
        found.append(f"{name} is {value!r:.100}, expected a {'' if name in self.numbers else 'positive '}number")
    for name in self.flags:
      if not isinstance(value := settings.get(name), bool | None):
        found.append(f"{name} is {value!r:.100}, expected true or false")
    for name in self.lists:
      value = settings.get(name, [1])
      is_list = isinstance(value, list) and 0 < len(value) <= MAX_LIST
      if not is_list or not all(type(item) is int and 0 < item <= MAX_SIZE for item in value):
        found.append(f"{name} is {value!r:.100}, expected a list of positive integers")
    return found

  def _unknown(self, settings: Mapping[str, Any]) -> list[str]:
    known = {
      *self.fixed,
      *self.sizes,
      *self.numbers,
      *self.positive,
      *self.counts,
      *self.flags,
      *self.lists,
      *self.read,
      *self.ignored,
    }
    return sorted(name for name, value in settings.items() if name not in known and value not in (None, False, [], {}))


NOT_QUANTIZED = {"quantization_config": (None,)}

QWEN_TEXT = Fields(
  fixed={
    **NOT_QUANTIZED,
    "model_type": ("qwen2_5_vl", "qwen2_5_vl_text"),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "tie_word_embeddings": (False, True, None),
    "partial_rotary_factor": (1.0, 1, None),
  },
  sizes=(
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "image_token_id",
  ),
  positive=("rms_norm_eps", "rope_theta"),
  read=("rope_scaling", "rope_parameters", "layer_types", "vision_config", "text_config"),
  ignored=TRANSFORMERS | {"sliding_window", "max_window_layers", "max_position_embeddings", "attention_bias"},
)
QWEN_VISION = Fields(
  fixed={
    **NOT_QUANTIZED,
    "model_type": ("qwen2_5_vl", "qwen2_5_vl_vision"),
    "hidden_act": ("silu",),
  },
  sizes=(
    "depth",
    "hidden_size",
    "num_heads",
    "intermediate_size",
    "out_hidden_size",
    "patch_size",
    "spatial_merge_size",
    "window_size",
    "temporal_patch_size",
    "in_channels",
    "in_chans",
  ),
  read=("fullatt_block_indexes", "rope_parameters"),
  ignored=TRANSFORMERS | {"tokens_per_second", "spatial_patch_size"},
)
MMDIT = Fields(
  fixed={**NOT_QUANTIZED, "_class_name": ("SD3Transformer2DModel",), "qk_norm": (None, "rms_norm")},
  sizes=(
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "caption_projection_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
    "sample_size",
  ),
  read=("dual_attention_layers",),
  ignored=DIFFUSERS,
)
VAE = Fields(
  fixed={
    **NOT_QUANTIZED,
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True, False),
  },
  sizes=("layers_per_block", "norm_num_groups", "latent_channels", "in_channels", "out_channels"),
  numbers=("shift_factor",),
  positive=("scaling_factor",),
  read=("block_out_channels", "down_block_types", "up_block_types", "use_quant_conv", "use_post_quant_conv"),
  ignored=DIFFUSERS | {"sample_size"},
)
SCHEDULER = Fields(
  fixed={
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    "num_train_timesteps": (1000,),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "stochastic_sampling": (False,),
  },
  positive=("shift",),
  # These belong to dynamic shifting.
  ignored=DIFFUSERS | {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"},
)
# Towers of images and texts: every kind of embedder.
TOWER = Fields(
  fixed={
    **NOT_QUANTIZED,
    "num_channels": (3,),
  },
  sizes=(
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "projection_dim",
    "projection_size",
    "vocab_size",
    "max_position_embeddings",
  ),
  numbers=("layerscale_value",),
  positive=("layer_norm_eps", "mlp_ratio", "rope_theta"),
  counts=("num_register_tokens",),
  flags=(
    *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "qkv_bias"),
    *("use_gated_mlp", "use_swiglu_ffn", "vision_use_head"),
  ),
)


JANUS = Fields(
  fixed={**NOT_QUANTIZED, "model_type": ("janus", "multi_modality"), "tie_word_embeddings": (False, True, None)},
  sizes=("image_token_id",),
  read=("text_config", "vision_config", "vq_config", "language_config")
  + ("aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config"),
  ignored=TRANSFORMERS,
)
LLAMA = Fields(
  fixed={
    **NOT_QUANTIZED,
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, True, None),
    "pretraining_tp": (1, None),
  },
  sizes=(
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
  ),
  positive=("rms_norm_eps", "rope_theta"),
  read=("rope_scaling", "rope_parameters"),
  ignored=TRANSFORMERS | {"max_position_embeddings"},
)
JANUS_VISION = Fields(
  fixed={**NOT_QUANTIZED, "hidden_act": ("gelu",), "num_channels": (3,)},
  sizes=(
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "projection_dim",
    "depth",
    "num_image_tokens",
  ),
  positive=("mlp_ratio", "layer_norm_eps"),
  flags=("attention_bias", "use_qk_norm"),
  ignored=TRANSFORMERS | {"projection_dropout"},
)
JANUS_VQ = Fields(
  fixed={
    **NOT_QUANTIZED,
    "double_latent": (False,),
    "in_channels": (3,),
    "out_channels": (3,),
    "hidden_act": ("gelu",),
  },
  sizes=(
    "embed_dim",
    "num_embeddings",
    "latent_channels",
    "base_channels",
    "num_res_blocks",
    "num_patches",
    "projection_dim",
    "num_hidden_layers",
    "image_token_embed_dim",
  ),
  lists=("channel_multiplier",),
  ignored=TRANSFORMERS,
)


def _deepseek_part(cls: str) -> Fields:
  """A section of DeepSeek's config: the class of a part, whose arguments are `params`."""
  return Fields(fixed={"cls": (cls,), **NOT_QUANTIZED}, read=("params",), ignored=TRANSFORMERS)


# Section of DeepSeek's config -> its own fields, and those of its `params`.
# Source: deepseek-ai/Janus, janus/models: modeling_vlm.py, clip_encoder.py and projector.py.
_ALIGNER = Fields(fixed={"projector_type": ("mlp_gelu",)}, sizes=("depth", "input_dim", "n_embed"))
DEEPSEEK = {
  "vision_config": (
    _deepseek_part("CLIPVisionTower"),
    Fields(
      fixed={
        "model_name": ("siglip_large_patch16_384",),
        "select_layer": (-1,),
        "pixel_mean": (None,),
        "pixel_std": (None,),
      },
      sizes=("image_size",),
      # What is selected of a SigLIP is always all; a path of the authors' machine.
      ignored=frozenset(("select_feature", "select_layers", "ckpt_path")),
    ),
  ),
  "aligner_config": (_deepseek_part("MlpProjector"), _ALIGNER),
  "gen_vision_config": (_deepseek_part("VQ-16"), Fields(sizes=("image_token_size", "n_embed"))),
  "gen_aligner_config": (_deepseek_part("MlpProjector"), _ALIGNER),
  "gen_head_config": (
    _deepseek_part("vision_head"),
    Fields(sizes=("image_token_embed", "image_token_size", "n_embed")),
  ),
}


def check_janus(settings: Mapping[str, Any]) -> Findings:
  """Checks a `config.json` of Janus, transformers' or DeepSeek's."""
  is_deepseek = settings.get("model_type") == "multi_modality"
  sections = {"text_config": LLAMA, "vision_config": JANUS_VISION, "vq_config": JANUS_VQ}
  if is_deepseek:
    sections = {"language_config": LLAMA} | {name: own for name, (own, _) in DEEPSEEK.items()}
  if wrong := [name for name in sections if not isinstance(settings.get(name), dict | types.NoneType)]:
    return Findings([f"{wrong[0]} is no object: this is not the config of a Janus"], [])
  parts = {"": JANUS.check(settings)} | {f"{n}.": f.check(settings.get(n) or {}) for n, f in sections.items()}
  if is_deepseek:
    for name, (_, arguments) in DEEPSEEK.items():
      given = (settings.get(name) or {}).get("params") or {}
      if not isinstance(given, dict):
        return Findings([f"{name}.params is no object: this is not the config of a Janus"], [])
      parts[f"{name}.params."] = arguments.check(given)
  return _joined(parts)


def check_qwen(settings: Mapping[str, Any]) -> Findings:
  """Checks a `config.json` of Qwen2.5-VL, flat as in transformers 4.50 or nested as in 5."""
  text, vision = settings.get("text_config"), settings.get("vision_config")
  if not isinstance(vision, dict) or not isinstance(text, dict | types.NoneType):
    return Findings(["vision_config or text_config is no object: this is not the config of a Qwen2.5-VL"], [])
  parts = {"": QWEN_TEXT.check(settings), "vision_config.": QWEN_VISION.check(vision)}
  if text:
    parts["text_config."] = QWEN_TEXT.check(text)
  return _joined(parts)


def _joined(parts: Mapping[str, Findings]) -> Findings:
  """What is not understood of all sections: prefix of a section -> its findings."""
  return Findings(
    [prefix + problem for prefix, found in parts.items() for problem in found.problems],
    [prefix + name for prefix, found in parts.items() for name in found.unknown],
  )
