"""Mutated steps of a run: what is read is what was saved, or the step before it, or an error that names the folder."""

import logging
from pathlib import Path
import random
import shutil

import jax
import pytest

from tests.properties.test_checkpoints import CONFIG, advance, assert_same, fresh_state
from tests.properties.test_fuzzed_files import COUNT, fuzz, mutate_bytes, mutate_json
from uae_jax.training import restore
from uae_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

# A read takes 100 times as long as that of another file.
READS = COUNT // 10


def files_of(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


def mutate(content: bytes, rng: random.Random) -> bytes:
  """Mutates JSON as JSON, all else as bytes."""
  return mutate_json(content, rng) if content.startswith(b"{") else mutate_bytes(content, rng)


def test_states(tmp_path, caplog):
  """A run goes on from a whole state, whatever happened to a file of the newest one."""
  caplog.set_level(logging.CRITICAL)
  checkpoints = Checkpoints(tmp_path / "stage")
  second = advance(fresh_state(), 2)
  saved = {2: second, 4: advance(second, 2)}
  for step, state in saved.items():
    checkpoints.save(step, state, {"position": step}, CONFIG)
  checkpoints.close()
  names = [file.relative_to(tmp_path / "stage") for file in files_of(tmp_path / "stage" / "4")]
  abstract = fresh_state()
  taken = []
  for seed in range(READS):
    stage = Path(shutil.copytree(tmp_path / "stage", tmp_path / "copy"))
    rng = random.Random(f"states {seed}")
    file = stage / rng.choice(names)
    file.write_bytes(mutate(file.read_bytes(), rng))
    checkpoints = Checkpoints(stage)
    found = checkpoints.restore(abstract)
    checkpoints.close()
    assert found is not None, (seed, file)
    state, data = found
    assert_same(state, saved[data["position"]])
    taken.append(data["position"])
    shutil.rmtree(stage)
  assert 0.1 < taken.count(2) / READS < 1


def test_results(tmp_path):
  """Parameters of a finished stage are those that were saved, or an error."""
  params = advance(fresh_state(), 2).trainable
  checkpoints = Checkpoints(tmp_path / "stage")
  checkpoints.save_final(4, params, CONFIG)
  checkpoints.close()
  folder = tmp_path / "stage" / "4"
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
  files = [file for file in files_of(folder) if file.parts[len(folder.parts)] in ("params", "checksums")]

  def read():
    assert_same(restore.read_params([folder / "params"], abstract), params)

  for file in files:
    fuzz(file, mutate, read, tmp_path, least_refused=0, count=READS // len(files))
