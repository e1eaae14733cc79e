"""Tensor files of others: what is not exactly one tensor per name and byte is refused; file and tensor are named."""

import io
import json
from pathlib import Path
import pickle
import zipfile

import numpy as np
import pytest

from uae_jax.weights import tensor_files, torch_archives

pytestmark = pytest.mark.fast

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 167666902\n"


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_raw(file, header: dict | str, data: bytes) -> None:
  text = (header if isinstance(header, str) else json.dumps(header)).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlaps"),
    ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, "hole"),
    ({"a": entry(0, 8, [2])}, "4 bytes after the last tensor"),
    ({"a": entry(-4, 8, [3])}, "impossible"),
    ({"a": entry(0, 16, [4])}, "beyond the file"),
    ({"a": entry(0, 12, [-1, -3])}, "impossible"),
    ({"a": entry(0, 12, [True, 3])}, "impossible"),
    ({"a": entry(0, 12, [2])}, "its bytes are not those"),
    ({"a": {"dtype": "F32"}}, "no dtype, shape or data_offsets"),
    ({"a": entry(0, 12, [12], "F8_E4M3")}, "tensor a has the dtype F8_E4M3"),
    ({"a": entry(0, 12, [3]), "__metadata__": {"x": 1}}, "__metadata__"),
    (json.dumps({"a": entry(0, 4, [1]), "b": entry(4, 12, [2])}).replace('"b"', '"a"'), "'a' occurs twice"),
    (" " + json.dumps({"a": entry(0, 12, [3])}), "does not start with"),
    ("[" * 100_000, "does not start with"),
    ('{"a":' * 100_000, "nested too deeply"),
  ],
)
def test_a_header_is_held_to_the_rules_of_the_format(tmp_path, header, message):
  write_raw(tmp_path / "model.safetensors", header, bytes(12))
  with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
    tensor_files.open_folder(tmp_path)


def write_shards(folder, **tensors_of: dict) -> None:
  for name, tensors in tensors_of.items():
    tensor_files.write(folder / f"{name}.safetensors", {key: np.float32([value]) for key, value in tensors.items()})


def write_index(folder, places: dict) -> None:
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_one_name_in_two_shards_is_refused(tmp_path):
  write_shards(tmp_path, one={"a": 1, "b": 2}, two={"b": 3})
  write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
  with pytest.raises(ValueError, match=r"two\.safetensors: tensor b is in one\.safetensors too"):
    tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize(
  ("places", "message"),
  [
    ({"a": "two.safetensors", "b": "one.safetensors"}, r"a is not in two\.safetensors but in one\.safetensors"),
    ({"a": "gone.safetensors"}, "not there: gone"),
    ({"a": "../one.safetensors"}, "beside the index"),
    ({"a": ["one.safetensors"]}, "beside the index"),
    ({}, "no weight_map"),
  ],
)
def test_an_index_that_contradicts_its_shards_is_refused(tmp_path, places, message):
  write_shards(tmp_path, one={"a": 1}, two={"b": 2})
  write_index(tmp_path, places)
  with pytest.raises(ValueError, match=rf"index\.json.*{message}"):
    tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize(("stem", "value"), [("model", 1), ("diffusion_pytorch_model", 2)])
