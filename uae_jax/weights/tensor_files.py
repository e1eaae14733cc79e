"""Tensor files as mappings name -> array: safetensors, sharded or not, and archives of `torch.save`.

Headers are held to the rules of the safetensors library: tensors cover the file without holes or overlaps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any
import warnings

import ml_dtypes
import numpy as np

from uae_jax import json_files
from uae_jax.weights import torch_archives

SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
# The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 32
# The stem of model folders whose library prefers a single file to an index beside it; others prefer the index.
TRANSFORMERS_STEM = "model"
OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
# Ends of the names of tensors that only quantized weights have.
QUANTIZED = {
  ".absmax": "bitsandbytes",
  ".SCB": "bitsandbytes",
  ".qweight": "GPTQ or AWQ",
  ".weight_scale": "compressed-tensors",
  ".weight_scale_inv": "FP8",
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """Shape and dtype of a tensor, known without reading it."""

  shape: tuple[int, ...]
  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Place:
  """The location of a tensor in a file; `offset` in bytes."""

  file: Path
  offset: int
  spec: Spec


class Safetensors(Mapping):
  """All tensors of some safetensors files, read one at a time.

  Files are not memory-mapped, because pages read from a mapped file would keep counting as memory of the process.

  Attributes:
    metadata: texts that the writer of the files stored beside the tensors.
  """

  def __init__(self, files: list[Path]):
    self._places: dict[str, _Place] = {}
    self.metadata: dict[str, str] = {}
    for file in files:
      found, metadata = _read_header(file)
      self.metadata |= metadata
      if twice := sorted(found.keys() & self._places.keys()):
        raise ValueError(
          f"{file}: tensor {twice[0]} is in {self._places[twice[0]].file.name} too: delete one of the two"
        )
      self._places |= found

  def __getitem__(self, name: str) -> np.ndarray:
    place = self._places[name]
    count = math.prod(place.spec.shape)
    return np.fromfile(place.file, place.spec.dtype, count, offset=place.offset).reshape(place.spec.shape)

  def __contains__(self, name: object) -> bool:
    return name in self._places

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def spec(self, name: str) -> Spec:
    return self._places[name].spec

  def file(self, name: str) -> Path:
    """The file that a tensor is in."""
    return self._places[name].file


class DtypeError(ValueError):
  """Raised for a whole file with a dtype that is not supported, such as float8."""


def _read_header(file: Path) -> tuple[dict[str, _Place], dict[str, str]]:
  """Reads the locations of all tensors of one file, and its metadata.

  Raises:
    ValueError: the file is not a safetensors file, is truncated, or has a dtype that is not supported.
  """
  try:
    size = file.stat().st_size
    with open(file, "rb") as stream:
      prefix = stream.read(8)
      if prefix == json_files.GIT_LFS[:8]:
        raise json_files.Pointer(file)
      length = int.from_bytes(prefix, "little")
      if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header is longer than the file or than {MAX_HEADER_BYTES} bytes")
      text = stream.read(length)
    if not text.startswith(b"{"):
      raise ValueError("its header does not start with {")
    header = json_files.parse_object(text, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
      raise ValueError("its __metadata__ is not a mapping of texts")
    return _places(file, header, 8 + length, size), metadata
  except (json_files.Pointer, DtypeError):
    raise
  except OSError as error:
    raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
  except ValueError as error:
    raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


def _places(file: Path, header: Mapping[str, Any], start: int, end: int) -> dict[str, _Place]:
  """The tensors of a header, whose data fill the bytes `start` to `end` of the file."""
  places, spans = {}, []
  for name, entry in header.items():
    match entry:
      case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(first), int(last)]} if len(
        shape
      ) <= MAX_AXES and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last)):
        pass
      case _:
        raise ValueError(f"tensor {name} has no dtype, shape or data_offsets, or impossible ones")
    if code not in SAFETENSORS_DTYPES:
      raise DtypeError(
        f"{file}: tensor {name} has the dtype {code[:20]}, which is not supported: "
        "convert the file to bfloat16 or float32"
      )
    spec = Spec(tuple(shape), SAFETENSORS_DTYPES[code])
    if last - first != math.prod(shape) * spec.dtype.itemsize:
      raise ValueError(f"tensor {name}: its bytes are not those of {code}{shape}")
    places[name] = _Place(file, start + first, spec)
    spans.append((start + first, start + last, name))
  place = start
  for first, last, name in sorted(spans):
    if first != place or last > end:
      raise ValueError(f"tensor {name} overlaps another one, leaves a hole before it, or reaches beyond the file")
    place = last
  if place != end:
    raise ValueError(f"{end - place} bytes after the last tensor belong to none")
  return places


class Renamed(Mapping):
  """A lazy view of the tensors of several mappings under new names."""

  def __init__(self):
    self._sources: dict[str, tuple[Mapping, str]] = {}

  def add(self, tensors: Mapping, rename: Callable[[str], str]) -> None:
    """Adds all tensors of a mapping; they replace existing ones of the same new name."""
    self._sources |= {rename(name): (tensors, name) for name in tensors}

  def put(self, new: str, tensors: Mapping, name: str) -> None:
    """Adds one tensor of a mapping under the name `new`."""
    self._sources[new] = (tensors, name)

  def __getitem__(self, name: str) -> np.ndarray:
    tensors, their_name = self._sources[name]
    return tensors[their_name]

  def __contains__(self, name: object) -> bool:
    return name in self._sources

  def __iter__(self) -> Iterator[str]:
    return iter(self._sources)

  def __len__(self) -> int:
    return len(self._sources)

  def spec(self, name: str) -> Spec:
    tensors, their_name = self._sources[name]
    return spec_of(tensors, their_name)


def spec_of(tensors: Mapping, name: str) -> Spec:
  """Shape and dtype of a tensor, without reading it if the mapping has a `spec` method."""
  if hasattr(tensors, "spec"):
    return tensors.spec(name)
  value = tensors[name]
  return Spec(tuple(np.shape(value)), np.asarray(value).dtype)


def count_indices(names: Iterable[str], prefix: str) -> int:
  """Number of different texts between `prefix` and the next dot: of layers, for a prefix such as `model.layers.`."""
  return len({name.removeprefix(prefix).split(".", 1)[0] for name in names if name.startswith(prefix)})


def open_folder(folder: Path, stem: str = TRANSFORMERS_STEM) -> Safetensors:
  """Opens the tensors of a Hugging Face model folder: `<stem>.safetensors`, or shards with or without an index.

  Where both are there, the file is read that transformers or diffusers would read, and a warning names the other.

  Raises:
    ValueError: the folder has no safetensors files, a shard is missing or damaged, the index contradicts the shards, or
      the weights are quantized.
  """
  tensors = _open_folder(folder, stem)
  for name in tensors:
    if method := next((method for end, method in QUANTIZED.items() if name.endswith(end)), None):
      raise ValueError(
        f"{folder}: the weights are quantized by {method} (tensor {name:.200}), which is not supported: "
        "take the model in bfloat16 or float32"
      )
  return tensors


def _open_folder(folder: Path, stem: str) -> Safetensors:
  single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
  if single.exists() and index.exists():
    used, other = (single, index) if stem == TRANSFORMERS_STEM else (index, single)
    warnings.warn(f"{folder}: both {single.name} and {index.name}; reading {used.name}, not {other.name}", stacklevel=2)
    return Safetensors([single]) if used is single else _open_index(index)
  if index.exists():
    return _open_index(index)
  if single.exists():
    return Safetensors([single])
  shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
  if not shards:
    others = sorted(file.name for end in OTHER_FORMATS for file in folder.glob(f"*{end}"))
    advice = f"; {others[0]:.100} is of another format: save the model as safetensors" if others else ""
    raise ValueError(f"{folder}: neither {single.name} nor {index.name}{advice}")
  total = shards[0].stem.rsplit("-of-", 1)[1]
  if not total.isdecimal() or len(shards) != int(total):
    raise ValueError(f"{folder}: {len(shards)} of {total} shards, and no {index.name}")
  return Safetensors(shards)


def open_archives(folder: Path, stem: str) -> dict[str, np.ndarray]:
  """Reads all archives of `torch.save` of a model folder: `<stem>.bin`, or shards with an index.

  Raises:
    ValueError: a file is missing or damaged, or the index contradicts the shards.
  """
  single, index = folder / f"{stem}.bin", folder / f"{stem}.bin.index.json"
  if single.exists() or not index.exists():
    return torch_archives.read(single)
  places, tensors = _read_index(index), dict[str, np.ndarray]()
  for file in sorted(set(places.values())):
    found = torch_archives.read(folder / file)
    for name in found:
      if name in tensors or places.get(name, file) != file:
        raise ValueError(f"{folder / file}: tensor {name:.200} is in another file, too, or {index.name} is stale")
    tensors |= found
  return tensors


def _open_index(index: Path) -> Safetensors:
  """Opens the shards of an index; tensors of a shard that the index lacks are found all the same."""
  places = _read_index(index)
  tensors = Safetensors([index.parent / name for name in sorted(set(places.values()))])
  for name, file in places.items():
    if name in tensors and tensors.file(name).name != file:
      raise ValueError(
        f"{index}: {name} is not in {file} but in {tensors.file(name).name}: delete the index, it is stale"
      )
  return tensors


def _read_index(index: Path) -> dict[str, str]:
  """Reads the index of a model in shards: name of a tensor -> name of its file, which exists.

  Raises:
    ValueError: it is no index, or names files elsewhere or files that do not exist.
  """
  places = json_files.read_object(index).get("weight_map")
  if not isinstance(places, dict) or not places:
    raise ValueError(f"{index}: not an index of shards (no weight_map)")
  for file in places.values():
    if not isinstance(file, str) or file != Path(file).name:
      raise ValueError(f"{index}: a shard is named {file!r:.100}, expected the name of a file beside the index")
  names = sorted(set(places.values()))
  missing = sorted(set(names) - {file.name for file in index.parent.iterdir()})
  if missing:
    raise ValueError(f"{index} names files that are not there: {', '.join(name[:100] for name in missing[:10])}")
  return places


def open_file(path: Path) -> Mapping[str, np.ndarray]:
  """Opens the tensors of one `.safetensors` file or `torch.save` archive."""
  return Safetensors([path]) if path.suffix == ".safetensors" else torch_archives.read(path)


def write(file: Path, tensors: Mapping[str, np.ndarray], names: list[str] | None = None) -> None:
  """Writes one safetensors file, one tensor at a time.

  Args:
    file: the output file.
    tensors: name -> array, read lazily.
    names: names of the tensors to write; default: all.
  """
  names = list(tensors) if names is None else names
  codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name in names:
    spec = spec_of(tensors, name)
    end = offset + math.prod(spec.shape) * spec.dtype.itemsize
    header[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  # The format requires tensors to start at a multiple of 8 bytes.
  text += b" " * (-len(text) % 8)
  try:
    with open(file, "wb") as stream:
      stream.write(len(text).to_bytes(8, "little") + text)
      for name in names:
        stream.write(np.ascontiguousarray(tensors[name]).view(np.uint8).reshape(-1).data)
  except OSError as error:
    raise OSError(error.errno, f"{error.strerror}; it needs {8 + len(text) + offset} bytes", str(file)) from error


def write_folder(folder: Path, stem: str, tensors: Mapping[str, np.ndarray], shard_bytes: int = 5 * 10**9) -> None:
  """Writes `<stem>.safetensors`, or shards of up to `shard_bytes` and their index, named as by Hugging Face."""
  folder.mkdir(parents=True, exist_ok=True)
  shards: list[list[str]] = [[]]
  room, total = shard_bytes, 0
  for name in tensors:
    spec = spec_of(tensors, name)
    size = math.prod(spec.shape) * spec.dtype.itemsize
    if shards[-1] and size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room, total = room - size, total + size
  if len(shards) == 1:
    write(folder / f"{stem}.safetensors", tensors)
    return
  files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for file, names in zip(files, shards, strict=True):
    write(folder / file, tensors, names)
  index = {
    "metadata": {"total_size": total},
    "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
  }
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
