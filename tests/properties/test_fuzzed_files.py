"""Mutated files of others: one error of the project that names the file, or they are read; in bounded time and memory.

10,000 mutations per format, each from its own seed, so a failure can be repeated: UAE_FUZZ=1000 runs fewer.
"""

from collections.abc import Callable
import copy
import json
import os
from pathlib import Path
import random
import re
import resource
import shutil
import time
import warnings

import jax
import numpy as np
import pytest
import torch

from tests.janus_folder import write_janus_folder
from tests.official_folder import write_official_folder
from tests.parity.test_processing_matches_transformers import write_qwen
from uae_jax import sharding
from uae_jax.data import processor_files
from uae_jax.data.janus_processing import JanusProcessor
from uae_jax.data.processing import Processor
from uae_jax.weights import janus_folder, tensor_files, torch_archives
from uae_jax.weights.official import Folders, Reader

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("UAE_FUZZ", "10000"))
MAX_SECONDS, MAX_GROWTH_BYTES = 10, 2**30
NUMBERS = (0, -1, 1, 2, 7, 255, 2**31, 2**63, 2**64, 10**9, 10**30, 1.5, -0.0, 1e308)
VALUES = (
  *NUMBERS,
  None,
  True,
  False,
  "",
  "a",
  "\u0000",
  "\ud800",
  "x" * 1000,
  [],
  {},
  [[]],
  [1, 2, 3],
  {"a": {"b": 1}},
)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
  """Flips, inserts, removes, repeats or replaces a few spans."""
  data = bytearray(content)
  for _ in range(rng.randint(1, 4)):
    place, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
    kind = rng.randrange(6)
    if kind == 0 and place < len(data):
      data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
      data[place:place] = rng.randbytes(size)
    elif kind == 2:
      del data[place : place + size]
    elif kind == 3:
      data[place:place] = data[place : place + size]
    elif kind == 4:
      data[place : place + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    else:
      del data[place:]
      data += b" "
  return bytes(data)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
  """Changes a few values or names anywhere in a JSON text; sometimes its bytes."""
  if rng.random() < 0.3:
    return mutate_bytes(content, rng)
  value = json.loads(content)
  for _ in range(rng.randint(1, 3)):
    node = value
    while isinstance(node, dict | list) and node:
      key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
      if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
        if isinstance(node, dict) and rng.random() < 0.2:
          del node[key]
        elif isinstance(node, dict) and rng.random() < 0.1:
          node[rng.choice(("a", "__metadata__", "auto_map"))] = copy.deepcopy(rng.choice(VALUES))
        else:
          node[key] = copy.deepcopy(rng.choice(VALUES))
        break
      node = node[key]
  return json.dumps(value).encode()


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
  """Mutates the header as JSON and writes its length again, or mutates bytes."""
  if rng.random() < 0.5:
    return mutate_bytes(content, rng)
  length = int.from_bytes(content[:8], "little")
  header = mutate_json(content[8 : 8 + length], rng)
  return len(header).to_bytes(8, "little") + header + content[8 + length :]


def mutate_archive(content: bytes, rng: random.Random) -> bytes:
  """Mutates bytes, mostly those of the pickle, which comes first."""
  size = 1500 if rng.random() < 0.8 else len(content)
  return mutate_bytes(content[:size], rng) + content[size:]


def fuzz(
  file: Path,
  mutate: Callable[[bytes, random.Random], bytes],
  read: Callable[[], object],
  folder: Path,
  *,
  least_refused: float = 0.1,
  count: int = COUNT,
) -> None:
  """Reads many mutations of one file.

  Args:
    file: the file, replaced in place.
    mutate: (content, rng) -> another content.
    read: reads the file; may raise ValueError.
    folder: every message names something in it.
    least_refused: least share of mutations that are refused; fewer would mean that the file is not looked at.
    count: number of mutations.
  """
  original, refused = file.read_bytes(), 0
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in range(count):
    file.write_bytes(mutate(original, random.Random(f"{file.name} {seed}")))
    start = time.process_time()
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read()
    except ValueError as error:
      refused += 1
      text = str(error)
      assert str(folder) in text and len(text) < 20_000, f"seed {seed}: {text[:500]}"
      assert not re.search(r"at 0x[0-9a-f]{8}|StopIteration|Traceback", text), f"seed {seed}: {text[:500]}"
    except BaseException as error:
      raise AssertionError(f"seed {seed} of {file.name}") from error
    assert time.process_time() - start < MAX_SECONDS, f"seed {seed}"
  file.write_bytes(original)
  read()
  growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
  assert growth < MAX_GROWTH_BYTES and refused >= count * least_refused, (growth, refused)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return write_official_folder(tmp_path_factory.mktemp("weights") / "uae")


@pytest.fixture
def folder(source, tmp_path):
  return Path(shutil.copytree(source, tmp_path / "uae"))


def read_all(tensors) -> None:
  for name in tensors:
    np.asarray(tensors[name]).sum(dtype=np.float64)


def test_safetensors(tmp_path):
  tensors = {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.int64), "c": np.float16(1)}
  tensor_files.write(tmp_path / "model.safetensors", tensors)
  with np.errstate(all="ignore"):
    fuzz(
      tmp_path / "model.safetensors", mutate_safetensors, lambda: read_all(tensor_files.open_folder(tmp_path)), tmp_path
    )


