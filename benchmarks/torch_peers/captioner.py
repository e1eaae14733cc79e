"""Captions with transformers: groups from `generate`, log-probabilities, and the decoder's context."""

import torch
from transformers import CompileConfig

from benchmarks import inputs
from benchmarks.sizes import image_token
from benchmarks.torch_peers.nets import Nets

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FRAMES = 2


def patches(nets: Nets, images) -> tuple[torch.Tensor, torch.Tensor]:
  """(pixel_values, image_grid_thw) of images uint8[B, H, W, 3], as the image processor makes them."""
  pixels = nets.tensor(images).float() / 255
  pixels = (pixels - torch.tensor(MEAN, device=nets.device)) / torch.tensor(STD, device=nets.device)
  batch, height, width, channels = pixels.shape
  px, merge = inputs.PATCH_PX, inputs.MERGE
  rows, columns = height // px, width // px
  cut = pixels.reshape(batch, rows // merge, merge, px, columns // merge, merge, px, channels)
  cut = cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch * rows * columns, channels, 1, px * px)
  values = cut.expand(-1, -1, FRAMES, -1).reshape(batch * rows * columns, -1).to(nets.dtype)
  return values, torch.tensor([[1, rows, columns]] * batch, device=nets.device)


def prompt(nets: Nets, images) -> dict[str, torch.Tensor]:
  """Keyword arguments of the model for one prompt per image."""
  ids = nets.tensor(inputs.caption_prompt(nets.size)).long()[None].expand(len(images), -1)
  values, grid = patches(nets, images)
  return {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "mm_token_type_ids": (ids == image_token(nets.size)).int(),
    "pixel_values": values,
    "image_grid_thw": grid,
  }


@torch.no_grad()
def generate(nets: Nets, model, images, rollouts: int, length: int, *, temperature: float = 1.0) -> torch.Tensor:
  """Samples tokens int64[B * rollouts, length]; temperature 0 is greedy, with one caption per image."""
  greedy, image = temperature == 0, image_token(nets.size)
  # Compilation needs the static cache, which is slower without it (measured on CPU). Its default mode captures CUDA
  # graphs, which a CPU does not have.
  is_cpu = nets.device.type == "cpu"
  compile_config = None
  if nets.is_compiled:
    compile_config = CompileConfig(fullgraph=False, dynamic=False, mode="default") if is_cpu else CompileConfig()
    compile_config._compile_all_devices = is_cpu
  tokens = model.generate(
    **prompt(nets, images),
    do_sample=not greedy,
    num_return_sequences=1 if greedy else rollouts,
    max_new_tokens=length,
    eos_token_id=None,
    pad_token_id=0,
    # A sampled image token would require an image when the caption is re-encoded.
    **({} if greedy else {"temperature": temperature, "top_k": 0, "top_p": 1.0, "suppress_tokens": [image]}),
    **({"cache_implementation": "static", "compile_config": compile_config} if nets.is_compiled else {}),
  )
  return tokens[:, -length:]


def log_probs(nets: Nets, model, images, tokens: torch.Tensor) -> torch.Tensor:
  """Log-probabilities float32[B * R, L] of captions int64[B, R, L]; repeats the prompt per caption, as TRL does."""
  batch, rollouts, length = tokens.shape
  one = prompt(nets, images)
  repeated = {name: one[name].repeat_interleave(rollouts, dim=0) for name in ("input_ids", "image_grid_thw")}
  values = one["pixel_values"].reshape(batch, -1, one["pixel_values"].shape[-1]).repeat_interleave(rollouts, dim=0)
  ids = torch.cat([repeated["input_ids"], tokens.reshape(-1, length)], dim=1)
  logits = model(
    input_ids=ids,
    attention_mask=torch.ones_like(ids),
    mm_token_type_ids=(ids == image_token(nets.size)).int(),
    pixel_values=values.reshape(-1, values.shape[-1]),
    image_grid_thw=repeated["image_grid_thw"],
    use_cache=False,
    logits_to_keep=length + 1,
  ).logits[:, :-1]
  flat = tokens.reshape(-1, length)
  return torch.log_softmax(logits.float(), dim=-1).gather(-1, flat[..., None])[..., 0]


def encode_captions(nets: Nets, tokens: torch.Tensor) -> torch.Tensor:
  """Re-encodes captions int64[B, L] as generation prompts with the adapters off; returns float[B, T, C]."""
  before, after, _ = (
    nets.tensor(part).long().expand(len(tokens), -1) for part in inputs.generation_template(nets.size)
  )
  rows = torch.cat([before, tokens, after], dim=1)
  positions = torch.arange(rows.shape[1], device=nets.device).expand(3, len(rows), -1)
  with torch.no_grad(), nets.captioner_policy.disable_adapter():
    language = nets.captioner.model.language_model
    hidden = language(input_ids=rows, position_ids=positions, use_cache=False).last_hidden_state
    return nets.connector(hidden)


def token_loss(policy_log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
  """DAPO's token mean of the clipped surrogate, on policy; advantages float[B, R]."""
  ratio = torch.exp(policy_log_probs - policy_log_probs.detach())
  values = advantages.reshape(-1, 1)
  return -torch.minimum(ratio * values, ratio.clamp(0.8, 1.2) * values).mean()
