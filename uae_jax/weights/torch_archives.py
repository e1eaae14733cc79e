"""Reads a dict of tensors that `torch.save` wrote, without torch and without running its pickle.

The archive is a zip file with a pickle. `_Machine` executes the few opcodes that a dict of tensors needs. It builds
only dicts, tuples, texts, numbers and arrays: a name such as `torch._utils._rebuild_tensor_v2` stays a pair of texts
that is compared, never looked up, and the opcode BUILD changes nothing.
"""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import pickletools
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from uae_jax import json_files

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
# A dict of ten thousand tensors takes 1 MB.
MAX_PICKLE_BYTES = 2 * 2**20
OTHER_NAMES = (
  ("torch._utils", "_rebuild_tensor_v2"),
  ("torch._utils", "_rebuild_parameter"),
  ("collections", "OrderedDict"),
)


def read(path: Path) -> dict[str, np.ndarray]:
  """Reads a flat dict of tensors, such as a state dict, or a checkpoint whose `state_dict` is one.

  Raises:
    ValueError: the file is not such an archive, or its pickle contains more than a dict of tensors.
  """
  try:
    with open(path, "rb") as stream:
      if stream.read(len(json_files.GIT_LFS)) == json_files.GIT_LFS:
        raise json_files.Pointer(path)
    with zipfile.ZipFile(path) as archive:
      content = _read_archive(archive, path.stat().st_size)
  except json_files.Pointer:
    raise
  except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, KeyError, ValueError) as error:
    raise ValueError(f"{path}: not a readable archive of torch.save ({error})") from error
  if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
    content = content["state_dict"]
  if not isinstance(content, dict) or not all(isinstance(value, np.ndarray) for value in content.values()):
    raise ValueError(f"{path}: holds {type(content).__name__}, expected a dict of tensors")
  return content


def _read_archive(archive: zipfile.ZipFile, file_bytes: int) -> Any:
  entries = {info.filename: info for info in archive.infolist()}
  # `torch.save` compresses nothing, so no honest archive is larger than its file.
  if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
    raise ValueError("its entries are compressed, which torch.save never does")
  if sum(info.file_size for info in archive.infolist()) > file_bytes:
    raise ValueError("its entries claim to be larger than the file")
  pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ValueError(f"{len(pickles)} data.pkl in it, expected 1")
  if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
    raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")
  root = pickles[0].removesuffix("data.pkl")
  if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
    raise ValueError("big-endian tensors are not supported")
  storages: dict[str, np.ndarray] = {}

  def storage(kind: str, key: str, length: int) -> np.ndarray:
    dtype, name = STORAGES[kind], f"{root}data/{key}"
    if name not in entries or entries[name].file_size != length * dtype.itemsize:
      found = entries[name].file_size if name in entries else "no"
      raise ValueError(f"storage {key} has {found} bytes, expected {length} of {dtype}")
    if key not in storages:
      storages[key] = np.frombuffer(archive.read(name), np.uint8)
    return storages[key].view(dtype)

  return _Machine(storage).run(archive.read(pickles[0]))


@dataclasses.dataclass(frozen=True)
class _Name:
  """A global of the pickle, as text."""

  module: str
  name: str


_MARK = object()