def test_indexes(tmp_path):
  for name in ("one", "two"):
    tensor_files.write(tmp_path / f"{name}.safetensors", {name: np.ones(2, np.float32)})
  index = tmp_path / "model.safetensors.index.json"
  places = {"one": "one.safetensors", "two": "two.safetensors"}
  index.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": places}))
  fuzz(index, mutate_json, lambda: tensor_files.open_folder(tmp_path), tmp_path)


def test_archives(tmp_path):
  tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16), "c": torch.nn.Parameter(torch.ones(2))}
  torch.save(torch.nn.Linear(3, 2).state_dict() | tensors, tmp_path / "a.pt")
  with np.errstate(all="ignore"):
    fuzz(tmp_path / "a.pt", mutate_archive, lambda: read_all(torch_archives.read(tmp_path / "a.pt")), tmp_path)


@pytest.mark.parametrize(
  "name",
  [
    "dit_lora/adapter_config.json",
    "llm_lora/adapter_config.json",
    "llm_model/config.json",
    "dit/config.json",
    "SD3/vae/config.json",
    "SD3/scheduler/scheduler_config.json",
    "llm_model/generation_config.json",
    "uae.json",
  ],
)
def test_configs(folder, name, monkeypatch):
  processor = Processor.from_folder(folder / "llm_model")
  monkeypatch.setattr(Processor, "from_folder", lambda *_: processor)

  def read():
    reader = Reader(Folders(folder))
    reader.check()
    reader.parts()
    reader.inference()
    reader.check()

  fuzz(folder / name, mutate_json, read, folder)


@pytest.mark.parametrize(
  "name",
  [
    *("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
    *("generation_config.json", "chat_template.json"),
  ],
)
def test_processors(tmp_path, name):
  write_qwen(tmp_path)
  images = json.loads((tmp_path / "preprocessor_config.json").read_text())
  contents = {
    "processor_config.json": {"image_processor": images, "processor_class": "Qwen2_5_VLProcessor"},
    "generation_config.json": {"eos_token_id": [1, 2], "repetition_penalty": 1.05, "top_k": 1, "top_p": 0.5},
  }
  if name in contents:
    (tmp_path / name).write_text(json.dumps(contents[name]))

  def read():
    processor = Processor.from_folder(tmp_path)
    processor.caption_prompt((processor.merge_size, processor.merge_size))
    processor_files.repetition_penalty(tmp_path)
    processor_files.kept_tokens(tmp_path)

  # Every other template is rendered in a process of its own.
  fuzz(tmp_path / name, mutate_json, read, tmp_path, count=COUNT // (50 if name == "chat_template.json" else 1))


@pytest.fixture(scope="module")
def janus_source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights") / "janus"
  write_janus_folder(folder)
  return folder


@pytest.mark.parametrize(
  "name", ["config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_janus_folders(janus_source, tmp_path, name, monkeypatch):
  """All but the tensors, which `test_safetensors` mutates."""
  folder = Path(shutil.copytree(janus_source, tmp_path / "janus"))
  monkeypatch.setattr(janus_folder, "stream", lambda *_: {})
  if not name.startswith(("processor", "tokenizer")):
    processor = JanusProcessor.from_folder(folder)
    monkeypatch.setattr(JanusProcessor, "from_folder", lambda *_: processor)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  fuzz(folder / name, mutate_json, lambda: janus_folder.load(folder, "float32", mesh), folder, count=COUNT // 10)


def test_indexes_of_archives(tmp_path):
  for name in ("one", "two"):
    torch.save({name: torch.ones(2)}, tmp_path / f"{name}.bin")
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": {"one": "one.bin", "two": "two.bin"}}))
  fuzz(index, mutate_json, lambda: tensor_files.open_archives(tmp_path, "pytorch_model"), tmp_path)
