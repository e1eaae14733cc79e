"""Source of WebDataset shards: plain tar files in which the members of one record share a name, `cat.jpg`, `cat.txt`.

Members are found once, and read at random access afterwards. Those of a record need not be adjacent in their shard.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import glob
import os
from pathlib import Path
import tarfile
import zlib

from absl import logging
import numpy as np

from uae_jax.data import records
from uae_jax.data.images import image_from_bytes
from uae_jax.data.records import DEFAULT_FIELDS, Fields
from uae_jax.data.stored_index import ByteStrings, load_or_build, stamps
from uae_jax.files import IMAGE_SUFFIXES, require_regular

IMAGE, TEXT, JSON = range(3)
ROLES = ("image", "text", "json")
BLOCK_BYTES = 512


class WebDatasetSource:
  """The records of WebDataset shards: an image, and a caption in a .txt member or in a field of a .json member.

  Args:
    pattern: glob of the shards.
    fields: `image` is the suffix of the images, such as "jpg" or "left.png"; "" takes every known one. `caption` is a
      field of the .json members; "" takes the .txt member, or else the usual fields.
    index_dir: folder of the index; "" is that of the first shard.

  Raises:
    ValueError: there is no shard, one is torn or compressed, or none has an image; the message names it.
  """

  def __init__(self, pattern: str, fields: Fields = DEFAULT_FIELDS, index_dir: str = ""):
    self._fields, self._paths = fields, sorted(glob.glob(pattern))
    if not self._paths:
      raise ValueError(f"{pattern}: no such file")
    for path in self._paths:
      require_regular(path)
    place = index_dir or os.path.dirname(self._paths[0]) or "."
    self._index = load_or_build(
      f"tar-{fields.image or 'any'}", os.path.abspath(pattern), place, self._build, self._paths
    )
    if not len(self):
      wanted = f".{fields.image}" if fields.image else ", ".join(sorted(IMAGE_SUFFIXES))
      raise ValueError(f"{pattern}: no image ({wanted}) among {int(self._index['members'][0])} members")

  def _build(self):
    noted = stamps(self._paths)
    with ThreadPoolExecutor(8) as pool:
      shards = list(pool.map(lambda path: _scan(path, self._fields.image), self._paths))
    rows = [row for _, shard, _ in shards for row in shard]
    others = sum((other for *_, other in shards), Counter())
    if others:
      kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
      logging.info("%s and other shards: %d records; not read: %s", self._paths[0], len(rows), kinds)
    names = [name for shard, _, _ in shards for name in shard]
    table = np.asarray(rows, np.int64).reshape(-1, 7)
    places = {role: table[:, 2 * i : 2 * i + 2] for i, role in enumerate(ROLES)}
    checksum = zlib.crc32(b"\0".join(names), zlib.crc32(table.tobytes()))
    return noted, {
      **ByteStrings.arrays("name", names),
      **places,
      "is_ambiguous": table[:, 6].astype(bool),
      "shard_ends": np.cumsum([len(shard) for shard, _, _ in shards], dtype=np.int64),
      "members": np.asarray([3 * len(rows) + others.total()]),
      "checksum": np.asarray([checksum]),
      "bytes": np.asarray([sum(size for _, size, _ in noted)]),
    }

  def __len__(self) -> int:
    return len(self._index["is_ambiguous"])

  def __getitem__(self, index: int) -> dict:
    captions = self._captions(index)
    image = image_from_bytes(self._member(index, IMAGE), f"the image of {self.key(index)}")
    return {"image": np.asarray(image), **records.chosen(captions, self._fields)}

  def caption(self, index: int) -> str:
    return records.chosen(self._captions(index), self._fields)["caption"]

  def content(self, index: int) -> tuple[bytes | Path, tuple[str, ...]]:
    captions = self._captions(index)
    return self._member(index, IMAGE), captions

  def _captions(self, index: int) -> tuple[str, ...]:
    if self._index["is_ambiguous"][index]:
      raise ValueError("its shard has several images, .txt or .json members of this name")
    if self._fields.caption or not self._has(index, TEXT):
      if not self._has(index, JSON):
        if self._fields.caption:
          raise ValueError(f"no .json member, which should have the field {self._fields.caption}")
        return ()
      return records.captions_of(records.parse(self._member(index, JSON)), self._fields)
    data = self._member(index, TEXT)
    try:
      text = data.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
      raise ValueError(f"the .txt member is not UTF-8 text (byte {error.start})") from error
    return (text,) if text else ()

  def _has(self, index: int, role: int) -> bool:
    return bool(self._index[ROLES[role]][index, 0] >= 0)

  def _member(self, index: int, role: int) -> bytes:
    start, size = map(int, self._index[ROLES[role]][index])
    with open(self._shard(index), "rb") as file:
      data = os.pread(file.fileno(), size, start)
    if not size or len(data) < size:
      raise ValueError(f"the {ROLES[role]} member is {'empty' if not size else 'torn'}")
    return data

  def _shard(self, index: int) -> str:
    return self._paths[int(np.searchsorted(self._index["shard_ends"], index, side="right"))]

  def key(self, index: int) -> str:
    return f"{self._shard(index)} member {os.fsdecode(ByteStrings.of(self._index, 'name')[index])}"

  def fields(self) -> Sequence[str]:
    return tuple(records.parse(self._member(0, JSON))) if self._has(0, JSON) else ()

  def fingerprint(self) -> dict[str, int | str]:
    return {
      "records": len(self),
      "files": len(self._paths),
      "bytes": int(self._index["bytes"][0]),
      "checksum of members": f"{int(self._index['checksum'][0]):08x}",
    }


def _scan(path: str, image_suffix: str) -> tuple[list[bytes], list[tuple[int, ...]], Counter]:
  """Finds the records of a shard.

  Returns:
    (names, rows of (start, size) of image, text and JSON member with start -1 for none, and whether a role is taken
    twice, number of other members by suffix).

  Raises:
    ValueError: the shard is compressed or not whole; the message names it.
  """
  found: dict[str, list[int]] = {}
  others: Counter[str] = Counter()
  try:
    with tarfile.open(path, "r:") as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # Or every member would stay in memory.
        folder, _, file = member.name.rpartition("/")
        if not member.isreg() or file.startswith("."):
          continue
        stem, _, suffix = file.partition(".")
        suffix = suffix.lower()
        role = _role(suffix, image_suffix.lower().lstrip("."))
        if role is None:
          others[f".{suffix}"] += 1
          continue
        row = found.setdefault(f"{folder}/{stem}" if folder else stem, [-1, 0, -1, 0, -1, 0, 0])
        row[6] |= row[2 * role] >= 0
        row[2 * role : 2 * role + 2] = member.offset_data, member.size
      _require_whole(path, tar.offset)
  except tarfile.TarError as error:
    raise ValueError(f"{_what(path)} ({error}): write it again, or remove it") from error
  rows = {os.fsencode(name): tuple(row) for name, row in found.items() if row[0] >= 0}
  if len(found) > len(rows):
    others["without an image"] += len(found) - len(rows)
  return list(rows), list(rows.values()), others


def _role(suffix: str, image_suffix: str) -> int | None:
  if suffix == image_suffix or (not image_suffix and f".{suffix}" in IMAGE_SUFFIXES):
    return IMAGE
  return {"txt": TEXT, "json": JSON}.get(suffix)


def _require_whole(path: str, end: int) -> None:
  """Checks that a tar file has its mark of the end at byte `end`, and nothing after it."""
  with open(path, "rb") as file:
    file.seek(end)
    mark = file.read(BLOCK_BYTES)
    if len(mark) < BLOCK_BYTES:
      raise ValueError(f"{path} is torn: it ends at byte {end} without the mark of the end")
    if any(mark):
      raise ValueError(f"{path} is damaged at byte {end}: write it again, or remove it")
    while block := file.read(2**20):
      if block.count(0) < len(block):
        raise ValueError(f"{path} has more data after its end, at byte {end}: several joined shards; split them")


def _what(path: str) -> str:
  with open(path, "rb") as file:
    start = file.read(6)
  packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
  for magic, name in packed.items():
    if start.startswith(magic):
      return f"{path} is compressed by {name}, which allows no random access: unpack it to a plain tar file"
  return f"{path} is not a whole tar file"
