"""Sizes of networks and workloads as plain numbers, readable by a process without JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
  """Sizes of the networks and of the workload.

  Attributes:
    name: value of `--size`.
    dtype: dtype of weights and activations; adapters are always float32.
    shares_weights: whether all backends read the same files; otherwise each draws its own random weights.
    prompts: images, or captions, per batch.
    rollouts: captions per image, or images per caption.
    caption_px: side of the captioner's input images, in pixels.
    question_tokens: tokens of the caption prompt without the image.
    caption_tokens: length of every caption; none ends early, so that all backends do the same work.
    image_px: side of generated images, in pixels.
    sampling_px: side of the images of the sampling suite, in pixels.
    context_tokens: context length of the sampling suite.
    sampling_batch: images per batch of the sampling suite.
    sampling_steps: sampler steps of the sampling suite.
    guidance: guidance scale of the sampling suite.
    reward_steps: sampler steps of a reconstruction in stage 2.
    sde_steps: sampler steps of stage 3.
    window: stochastic steps of stage 3.
    encoder_batch: images per batch of the embedders and vae suites.
    vae_px: image side of the vae suite, in pixels.
    update_chunks: chunks of a caption for which logits are computed one after the other in an update.
    decode_chunks: chunks of a batch in which reconstructions are generated and decoded.
    rank: LoRA rank of the adapters.
  """

  name: str
  dtype: str = "float32"
  shares_weights: bool = True
  prompts: int = 2
  rollouts: int = 8
  caption_px: int = 224
  question_tokens: int = 64
  caption_tokens: int = 64
  image_px: int = 128
  sampling_px: int = 256
  context_tokens: int = 128
  sampling_batch: int = 1
  sampling_steps: int = 8
  guidance: float = 5.0
  reward_steps: int = 4
  sde_steps: int = 6
  window: int = 2
  encoder_batch: int = 8
  vae_px: int = 128
  update_chunks: int = 1
  decode_chunks: int = 1
  rank: int = 32

  @property
  def alpha(self) -> float:
    return 2.0 * self.rank


SIZES = {
  # Takes seconds: checks the harness itself.
  "small": Size(
    "small",
    prompts=1,
    rollouts=4,
    caption_px=56,
    question_tokens=8,
    caption_tokens=8,
    image_px=32,
    sampling_px=64,
    context_tokens=8,
    sampling_steps=3,
    reward_steps=2,
    sde_steps=4,
    encoder_batch=2,
    vae_px=32,
    rank=4,
  ),
  # Networks of 20 to 90 million parameters: takes minutes on a few cores.
  "medium": Size("medium"),
  # Qwen2.5-VL-3B and SD3.5-large on one GPU with 140 GB.
  "h200": Size(
    "h200",
    dtype="bfloat16",
    shares_weights=False,
    prompts=4,
    caption_px=252,
    question_tokens=70,
    caption_tokens=512,
    image_px=512,
    sampling_px=1024,
    context_tokens=384,
    sampling_batch=2,
    sampling_steps=20,
    reward_steps=10,
    sde_steps=10,
    encoder_batch=64,
    vae_px=1024,
    update_chunks=8,
    decode_chunks=4,
  ),
}


def vocabulary(size: Size) -> int:
  """Vocabulary size: rows of the embedding table."""
  return {"small": 256, "medium": 16384, "h200": 151936}[size.name]


def image_token(size: Size) -> int:
  """Id of the image token; ids below it are words."""
  return {"small": 250, "medium": 16000, "h200": 151655}[size.name]


ROOF_ROWS = 16  # rows of the memory-bound products, which resemble a decoding step of 16 captions


def roof_widths(size: Size) -> tuple[int, int]:
  """Matrix sides in the roof suite: (compute-bound product, memory-bound product)."""
  return {"small": (512, 1024), "medium": (2048, 8192), "h200": (8192, 32768)}[size.name]
