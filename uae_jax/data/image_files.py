"""Image arguments of a command: expansion into files, and names of results."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import glob
import itertools
import os
from pathlib import Path
import unicodedata

from uae_jax.files import IMAGE_SUFFIXES


def expand(arguments: Iterable[str | os.PathLike]) -> list[Path]:
  """Expands files, folders and globs into distinct files: in argument order, sorted within one argument.

  A name that matches nothing and a folder without images are kept, so that reading them raises an error naming them.
  """
  found: dict[Path, None] = {}
  for argument in arguments:
    path = Path(argument)
    if os.path.isdir(path):
      matches = _images_in(path) or [path]
    elif os.path.exists(path):
      matches = [path]
    else:
      matches = [Path(match) for match in sorted(glob.glob(os.fspath(argument), recursive=True))] or [path]
    found.update(dict.fromkeys(matches))
  return list(found)


def require_some(paths: Sequence[Path]) -> None:
  """Checks that some of the paths is a file, before a model is loaded to read them.

  Raises:
    ValueError: none is.
  """
  if not any(path.is_file() for path in paths):
    raise ValueError(f"no image file: {paths[0]} {'is a folder without images' if paths[0].is_dir() else 'is no file'}")


def _images_in(folder: Path) -> list[Path]:
  try:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
  except OSError:  # Not allowed to list it, for example; the caller's attempt to read it says so.
    return []


def result_names(paths: Sequence[Path]) -> list[str]:
  """Names the reconstruction of each image so that `uae-jax bench` pairs the two, and no two names are equal.

  It is `recon_<stem>.png`; if that fits another image as well, `recon_<file name>.png`; if that does too, because the
  images are in different folders, a number is added and no benchmark can pair them by name.
  """
  # What the benchmark compares with the stem of a reconstruction, see `unified_bench.pair`.
  fits = Counter(stem for path in paths for stem in {_same(path.stem), *map(_same, _stems(path))})
  used: set[str] = set()
  return [_unused(path, fits, used) for path in paths]


def _stems(path: Path) -> tuple[str, str]:
  return f"recon_{path.stem}", f"recon_{path.name}"


def _unused(path: Path, fits: Mapping[str, int], used: set[str]) -> str:
  numbered = (f"recon_{path.name}_{number}" for number in itertools.count(2))
  free = (stem for stem in _stems(path) if fits[_same(stem)] == 1)
  unique = (stem for stem in numbered if not fits[_same(stem)] and _same(stem) not in used)
  stem = next(itertools.chain(free, unique))
  used.add(_same(stem))
  return f"{stem}.png"


def _same(name: str) -> str:
  """Equal for names that some file system takes for one: macOS ignores case and composes accents."""
  return unicodedata.normalize("NFC", name).casefold()
