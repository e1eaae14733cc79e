"""Options of the data."""

import dataclasses
import math

from uae_jax.files import input_path
from uae_jax.options import buckets as bucket_sizes
from uae_jax.options import mixture
from uae_jax.options.base import Options, option

# Which of several captions of a record is used.
FIRST, LONGEST, RANDOM = "first", "longest", "random"
# The kind of `data.source` that has no images.
PROMPTS = "prompts"
# Kinds of `data.source` whose names are paths.
PATH_KINDS = ("jsonl", "arrayrecord", "folder", "parquet", "webdataset", PROMPTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
  """Where images and captions come from.

  Attributes:
    source: "scenes", or KIND:NAME, see `data.sources`.
    data_dir: folder that relative names in `source` refer to.
    image_field: name of the field, column or feature of the image, of tar members the suffix; "" takes the usual names.
    caption_field: name of the field, column or feature of the captions; "" takes the usual names.
    caption_choice: which of several captions of a record is used: "first", "longest", or "random", drawn anew by the
      seed whenever the record is read for training.
    index_dir: folder for the indexes of large files and folders; "" keeps them beside the data.
    image_px: side in pixels of the square images in a batch, and of held-out images.
    buckets: sizes of the images in a batch, HEIGHTxWIDTH in pixels; a batch has one of them, that with the aspect ratio
      nearest to the ratio of its pictures. Empty: all pictures become squares of `image_px`.
    max_crop: largest fraction of a picture that its bucket may cut off; a picture that fits worse is a bad record.
    caption_tokens: tokens per caption, including the closing token; longer captions are truncated.
    max_bad_fraction: largest fraction of unreadable records before the run stops.
    max_cut_fraction: largest fraction of captions longer than `caption_tokens` before a stage that trains on captions
      stops; 1 sets no limit.
    variant: variant of the small world: "plain", "shifted", "dense", or "rich", which needs model = "rich_scenes".
  """

  source: str = "scenes"
  data_dir: str = ""
  image_field: str = ""
  caption_field: str = ""
  caption_choice: str = option(FIRST, choices=(FIRST, LONGEST, RANDOM))
  index_dir: str = option("", is_path=True)
  image_px: int = option(512, at_least=1)
  buckets: tuple[str, ...] = ()
  max_crop: float = option(0.5, at_least=0, less_than=1)
  caption_tokens: int = option(512, at_least=2)
  max_bad_fraction: float = option(0.01, at_least=0, at_most=1)
  max_cut_fraction: float = option(1.0, at_least=0, at_most=1)
  variant: str = "plain"

  @property
  def has_images(self) -> bool:
    return PROMPTS not in {kind for kind, _ in self._parts()}

  @property
  def image_sizes(self) -> tuple[bucket_sizes.Size, ...]:
    """(height, width) of the images of training: those of the buckets, or one square."""
    return bucket_sizes.parse(self.buckets) or ((self.image_px, self.image_px),)

  @property
  def largest_size(self) -> bucket_sizes.Size:
    """The size with the most pixels."""
    return max(self.image_sizes, key=math.prod)

  def _parts(self) -> list[tuple[str, str]]:
    """(kind, name) of the source, or of each source of a mixture."""
    kind, _, name = self.source.partition(":")
    sources = [source for _, source in mixture.parse(name)] if kind == mixture.MIXTURE else [self.source]
    return [(kind, name) for kind, _, name in (source.partition(":") for source in sources)]

  def check(self) -> None:
    kind, colon, name = self.source.partition(":")
    if kind in PATH_KINDS:
      self.replace_path("source", name, prefix=kind + colon, is_input=True)
    if kind == mixture.MIXTURE:
      self._check_mixture(name)
    if kind != "tfds":  # TFDS opens addresses itself
      self.replace_path("data_dir", self.data_dir, is_input=True)
    if kind not in ("scenes", "tfds"):
      self.refuse_inert(("variant",), f"source = {self.source!r}, which is not the small world")
    if kind == PROMPTS:
      self.refuse_inert(("image_field",), f"source = {self.source!r}, which has no images")
    if not self.buckets:
      self.refuse_inert(("max_crop",), "buckets = ()")
    elif kind == "scenes":
      raise ValueError(f"buckets = {self.buckets}: the images of source = {self.source!r} are all squares")
    try:
      bucket_sizes.parse(self.buckets)
    except ValueError as error:
      raise ValueError(f"buckets = {error}") from error
    if kind in ("scenes", "folder"):
      names = ("image_field", "caption_field", "caption_choice")
      self.refuse_inert(names, f"source = {self.source!r}, whose records have no named fields")

  def _check_mixture(self, name: str) -> None:
    parts = []
    for weight, source in _parse(name):
      kind, _, path = source.partition(":")
      if kind in ("scenes", mixture.MIXTURE):
        raise ValueError(f"source = {self.source!r}: {kind} cannot be part of a mixture")
      try:
        parts.append(f"{weight!r}*{kind}:{input_path(path) if kind in PATH_KINDS else path}")
      except ValueError as error:
        raise ValueError(f"source = {error}") from error
    object.__setattr__(self, "source", f"{mixture.MIXTURE}:{mixture.SEPARATOR.join(parts)}")


def _parse(name: str) -> list[tuple[float, str]]:
  try:
    return mixture.parse(name)
  except ValueError as error:
    raise ValueError(f"source = {error}") from error
