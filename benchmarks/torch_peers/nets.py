"""The reference models, with the shared weights or, at full size, random weights."""

import functools
import importlib.util
import json
from pathlib import Path

from safetensors.torch import load_file
import torch
from transformers import (
  CLIPVisionConfig,
  CLIPVisionModelWithProjection,
  Dinov2Config,
  Dinov2Model,
  Qwen2_5_VLConfig,
  Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.sizes import Size
from benchmarks.torch_peers import autoencoder, lora, mmdit

LANGUAGE_TARGETS = r".*language_model.layers.\d+.(self_attn|mlp).(q|k|v|o|gate|up|down)_proj"


class Nets:
  """The models of a size, created on first access.

  Args:
    size: sizes of networks and workload.
    folder: output of `world.write`.
    is_compiled: use `torch.compile` wherever the peer supports it.

  Attributes:
    libraries: those of diffusers and PEFT that are installed; where one is absent, the modules beside this file do the
      same work. On accelerators they always do, so that results do not depend on what is installed.
  """

  def __init__(self, size: Size, folder: Path, *, is_compiled: bool):
    self.size, self.folder, self.is_compiled = size, folder, is_compiled
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.dtype = getattr(torch, size.dtype)
    self.libraries = () if size.is_accelerator else tuple(name for name in ("diffusers", "peft") if is_installed(name))
    # As JAX on a GPU: float32 products, of which there are only those of the adapters, in TF32.
    torch.set_float32_matmul_precision("high" if self.device.type == "cuda" else "highest")

  def wait(self) -> None:
    if self.device.type == "cuda":
      torch.cuda.synchronize()

  def tensor(self, array) -> torch.Tensor:
    return torch.from_numpy(array).to(self.device)

  def noise(self, array) -> torch.Tensor:
    """Converts latents [..., h, w, C] to [..., C, h, w]."""
    return self.tensor(array).movedim(-1, -3).contiguous()

  def compiled(self, function):
    """`torch.compile(function)` for fixed shapes, or the function itself."""
    return torch.compile(function, dynamic=False) if self.is_compiled else function

  def _build(self, make, name: str):
    """Builds a frozen model in evaluation mode, with weights of `folder / name` or random weights."""
    settings = json.loads((self.folder / name / "config.json").read_text())
    if self.size.shares_weights:
      model = make(settings).to(self.dtype)
    else:
      torch.set_default_dtype(self.dtype)
      with self.device:
        model = make(settings)
      torch.set_default_dtype(torch.float32)
      model = model.to(self.dtype)
    if self.size.shares_weights:
      tensors = {}
      for file in sorted((self.folder / name).glob("*.safetensors")):
        tensors |= load_file(file)
      self._fill(model, tensors)
    return model.to(self.device).eval().requires_grad_(False)

  @staticmethod
  def _fill(model, tensors: dict) -> None:
    """Loads weights strictly, except for a tied head and the connector that is stored with the language model."""
    tensors = {name: value for name, value in tensors.items() if not name.startswith("projector.")}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
      raise ValueError(f"{type(model).__name__}: missing {missing[:3]}, unexpected {unexpected[:3]}")

  @functools.cached_property
  def captioner(self) -> Qwen2_5_VLForConditionalGeneration:
    if self.size.shares_weights:
      # Maps the published names to those in memory.
      model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.folder / "llm_model", dtype=self.dtype)
      return model.to(self.device).eval().requires_grad_(False)
    return self._build(lambda settings: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)), "llm_model")

  @functools.cached_property
  def captioner_policy(self) -> torch.nn.Module:
    """The captioner with trainable adapters."""
    policy = self._adapted(self.captioner, "llm_lora", LANGUAGE_TARGETS)
    if self.size.recomputes:
      # Transformers recomputes only in training mode, which differs in nothing else: there is no dropout.
      self.captioner.gradient_checkpointing_enable({"use_reentrant": False})
    return policy

  @functools.cached_property
  def decoder(self) -> torch.nn.Module:
    if "diffusers" in self.libraries:
      from diffusers import SD3Transformer2DModel

      return self._build(SD3Transformer2DModel.from_config, "dit")
    return self._build(mmdit.SD3Transformer.from_config, "dit")

  @functools.cached_property
  def decoder_policy(self) -> torch.nn.Module:
    """The decoder with trainable adapters on every linear layer."""
    policy = self._adapted(self.decoder, "dit_lora", "all-linear")
    if self.size.recomputes:
      self.decoder.enable_gradient_checkpointing()
    return policy

  def _adapted(self, model, name: str, targets: str) -> torch.nn.Module:
    if not self.size.shares_weights:
      policy = lora.Policy(model, self.size.rank, self.size.alpha, targets)
    elif "peft" in self.libraries:
      from peft import PeftModel

      policy = PeftModel.from_pretrained(model, str(self.folder / name), is_trainable=True)
    else:
      policy = lora.Policy.from_pretrained(model, self.folder / name)
    return policy.to(self.device)

  @functools.cached_property
  def vae(self) -> torch.nn.Module:
    if "diffusers" in self.libraries:
      from diffusers import AutoencoderKL

      return self._build(AutoencoderKL.from_config, "SD3/vae")
    return self._build(autoencoder.Autoencoder.from_config, "SD3/vae")

  @functools.cached_property
  def connector(self) -> torch.nn.Module:
    settings = json.loads((self.folder / "connector" / "config.json").read_text())
    widths = settings["in_width"], settings["hidden_width"], settings["out_width"]
    module = torch.nn.Sequential(torch.nn.Linear(*widths[:2]), torch.nn.GELU(), torch.nn.Linear(*widths[1:]))
    if self.size.shares_weights:
      tensors = {}
      for file in (self.folder / "llm_model").glob("*.safetensors"):
        tensors |= load_file(file)
      names = (name for name in tensors if name.startswith("projector."))
      module.load_state_dict({name.removeprefix("projector."): tensors[name] for name in names})
    return module.to(self.device, self.dtype).requires_grad_(False)

  @functools.cached_property
  def clip(self) -> CLIPVisionModelWithProjection:
    return self._build(lambda settings: CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)), "clip")

  @functools.cached_property
  def dinov2(self) -> Dinov2Model:
    return self._build(lambda settings: Dinov2Model(Dinov2Config(**settings)), "dinov2")

  @functools.cached_property
  def pooled(self) -> torch.Tensor:
    """The pooled embedding of the empty prompt, [1, P]."""
    if self.size.shares_weights:
      return next(iter(load_file(next((self.folder / "SD3").glob("pooled*"))).values())).to(self.device)[None]
    return torch.zeros(1, self.decoder.config.pooled_projection_dim, dtype=self.dtype, device=self.device)


def is_installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False
