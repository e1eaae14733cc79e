"""Generates the images of a suite: missing ones only, whole files only, and each failure named."""

from collections.abc import Callable, Iterator, Sequence, Set
import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from uae_jax import files
from uae_jax.data.images import open_image
from uae_jax.evaluation.attempts import attempt
from uae_jax.evaluation.suites.spec import Prompt, Suite, Target

# (texts, latents float32[B, h, w, C]) -> B images.
Generate = Callable[[Sequence[str], np.ndarray], Sequence[Image.Image]]
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Job:
  """One image file that does not exist yet."""

  prompt: Prompt
  target: Target


def noise(seed: int, prompt: Prompt, sample: int, shape: Sequence[int]) -> np.ndarray:
  """Draws the initial noise float32[h, w, C] of a sample, from the seed, the prompt's index and the sample alone."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt.index), sample)
  return np.asarray(jax.random.normal(key, tuple(shape)))


def missing(suite: Suite, prompts: Sequence[Prompt], num_samples: int, out: Path, size: tuple[int, int]) -> list[Job]:
  """Lists the files that are absent, unreadable, or of another size.

  Args:
    suite: the benchmark.
    prompts: prompts of this run.
    num_samples: samples per prompt.
    out: output folder.
    size: (height, width) of one sample, in pixels.
  """
  return [
    job
    for job in jobs_of(suite, prompts, num_samples)
    if not is_whole(out / job.target.file, len(job.target.samples), size)
  ]


def jobs_of(suite: Suite, prompts: Sequence[Prompt], num_samples: int, only: Set[str] | None = None) -> list[Job]:
  """Lists all files of these prompts, or those that `only` names."""
  jobs = [Job(prompt, target) for prompt in prompts for target in suite.targets(prompt, num_samples)]
  return [job for job in jobs if only is None or job.target.file in only]


def is_whole(file: Path, num_tiles: int, size: tuple[int, int]) -> bool:
  """Whether a file is a readable image with so many tiles of (height, width) pixels."""
  rows, columns = grid(num_tiles)
  return size_of(file) == (columns * size[1], rows * size[0])


def size_of(file: Path) -> tuple[int, int] | None:
  """(width, height) of a readable image in pixels; None if it is absent or damaged."""
  try:
    with open_image(file) as image:
      image.load()
      return image.size
  except Exception:  # PIL's decoders raise a dozen exception types for corrupt files.
    return None


def grid(num_tiles: int) -> tuple[int, int]:
  """(rows, columns) of a grid, as square as possible."""
  columns = math.ceil(math.sqrt(num_tiles))
  return math.ceil(num_tiles / columns), columns


def run(
  suite: Suite,
  jobs: Sequence[Job],
  generate: Generate,
  out: Path,
  *,
  seed: int,
  latents_shape: Sequence[int],
  batch_size: int,
) -> dict[str, str]:
  """Generates and writes the files of `jobs`.

  Args:
    suite: the benchmark.
    jobs: result of `missing`.
    generate: makes images from texts and noise.
    out: output folder.
    seed: seed of the run; see `noise`.
    latents_shape: (h, w, C) of one image's latents.
    batch_size: images per call of `generate`; files of several samples are never split.

  Returns:
    file -> error message, for files that could not be made.
  """
  failed: dict[str, str] = {}
  with tqdm(total=sum(len(job.target.samples) for job in jobs), desc=suite.name, unit="image") as bar:
    for batch in batches(jobs, batch_size):
      for job, result in attempt(batch, lambda part: images_of(part, generate, seed, latents_shape)):
        try:
          if isinstance(result, Exception):
            raise result
          write(suite, job, result, out)
        except Exception as error:  # Anything that fails for one file is that file's failure.
          if files.is_hopeless(error):
            raise
          failed[job.target.file] = " ".join(f"{type(error).__name__}: {error}".split())
        bar.update(len(job.target.samples))
  return failed


def batches(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
  """Yields consecutive jobs of at most `batch_size` samples together, at least one job at a time."""
  batch: list[Job] = []
  for job in jobs:
    if batch and sum(len(other.target.samples) for other in (*batch, job)) > batch_size:
      yield batch
      batch = []
    batch.append(job)
  if batch:
    yield batch


def images_of(batch: Sequence[Job], generate: Generate, seed: int, latents_shape: Sequence[int]) -> list[list]:
  """Makes the images of each job in one call of `generate`."""
  rows = [(job, sample) for job in batch for sample in job.target.samples]
  latents = np.stack([noise(seed, job.prompt, sample, latents_shape) for job, sample in rows])
  images = iter(generate([job.prompt.text for job, _ in rows], latents))
  return [[next(images) for _ in job.target.samples] for job in batch]


def write(suite: Suite, job: Job, images: Sequence[Image.Image], out: Path) -> None:
  """Writes the image of a job, after the text files that belong to its prompt."""
  for name, content in suite.texts(job.prompt).items():
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(out / name, content)
  file = out / job.target.file
  file.parent.mkdir(parents=True, exist_ok=True)
  kind, options = ("JPEG", {"quality": JPEG_QUALITY}) if file.suffix == ".jpg" else ("PNG", {})
  files.write_whole(file, files.image_bytes(tile(images), kind, **options))


def tile(images: Sequence[Image.Image]) -> Image.Image:
  """Tiles images of one size row by row."""
  if len(images) == 1:
    return images[0]
  (rows, columns), (width, height) = grid(len(images)), images[0].size
  whole = Image.new("RGB", (columns * width, rows * height))
  for index, image in enumerate(images):
    whole.paste(image, (index % columns * width, index // columns * height))
  return whole
