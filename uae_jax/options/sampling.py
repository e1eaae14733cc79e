"""Options that every use of the auto-encoder shares: sampling a caption, and generating an image from it."""

from collections.abc import Sequence
import dataclasses
import math

from uae_jax.options.base import Options, option
from uae_jax.options.rewards import embedder_of, image_text_kind

EVERYWHERE = (0.0, 1.0)  # the guidance interval of all noise levels
CONDITIONINGS = ("text", "answer")
TEXT_TOWERS = ("reference", "policy")
DATASET, SAMPLED = "dataset", "sampled"
# Shift by size of the image, in tokens of 2 x 2 latent pixels. Source: diffusers 0.42 calculate_shift (SD3 and Flux).
BASE_TOKENS, MAX_TOKENS, BASE_SHIFT, MAX_SHIFT = 256, 4096, 0.5, 1.15
LARGEST_SEED = 2**32 - 1  # JAX uses the lowest 32 bits of a seed
# Of a prompt, question or answer: about the contexts the models were trained on. Captions of data are cut instead.
MAX_TEXT_CHARACTERS = 32_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenOptions(Options):
  """The distribution that a caption's tokens are drawn from, see `rollouts.token_distribution`.

  Log-probabilities, KL and entropy are those of this distribution, in rollout and replay.

  Attributes:
    temperature: divides the logits; 0 is greedy.
    top_k: sample among the k most likely tokens; 0 disables it.
    top_p: sample among the most likely tokens whose probabilities sum to p; 1 disables it.
    min_p: sample among tokens with at least min_p times the probability of the most likely one; 0 disables it.
  """

  temperature: float = option(1.0, at_least=0)
  top_k: int = option(0, at_least=0)
  top_p: float = option(1.0, more_than=0, at_most=1)
  min_p: float = option(0.0, at_least=0, at_most=1)

  @property
  def token_sampling(self) -> dict:
    """The keyword arguments of `rollouts.captions.sample_captions`."""
    return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

  def check(self) -> None:
    if not self.temperature:
      self.refuse_inert(("top_k", "top_p", "min_p"), "temperature = 0, which takes the most likely token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionOptions(TokenOptions):
  """How the captioner samples.

  Attributes:
    max_new_tokens: caption budget in tokens, including the closing token.
  """

  max_new_tokens: int = option(512, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftOptions(Options):
  """How far noise levels are shifted towards noise.

  Attributes:
    shift: timestep shift of the noise levels; SD3.5 uses 3.
    is_shift_by_size: take the shift from the size of the image instead, more for a larger one, as `calculate_shift` of
      diffusers: exp(0.5) at 256 tokens (256 x 256 pixels with SD3.5), exp(1.15) at 4096. It is used like
      a fixed shift of that value.
  """

  shift: float = option(3.0, more_than=0)
  is_shift_by_size: bool = False

  def shift_at(self, latents_shape: Sequence[int]) -> float:
    """The shift for latents [..., h, w, channels]."""
    if not self.is_shift_by_size:
      return self.shift
    tokens = latents_shape[-3] * latents_shape[-2] / 4
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return math.exp(BASE_SHIFT + slope * (tokens - BASE_TOKENS))

  def check(self) -> None:
    if self.is_shift_by_size:
      self.refuse_inert(("shift",), "is_shift_by_size = True")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(ShiftOptions):
  """How the decoder is conditioned on a caption, and how its sampler runs.

  Attributes:
    conditioning: "text" encodes the caption again as a generation prompt, so the latent really is text; "answer" uses
      the language model's states at the caption's own positions after the image (the official cold start).
    text_tower: language model that encodes captions and the negative prompt for the decoder: "reference" has its
      adapters off, "policy" on. A text tower that moves during training breaks a frozen decoder.
    sampler_steps: number of sampler steps N.
    guidance: classifier-free guidance scale; 1 runs the conditional branch only.
    guidance_interval: noise levels (low, high] with guidance; at all others the conditional branch runs alone, which is
      half the work (arXiv 2404.07724).
  """

  conditioning: str = option("text", choices=CONDITIONINGS)
  text_tower: str = option("reference", choices=TEXT_TOWERS)
  sampler_steps: int = option(10, at_least=1)
  guidance: float = option(1.0, more_than=0)
  guidance_interval: tuple[float, float] = EVERYWHERE

  def check(self) -> None:
    ShiftOptions.check(self)
    low, high = self.guidance_interval
    if not 0 <= low < high <= 1:
      raise ValueError(f"guidance_interval = {self.guidance_interval}: expected 0 <= first < last <= 1")
    if self.guidance == 1.0:
      self.refuse_inert(("guidance_interval",), "guidance = 1")
    if self.conditioning == "answer" and self.guidance == 1.0:
      self.refuse_inert(("text_tower",), "conditioning = 'answer' and no guidance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions(Options):
  """What a rollout is rewarded for.

  Attributes:
    num_rollouts: rollouts per prompt, the group.
    reward_weights: (name, weight) pairs; a name is an embedder of the run, KIND_patches, such as "dinov2_patches", for
      its patches one by one, a text reward, "http" for the external reward, or KIND_text, such as "clip_text", for the
      match of image and text. Weight 0 only measures.
    held_out_embedder: embedder that is measured and never rewarded, to reveal reward hacking; "" for none.
    decode_chunks: number of sequential chunks in which a batch of latents is generated and decoded, to bound memory.
  """

  num_rollouts: int = option(8, at_least=2)
  reward_weights: tuple[tuple[str, float], ...] = (("clip", 1.0),)
  held_out_embedder: str = ""
  decode_chunks: int = option(1, at_least=1)

  @property
  def images_per_prompt(self) -> int:
    """Images that are generated and rewarded per prompt."""
    return self.num_rollouts

  @property
  def reward_names(self) -> tuple[str, ...]:
    return tuple(name for name, _ in self.reward_weights)

  def check(self) -> None:
    names = self.reward_names
    if len(set(names)) < len(names):
      raise ValueError(f"reward_weights = {self.reward_weights}: a reward is named twice")
    rewarded = (*map(embedder_of, names), *map(image_text_kind, names))
    if self.held_out_embedder and embedder_of(self.held_out_embedder) in rewarded:
      raise ValueError(
        f"held_out_embedder = {self.held_out_embedder!r} is also in reward_weights: what is rewarded cannot reveal "
        "reward hacking"
      )
    if not all(math.isfinite(weight) for _, weight in self.reward_weights):
      raise ValueError(f"reward_weights = {self.reward_weights}: expected finite weights")
    if not any(weight for _, weight in self.reward_weights):
      raise ValueError(f"reward_weights = {self.reward_weights}: no reward has a weight, so there is nothing to learn")
