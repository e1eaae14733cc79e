"""Options of the evaluation that a run makes of its own stages."""

import dataclasses

from uae_jax.files import local_path
from uae_jax.options.base import Options, option
from uae_jax.options.sampling import LARGEST_SEED, GenerationOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeriodicEvaluationOptions(Options):
  """Held-out figures while a stage trains, as `evaluation_<figure>` in its metrics.

  Attributes:
    every_steps: interval at which a stage computes its held-out figures on the averaged policy, before its first and
      after its last step too; 0 disables.
    num_images: held-out images, the first of `evaluation.num_images`.
  """

  every_steps: int = option(0, at_least=0)
  num_images: int = option(64, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteEvaluationOptions(Options):
  """Suites of `uae-jax evaluate` at small size, before, while and after each stage that captions and generates.

  Attributes:
    names: suites that are scored here, each as NAME:PATH, such as transfer:pictures; their figures are
      `suite_<name>...` in the metrics. Embedders are those of `evaluation.embedders`.
    every_steps: interval while a stage trains; 0: before its first and after its last step only.
    limit: first prompts or pictures of each suite that are used.
  """

  names: tuple[str, ...] = ()
  every_steps: int = option(0, at_least=0)
  limit: int = option(16, at_least=1)

  def check(self) -> None:
    found = []
    for name in self.names:
      suite, colon, path = name.partition(":")
      if not (suite and colon and path):
        raise ValueError(f"names = {name!r}: expected NAME:PATH")
      try:
        found.append(f"{suite}:{local_path(path)}")
      except ValueError as error:
        raise ValueError(f"names = {error}") from error
    suites = [name.partition(":")[0] for name in found]
    if len(set(suites)) < len(suites):
      raise ValueError(f"names = {self.names!r}: expected each suite once")
    object.__setattr__(self, "names", tuple(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(GenerationOptions):
  """Held-out figures after each stage.

  Attributes:
    num_images: held-out images; 0 evaluates nothing.
    batch_size: images per call.
    num_noises: reconstructions per image whose similarities are averaged.
    max_new_tokens: caption budget in tokens.
    embedders: the first gives `reward_similarity`, the second `held_out_similarity`, each further one
      `<kind>_similarity`.
    gallery_images: images in the report's gallery.
    caption_every_steps: interval at which stage 2 captions held-out images while it trains; 0 disables.
    seed: seed of captions and noise, the same after every stage.
    periodic: see `PeriodicEvaluationOptions`.
    suites: see `SuiteEvaluationOptions`.
  """

  num_images: int = option(768, at_least=0)
  batch_size: int = option(64, at_least=1)
  num_noises: int = option(1, at_least=1)
  max_new_tokens: int = option(512, at_least=1)
  sampler_steps: int = option(40, at_least=1)
  embedders: tuple[str, ...] = ("clip", "dinov2")
  gallery_images: int = option(8, at_least=0)
  caption_every_steps: int = option(50, at_least=0)
  seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
  periodic: PeriodicEvaluationOptions = PeriodicEvaluationOptions()
  suites: SuiteEvaluationOptions = SuiteEvaluationOptions()

  def check(self) -> None:
    super().check()
    if self.periodic.every_steps and self.periodic.num_images > self.num_images:
      raise ValueError(f"periodic.num_images = {self.periodic.num_images} is more than num_images = {self.num_images}")
