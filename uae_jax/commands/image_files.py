"""Image arguments of a command: expansion into files, and batches of decoded images."""

from collections.abc import Iterable, Iterator, Sequence
import glob
from pathlib import Path
import sys

from uae_jax.files import IMAGE_SUFFIXES


def expand(arguments: Iterable[str]) -> list[Path]:
  """Expands files, folders and globs into distinct files: in argument order, sorted within one argument.

  A name that matches nothing and a folder without images are kept, so that reading them raises an error naming them.
  """
  found: dict[Path, None] = {}
  for argument in arguments:
    path = Path(argument)
    if path.is_dir():
      matches = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES) or [path]
    elif path.exists():
      matches = [path]
    else:
      matches = [Path(match) for match in sorted(glob.glob(str(argument), recursive=True))] or [path]
    found.update(dict.fromkeys(matches))
  return list(found)


class ImageBatches:
  """Iterates over batches of readable images; unreadable ones are reported on stderr and listed in `failed`."""

  def __init__(self, command: str, paths: Sequence[Path], batch_size: int):
    self.failed: list[Path] = []
    self._command, self._paths, self._batch_size = command, paths, batch_size

  def __iter__(self) -> Iterator[tuple[list[Path], list]]:
    """Yields (paths, RGB images) and advances a progress bar."""
    from tqdm import tqdm

    from uae_jax.data.preprocessing import read_image  # imports jax

    paths, images = [], []
    with tqdm(total=len(self._paths), desc=self._command, unit="image", file=sys.stderr) as bar:
      for path in self._paths:
        try:
          images.append(read_image(path))
          paths.append(path)
        except ValueError as error:
          self.failed.append(path)
          tqdm.write(f"uae-jax {self._command}: error: {error}", file=sys.stderr)
          bar.update()
        if len(images) == self._batch_size:
          yield paths, images
          bar.update(len(images))
          paths, images = [], []
      if images:
        yield paths, images
        bar.update(len(images))
