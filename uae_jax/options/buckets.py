"""The text of a bucket, a size of the images of a batch: `HEIGHTxWIDTH` in pixels, such as `512x768`."""

from collections.abc import Sequence
import re

Size = tuple[int, int]


def parse(texts: Sequence[str]) -> tuple[Size, ...]:
  """Reads the texts of buckets.

  Returns:
    (height, width) of each bucket, in pixels.

  Raises:
    ValueError: a text is no size, or two buckets have the same aspect ratio, so that one would stay empty.
  """
  sizes: list[Size] = []
  for text in texts:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
      raise ValueError(f"{text!r}: expected HEIGHTxWIDTH in pixels, such as 512x768")
    height, width = int(match[1]), int(match[2])
    for other in sizes:
      if height * other[1] == width * other[0]:
        raise ValueError(f"{text!r} has the aspect ratio of '{name(other)}': one of the two would stay empty")
    sizes.append((height, width))
  return tuple(sizes)


def name(size: Size) -> str:
  return f"{size[0]}x{size[1]}"