def test_beside_an_index_a_single_file_counts_where_its_library_reads_it(tmp_path, stem, value):
  write_shards(tmp_path, **{stem: {"a": 1}, "shard": {"a": 2}})
  (tmp_path / f"{stem}.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
  with pytest.warns(UserWarning, match="both"):
    assert tensor_files.open_folder(tmp_path, stem)["a"] == value


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "clip.pt"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
  (tmp_path / name).write_text(LFS)
  with pytest.raises(ValueError, match=rf"{name}: a pointer of git-lfs.*git lfs pull"):
    tensor_files.open_file(tmp_path / name) if name.endswith(".pt") else tensor_files.open_folder(tmp_path)


def test_a_full_disk_names_the_file():
  with pytest.raises(OSError, match=r"needs \d+ bytes.*/dev/full"):
    tensor_files.write(Path("/dev/full"), {"a": np.zeros(10_000, np.float32)})


# --- Archives of torch.save ------------------------------------------------------------------------------------------


def archive_of(content: bytes, storage: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", compression) as archive:
    archive.writestr("a/data.pkl", content)
    archive.writestr("a/data/0", storage)
  return buffer.getvalue()


def tensor(kind: str = "FloatStorage", length: int = 4, shape: tuple = (4,), strides: tuple = (1,)) -> bytes:
  """Opcodes that push one tensor."""
  numbers = [pickle.dumps(value, 2)[2:-1] for value in (0, shape, strides)]
  storage = b"(X\x07\0\0\0storagectorch\n" + kind.encode() + b"\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu"
  storage += pickle.dumps(length, 2)[2:-1] + b"tQ"
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(numbers) + b"\x89}tR"


def state(opcodes: bytes) -> bytes:
  """A pickle of {"w": what the opcodes push}."""
  return b"\x80\x02}X\x01\0\0\0w" + opcodes + b"s."


# A storage's dtype, a state for it, BUILD: this would change the size of bfloat16 in the whole process.
DTYPE_STATE = b"ctorch\nBFloat16Storage\n(K\x03X\x01\0\0\0|NNNJ\x01\0\0\0J\x01\0\0\0K\0tb0"


def test_the_opcode_build_changes_nothing(tmp_path):
  file, before = tmp_path / "a.pt", torch_archives.STORAGES["BFloat16Storage"].itemsize
  file.write_bytes(archive_of(state(DTYPE_STATE + tensor())))
  np.testing.assert_array_equal(torch_archives.read(file)["w"], np.zeros(4))
  assert torch_archives.STORAGES["BFloat16Storage"].itemsize == before == 2


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (state(tensor(length=5)), "16 bytes, expected 5"),
    (state(tensor(kind="DoubleStorage")), "16 bytes, expected 4 of float64"),
    (state(tensor(shape=(10**9, 10**9), strides=(0, 0))), "beyond its storage"),
    (state(tensor(shape=(2, -1), strides=(1, 1))), "impossible"),
    (state(tensor(shape=(2,), strides=(4,))), "beyond its storage"),
    (state(b"ctorch\nFloatStorage\n)R"), "calls something else"),
    (state(b"cos\nsystem\n"), "asks for os.system"),
    (b"\x80\x02}(X\x01\0\0\0w" + tensor() + b"X\x01\0\0\0w" + tensor() + b"u.", "one name twice"),
    (b"\x80\x02}", "exhausted"),
    (b"\x80\x02t.", "no mark"),
    (b"\x80\x02h\x05.", "nothing stored"),
    (b"\x80\x02]q\0.", "opcode EMPTY_LIST"),
    (state(b"K\x01"), "expected a dict of tensors"),
  ],
)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path, content, message):
  (tmp_path / "a.pt").write_bytes(archive_of(content))
  with pytest.raises(ValueError, match=rf"a\.pt.*({message})"):
    torch_archives.read(tmp_path / "a.pt")


def test_a_compressed_archive_is_not_inflated(tmp_path):
  (tmp_path / "a.pt").write_bytes(archive_of(state(tensor()), bytes(10**7), zipfile.ZIP_DEFLATED))
  with pytest.raises(ValueError, match=r"a\.pt.*compressed"):
    torch_archives.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
  ("name", "method"), [("a.weight.absmax", "bitsandbytes"), ("a.SCB", "bitsandbytes"), ("a.qweight", "GPTQ or AWQ")]
)
def test_quantized_weights_are_named_in_one_line(tmp_path, name, method):
  tensor_files.write(tmp_path / "model.safetensors", {"a.weight": np.ones(2, np.int8), name: np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=f"quantized by {method} .tensor {name}.*take the model in bfloat16") as caught:
    tensor_files.open_folder(tmp_path)
  assert "\n" not in str(caught.value)


def test_weights_of_another_format_are_named(tmp_path):
  (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
  with pytest.raises(ValueError, match=r"neither model.safetensors nor .*; model-Q4_K_M.gguf is of another format"):
    tensor_files.open_folder(tmp_path)
