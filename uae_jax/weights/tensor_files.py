"""Tensor files as mappings name -> array, without torch: safetensors, sharded or not, and `torch.save` archives.

An archive is a zip file with a pickle. The unpickler accepts only a handful of names, all of which only describe
tensors, and refuses any other name without looking it up.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import math
from pathlib import Path
import pickle
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


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
  """

  def __init__(self, files: list[Path]):
    self._places: dict[str, _Place] = {}
    for file in files:
      self._places |= _read_header(file)

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


def _read_header(file: Path) -> dict[str, _Place]:
  """Reads the locations of all tensors of one file.

  Raises:
    ValueError: the file is not a safetensors file, or is truncated.
  """
  try:
    size = file.stat().st_size
    with open(file, "rb") as stream:
      length = int.from_bytes(stream.read(8), "little")
      if length > size - 8:
        raise ValueError("its header is longer than the file")
      header = json.loads(stream.read(length))
    places = {}
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      spec = Spec(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
      start, end = (8 + length + offset for offset in entry["data_offsets"])
      if end > size or end - start != math.prod(spec.shape) * spec.dtype.itemsize:
        raise ValueError(f"tensor {name} reaches beyond the file, or its size is wrong")
      places[name] = _Place(file, start, spec)
    return places
  except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


class Renamed(Mapping):
  """A lazy view of the tensors of several mappings under new names."""

  def __init__(self):
    self._sources: dict[str, tuple[Mapping, str]] = {}

  def add(self, tensors: Mapping, rename: Callable[[str], str]) -> None:
    """Adds all tensors of a mapping; they replace existing ones of the same new name."""
    self._sources |= {rename(name): (tensors, name) for name in tensors}

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


def open_folder(folder: Path, stem: str = "model") -> Safetensors:
  """Opens the tensors of a Hugging Face model folder: `<stem>.safetensors`, or shards with or without an index.

  Raises:
    ValueError: the folder has no safetensors files, or a shard is missing or truncated.
  """
  single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
  if (folder / index).exists():
    try:
      names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
      raise ValueError(f"{folder / index}: not an index of shards ({error})") from error
  elif (folder / single).exists():
    names = [single]
  elif not (names := sorted(file.name for file in folder.glob(f"{stem}-*-of-*.safetensors"))):
    raise ValueError(f"{folder}: neither {single} nor {index}")
  else:
    total = int(names[0].rsplit("-of-", 1)[1].split(".")[0])
    if len(names) != total:
      raise ValueError(f"{folder}: {len(names)} of {total} shards, and no {index}")
  missing = [name for name in names if not (folder / name).exists()]
  if missing:
    raise ValueError(f"{folder}: {index} names files that are not there: {', '.join(missing)}")
  return Safetensors([folder / name for name in names])


def open_file(path: Path) -> Mapping[str, np.ndarray]:
  """Opens the tensors of one `.safetensors` file or `torch.save` archive."""
  return Safetensors([path]) if path.suffix == ".safetensors" else read_torch_archive(path)


def read_torch_archive(path: Path) -> dict[str, np.ndarray]:
  """Reads a flat dict of tensors, such as a state dict, written by `torch.save`.

  Raises:
    ValueError: the file is not such an archive, or its pickle contains more than a dict of tensors.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise ValueError(f"{path}: {len(pickles)} data.pkl in the archive, expected 1: not written by torch.save")
      root = pickles[0].removesuffix("data.pkl")
      if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(f"{path}: big-endian tensors are not supported")
      with archive.open(pickles[0]) as file:
        content = _Unpickler(file, archive, f"{root}data/").load()
  except (OSError, zipfile.BadZipFile, KeyError, EOFError, pickle.UnpicklingError) as error:
    raise ValueError(f"{path}: not a readable archive of torch.save ({error})") from error
  if not isinstance(content, Mapping) or not all(isinstance(value, np.ndarray) for value in content.values()):
    raise ValueError(f"{path}: holds {type(content).__name__}, expected a dict of tensors")
  return dict(content)


class _Unpickler(pickle.Unpickler):
  """The restricted unpickler of `data.pkl`; see the module's docstring."""

  def __init__(self, file, archive: zipfile.ZipFile, folder: str):
    super().__init__(file)
    self._archive = archive
    self._folder = folder
    self._storages: dict[str, np.ndarray] = {}

  def find_class(self, module: str, name: str) -> Any:
    if module in ("torch", "torch.storage") and name in STORAGES:
      return STORAGES[name]
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return _rebuild_parameter
    if (module, name) == ("collections", "OrderedDict"):
      return OrderedDict
    raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is refused: it is no tensor")

  def persistent_load(self, identifier: Any) -> np.ndarray:
    """The flat array of one file of the archive, for ("storage", dtype, file, device, length)."""
    if not (isinstance(identifier, tuple) and len(identifier) == 5 and isinstance(identifier[1], np.dtype)):
      raise pickle.UnpicklingError(f"unknown storage {identifier!r}")
    _, dtype, key, _, length = identifier
    if key not in self._storages:
      self._storages[key] = np.frombuffer(self._archive.read(f"{self._folder}{key}"), dtype)
    storage = self._storages[key]
    if storage.size != length or storage.dtype != dtype:
      raise pickle.UnpicklingError(
        f"storage {key} holds {storage.size} of {storage.dtype}, expected {length} of {dtype}"
      )
    return storage


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
  """A view into a storage, with the bounds checks that `as_strided` does not do."""
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or any(not isinstance(number, int) or number < 0 for number in numbers):
    raise pickle.UnpicklingError(f"tensor of shape {shape} and strides {strides} at {offset}")
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  if math.prod(shape) and last >= storage.size:
    raise pickle.UnpicklingError(f"tensor of shape {shape} reaches beyond its storage of {storage.size}")
  steps = tuple(stride * storage.itemsize for stride in strides)
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
  return tensor


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
  with open(file, "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      np.ascontiguousarray(tensors[name]).tofile(stream)


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