class _Machine:
  """Executes the opcodes of a dict of tensors.

  Args:
    storage: (kind, key, length) -> flat array of the numbers of one storage.
  """

  def __init__(self, storage: Callable[[str, str, int], np.ndarray]):
    self._storage = storage
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self, content: bytes) -> Any:
    """The object of a pickle.

    Raises:
      ValueError: an opcode or a name does not belong to a dict of tensors.
    """
    try:
      for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STOP":
          return self._stack.pop()
        self._execute(opcode.name, argument)
    except (IndexError, TypeError, UnicodeDecodeError) as error:
      raise ValueError(f"its pickle is damaged ({error})") from error
    raise ValueError("its pickle has no end")

  def _execute(self, opcode: str, argument: Any) -> None:
    stack = self._stack
    match opcode:
      case "PROTO" | "FRAME":
        pass
      case "MARK":
        stack.append(_MARK)
      case "NONE" | "NEWTRUE" | "NEWFALSE":
        stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
        stack.append(argument)
      case "EMPTY_DICT":
        stack.append({})
      case "EMPTY_TUPLE":
        stack.append(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        count = int(opcode[-1])
        if len(stack) < count:
          raise ValueError("its pickle is damaged (nothing left on the stack)")
        stack[-count:] = [tuple(stack[-count:])]
      case "TUPLE":
        stack.append(tuple(self._to_mark()))
      case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
        self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        if argument not in self._memo:
          raise ValueError(f"its pickle is damaged (nothing stored as {argument})")
        stack.append(self._memo[argument])
      case "POP":
        stack.pop()
      case "GLOBAL":
        stack.append(_name(*argument.split(" ", 1)))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(_name(module, name))
      case "SETITEM" | "SETITEMS":
        items = self._to_mark() if opcode == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
        self._set_items(items)
      case "BINPERSID":
        stack.append(self._persistent(stack.pop()))
      case "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, arguments))
      case "BUILD":
        # The state of an OrderedDict is metadata of its modules; dropped, like the state of anything else.
        stack.pop()
      case _:
        raise ValueError(f"its pickle has the opcode {opcode}, which a dict of tensors does not need")

  def _to_mark(self) -> list[Any]:
    """Removes and returns what is on the stack above the last mark, and the mark."""
    place = next((i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK), None)
    if place is None:
      raise ValueError("its pickle is damaged (no mark)")
    items = self._stack[place + 1 :]
    del self._stack[place:]
    return items

  def _set_items(self, items: list[Any]) -> None:
    names, target = items[::2], self._stack[-1]
    if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(name, str) for name in names):
      raise ValueError("its pickle holds something else than a dict with names")
    if len(set(names)) < len(names) or not target.keys().isdisjoint(names):
      raise ValueError("its pickle gives one name twice")
    target.update(zip(names, items[1::2], strict=True))

  def _persistent(self, identifier: Any) -> np.ndarray:
    """The flat array of one file of the archive, for ("storage", kind, file, device, length)."""
    match identifier:
      case ("storage", _Name("torch" | "torch.storage", kind), str(key), str(), int(length)) if kind in STORAGES:
        return self._storage(kind, key, length)
    raise ValueError("its pickle refers to an unknown kind of storage")


def _name(module: Any, name: Any) -> _Name:
  """A name that tensors are described with; any other is refused."""
  is_storage = module in ("torch", "torch.storage") and name in STORAGES
  if not is_storage and (module, name) not in OTHER_NAMES:
    raise ValueError(f"its pickle asks for {module}.{name}, which is refused: it is no tensor")
  return _Name(module, name)


def _call(function: Any, arguments: Any) -> Any:
  """The result of the few functions that build tensors and dicts."""
  match function, arguments:
    case _Name("torch._utils", "_rebuild_tensor_v2"), (
      np.ndarray() as storage,
      int(offset),
      tuple(shape),
      tuple(strides),
      *_,
    ):
      return _tensor(storage, offset, shape, strides)
    case _Name("torch._utils", "_rebuild_parameter"), (np.ndarray() as data, *_):
      return data
    case _Name("collections", "OrderedDict"), ():
      return {}
  raise ValueError("its pickle calls something else than the functions that rebuild tensors")


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
  """A view into a storage, with the bounds checks that `as_strided` does not do."""
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
    raise ValueError("a tensor has an impossible shape, stride or offset")
  if storage.ndim != 1 or len(shape) > 32:
    raise ValueError("a tensor is a view of something that is no storage, or has more than 32 axes")
  count = math.prod(shape)
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
  if count > storage.size or (count and last >= storage.size):
    raise ValueError(f"tensor of shape {shape} reaches beyond its storage of {storage.size}")
  if not count:
    return np.empty(shape, storage.dtype)
  bytes_of = [stride * storage.itemsize for stride in strides]
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_of, writeable=False)
