"""Adapters in the files of PEFT, diffusers and kohya: their names, their scale, and what of them is supported.

Source: PEFT 0.21 `LoraConfig` and `check_target_module_exists`; diffusers 0.42 `lora_conversion_utils.py` and
`scripts/convert_sd3_to_diffusers.py` for the names of SD3; kohya-ss sd-scripts `networks/lora_sd3.py`.
"""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import math
import re
from typing import Any

import numpy as np

from uae_jax.weights.tensor_files import Renamed, spec_of

PREFIX = "base_model.model."
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8
# Initializations that leave the base weights as they are. All others subtract something from them, which is missing in
# the stored base.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
# Options that change no result of trained weights.
IGNORED = frozenset(
  "auto_mapping base_model_name_or_path revision inference_mode task_type peft_version lora_dropout fan_in_fan_out "
  "megatron_config megatron_core eva_config qalora_group_size runtime_config exclude_modules loftq_config corda_config "
  "lora_ga_config velora_config layers_pattern ensure_weight_tying".split()
)
READ = frozenset(("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "bias"))


@dataclasses.dataclass
class Adapters:
  """The scale of the adapters in a file.

  Attributes:
    rank: r.
    alpha: the output is scaled by alpha / r.
    problems: what is not supported, or contradicts the tensors.
  """

  rank: int
  alpha: float
  problems: list[str]


def read_config(settings: Mapping[str, Any], names: Collection[str]) -> Adapters:
  """Reads the content of an `adapter_config.json`.

  Args:
    settings: the content.
    names: tensors of the adapter file, with any prefix.
  """
  problems = []
  if (kind := settings.get("peft_type", "LORA")) != "LORA":
    problems.append(f"peft_type is {kind!r:.60}, only 'LORA' is supported")
  initial = settings.get("init_lora_weights", True)
  if not any(initial is value or (isinstance(value, str) and initial == value) for value in KEEPS_BASE):
    problems.append(
      f"init_lora_weights is {initial!r:.60}, which changed the weights of the base, and the changed base is not "
      "stored: save the adapters with path_initial_model_for_weight_conversion, as PEFT describes"
    )
  if (bias := settings.get("bias", "none")) not in ("none", None):
    problems.append(f"bias is {bias!r:.60}, only 'none' is supported")
  for name, value in settings.items():
    if name not in READ | IGNORED and value not in (None, False, {}, []):
      problems.append(f"{name} is {value!r:.100}, which is not supported")
  rank, alpha = (settings.get(name, value) for name, value in (("r", DEFAULT_RANK), ("lora_alpha", DEFAULT_ALPHA)))
  if type(rank) is not int or rank < 1:
    problems.append(f"r is {rank!r:.60}, expected a positive integer")
    rank = DEFAULT_RANK
  if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
    problems.append(f"lora_alpha is {alpha!r:.60}, expected a positive number")
    alpha = DEFAULT_ALPHA
  targets = settings.get("target_modules")
  strangers = sorted({module for module in map(adapted_module, names) if module and not is_target(module, targets)})
  if strangers:
    problems.append(
      f"target_modules does not name {strangers[0]} and {len(strangers) - 1} others with adapters, so PEFT ignores them"
    )
  # Rank-stabilized adapters are scaled by alpha / sqrt(r).
  return Adapters(rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha), problems)


def adapted_module(name: str) -> str | None:
  """The module of an adapter's tensor, with PEFT's own prefix removed; None for other tensors."""
  found = re.fullmatch(r"(.+?)\.lora_[AB](\.[^.]+)?\.weight", name)
  return found[1].removeprefix("model.base_model.model.").removeprefix(PREFIX) if found else None


def is_target(module: str, targets: Any) -> bool:
  """Whether `target_modules` names a module, by PEFT's rules; a regular expression is not run, and names all."""
  if not isinstance(targets, list):
    return True
  return any(isinstance(target, str) and f".{module}".endswith(f".{target}") for target in targets)


# --- Names of the decoder's adapters ---------------------------------------------------------------------------------

# Prefixes of files written by PEFT, diffusers, ComfyUI and kohya.
PREFIXES = (PREFIX, "transformer.", "diffusion_model.", "model.diffusion_model.", "unet.")
KOHYA_PREFIXES = ("lora_transformer_", "lora_unet_", "lora_diffusion_model_")
ROLES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_down": "lora_A", "lora_up": "lora_B"}
ROLES |= {"lora.down": "lora_A", "lora.up": "lora_B"}
TENSOR = re.compile(rf"(?P<module>.+?)\.(?P<role>{'|'.join(map(re.escape, ROLES))})(\.(?P<set>[^.]+))?\.weight")
# Modules in a block of SD3's original code -> those of diffusers, with several names where one matrix fuses them.
BLOCK_NAMES = {
  "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
  "x_block.attn.proj": ("attn.to_out.0",),
  "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
  "x_block.attn2.proj": ("attn2.to_out.0",),
  "x_block.mlp.fc1": ("ff.net.0.proj",),
  "x_block.mlp.fc2": ("ff.net.2",),
  "x_block.adaLN_modulation.1": ("norm1.linear",),
  "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
  "context_block.attn.proj": ("attn.to_add_out",),
  "context_block.mlp.fc1": ("ff_context.net.0.proj",),
  "context_block.mlp.fc2": ("ff_context.net.2",),
  "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


def original_modules(depth: int) -> dict[str, tuple[str, ...]]:
  """Module of SD3's original code -> modules of diffusers, for the adapters that convert exactly."""
  found = {
    f"joint_blocks.{i}.{theirs}": tuple(f"transformer_blocks.{i}.{name}" for name in names)
    for i in range(depth)
    for theirs, names in BLOCK_NAMES.items()
  }
  # The last context block has the scale before the shift in diffusers, and the other way around here.
  found.pop(f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1")
  return found


def decoder_tensors(
  tensors: Mapping[str, np.ndarray], modules: Iterable[str], depth: int
) -> tuple[Renamed, dict[str, float]]:
  """The adapters of a file under PEFT's names.

  Args:
    tensors: the tensors of the file.
    modules: modules of the decoder, in diffusers' names.
    depth: number of blocks.

  Returns:
    (tensors in PEFT's names, module -> alpha where the file stores one). Tensors of other modules keep their names, so
    that they are reported as unexpected.

  Raises:
    ValueError: the file holds several sets of adapters.
  """
  known = {name: (name,) for name in modules} | original_modules(depth)
  known |= {name.replace(".", "_"): targets for name, targets in known.items()}
  sets = {found["set"] for name in tensors if (found := TENSOR.fullmatch(name))}
  if len(sets) > 1:
    raise ValueError(f"several sets of adapters in one file: {', '.join(sorted(map(str, sets)))}")
  adapters, alphas = Renamed(), dict[str, float]()
  for name in tensors:
    found = TENSOR.fullmatch(name)
    targets = known.get(_plain(found["module"] if found else name.removesuffix(".alpha")), ())
    if not targets:
      adapters.put(name, tensors, name)
    elif found:
      # A fused matrix has one A, and one part of B per module.
      role = ROLES[found["role"]]
      is_split = role == "lora_B" and len(targets) > 1
      parts = np.array_split(np.asarray(tensors[name]), len(targets)) if is_split else []
      for i, target in enumerate(targets):
        new = f"{PREFIX}{target}.{role}.weight"
        adapters.put(new, *(({name: parts[i]}, name) if is_split else (tensors, name)))
    elif name.endswith(".alpha") and math.prod(spec_of(tensors, name).shape) == 1:
      alphas |= dict.fromkeys(targets, float(np.asarray(tensors[name], np.float32).reshape(())))
    else:
      adapters.put(name, tensors, name)
  return adapters, alphas


def _plain(module: str) -> str:
  """A module's name without the prefixes of its writer."""
  for prefix in (*PREFIXES, *PREFIXES, *KOHYA_PREFIXES):
    module = module.removeprefix(prefix)
  return module


def common_alpha(alphas: Mapping[str, float], modules: Collection[str]) -> float | None:
  """The alpha that a file stores for all its modules; None if it stores none.

  Raises:
    ValueError: modules have different ones.
  """
  if not alphas:
    return None
  if len(set(alphas.values())) > 1 or set(alphas) != set(modules):
    raise ValueError("modules with different alpha are not supported: write them with one lora_alpha")
  return next(iter(alphas.values()))
