"""Sizes of networks and workloads as plain numbers, readable by a process without JAX."""

import dataclasses

# Ending of the backends whose MKL uses its best kernels on processors of other makers than Intel.
MKL_NATIVE = "_mkl_native"


@dataclasses.dataclass(frozen=True)
class Size:
  """Sizes of the networks and of the workload.

  Attributes:
    name: value of `--size`.
    networks: "small", "medium", or "full" for Qwen2.5-VL-3B, Stable Diffusion 3.5, CLIP-L and DINOv2-L.
    decoder: "sd35_medium" or "sd35_large", at full size; names the decoder in results if it is not the usual one.
    label: prefix of the names of cases, for a size that shares results with another.
    is_dual: whether the first blocks of a small decoder have a second attention, as those of SD3.5-medium.
    dtype: dtype of weights and activations; adapters are always float32.
    shares_weights: whether all backends read the same files; otherwise each draws its own random weights.
    is_accelerator: backends run one after the other, each with the whole device, and one process at a time computes.
    recomputes: whether an update recomputes the activations of each block, in all backends.
    prompts: images, or captions, per batch.
    rollouts: captions per image, or images per caption.
    caption_px: side of the captioner's input images, in pixels.
    question_tokens: tokens of the caption prompt without the image.
    caption_tokens: length of every caption; none ends early, so that all backends do the same work.
    image_px: side of generated images, in pixels.
    sampling_px: sides of the images of the sampling suite, in pixels, ascending.
    context_tokens: context length of the sampling suite.
    sampling_batch: images per batch of the sampling suite.
    sampling_steps: sampler steps of the sampling suite.
    guidance: guidance scale of the sampling suite.
    reward_steps: sampler steps of a reconstruction in stage 2.
    sde_steps: sampler steps of stage 3.
    window: stochastic steps of stage 3.
    encoder_batch: images per batch of the embedders and input suites.
    vae_batch: images per batch of the vae suite.
    vae_px: image sides of the vae suite, in pixels, ascending.
    update_chunks: chunks of a caption for which logits are computed one after the other in an update.
    decode_chunks: chunks of a batch in which reconstructions are generated and decoded.
    rank: LoRA rank of the adapters.
  """

  name: str
  networks: str = "medium"
  decoder: str = "sd35_medium"
  label: str = ""
  is_dual: bool = False
  dtype: str = "float32"
  shares_weights: bool = True
  is_accelerator: bool = False
  recomputes: bool = False
  prompts: int = 2
  rollouts: int = 8
  caption_px: int = 224
  question_tokens: int = 64
  caption_tokens: int = 64
  image_px: int = 128
  sampling_px: tuple[int, ...] = (256,)
  context_tokens: int = 128
  sampling_batch: int = 1
  sampling_steps: int = 8
  guidance: float = 5.0
  reward_steps: int = 4
  sde_steps: int = 6
  window: int = 2
  encoder_batch: int = 8
  vae_batch: int = 1
  vae_px: tuple[int, ...] = (128,)
  update_chunks: int = 1
  decode_chunks: int = 1
  rank: int = 32

  @property
  def alpha(self) -> float:
    return 2.0 * self.rank


# Takes seconds: checks the harness itself.
SMALL = Size(
  "small",
  networks="small",
  prompts=1,
  rollouts=4,
  caption_px=56,
  question_tokens=8,
  caption_tokens=8,
  image_px=32,
  sampling_px=(64,),
  context_tokens=8,
  sampling_steps=3,
  reward_steps=2,
  sde_steps=4,
  encoder_batch=2,
  vae_px=(32,),
  rank=4,
)
# Qwen2.5-VL-3B and SD3.5-medium in bfloat16, within 80 GB: 14 GB of weights, and activations of 16 rows.
GPU = Size(
  "gpu",
  networks="full",
  dtype="bfloat16",
  shares_weights=False,
  is_accelerator=True,
  recomputes=True,
  caption_px=252,
  question_tokens=70,
  caption_tokens=256,
  image_px=512,
  sampling_px=(512, 1024),
  context_tokens=384,
  sampling_batch=2,
  sampling_steps=10,
  reward_steps=10,
  sde_steps=10,
  encoder_batch=64,
  vae_batch=4,
  vae_px=(512, 1024),
  update_chunks=4,
  decode_chunks=4,
)
# The same on one TPU chip with 32 GB.
TPU = dataclasses.replace(
  GPU, name="tpu", caption_tokens=128, sampling_batch=1, encoder_batch=32, vae_batch=1, decode_chunks=8
)
# The shapes that replace those of a preset under `--shapes small`; the decoder of SD3.5-medium has dual layers.
SMALL_DUAL = dataclasses.replace(SMALL, name="small_dual", is_dual=True, is_accelerator=True, recomputes=True)
SMALL_LARGE = dataclasses.replace(SMALL, name="small_large", label="SD3.5-large, ", is_accelerator=True)

SIZES = {
  size.name: size
  for size in (
    SMALL,
    # Networks of 20 to 90 million parameters: takes minutes on a few cores.
    Size("medium"),
    GPU,
    dataclasses.replace(GPU, name="gpu_large", decoder="sd35_large", label="SD3.5-large, ", sampling_batch=1),
    TPU,
    dataclasses.replace(TPU, name="tpu_large", decoder="sd35_large", label="SD3.5-large, "),
    SMALL_DUAL,
    SMALL_LARGE,
  )
}


def vocabulary(size: Size) -> int:
  """Vocabulary size: rows of the embedding table."""
  return {"small": 256, "medium": 16384, "full": 151936}[size.networks]


def image_token(size: Size) -> int:
  """Id of the image token; ids below it are words."""
  return {"small": 250, "medium": 16000, "full": 151655}[size.networks]


def case_name(size: Size, side: int) -> str:
  """Name of the sampling suite's case with images of `side` pixels."""
  batch = f"{size.sampling_batch} x " if size.sampling_batch > 1 else ""
  return f"{size.label}{batch}{side} px, {size.sampling_steps} steps, guidance"


ROOF_ROWS = 16  # rows of the memory-bound products, which resemble a decoding step of 16 captions


def roof_widths(size: Size) -> tuple[int, int]:
  """Matrix sides in the roof suite: (compute-bound product, memory-bound product)."""
  return {"small": (512, 1024), "medium": (2048, 8192), "full": (8192, 32768)}[size.networks]


def roof_attention(size: Size) -> tuple[int, int, int, int]:
  """Shape [batch, tokens, heads, head width] of the attention in the roof suite."""
  return {"small": (1, 64, 2, 64), "medium": (1, 512, 8, 64), "full": (4, 4096, 24, 64)}[size.networks]
