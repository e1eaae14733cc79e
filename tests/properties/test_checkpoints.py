"""States restore bit for bit on any mesh; truncated steps are set aside; a full disk is one error; the best remain."""

import re
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.truncate_files import truncate_files
from uae_jax import sharding
from uae_jax.algorithms import ema
from uae_jax.commands import command_line
from uae_jax.options import CheckpointOptions, OptimizerOptions, new_config, read_config
from uae_jax.training import inspection
from uae_jax.training.checkpoints import Checkpoints, SaveError
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.state import apply_gradients, create

CONFIG = {"seed": 0}


def optimizer():
  return make_optimizer(OptimizerOptions(learning_rate=0.1, schedule="constant", muon="matrix"), 10)


def fresh_state():
  """A state with everything that it can contain: both kinds of moments and both averages."""
  params = {"net": {"kernel": jnp.arange(2000.0), "matrix": jnp.eye(4, 8), "bias": jnp.zeros(3)}}
  is_trainable = re.compile("kernel|matrix").search
  return create(params, is_trainable, optimizer(), jax.random.key(0), has_ema=True, has_old=True, has_reference=True)


def advance(state, steps: int):
  for i in range(steps):
    grads = {"net": {"kernel": jnp.full(2000, 1.0 + i), "matrix": jnp.full((4, 8), 1.0 + i)}}
    state, _ = apply_gradients(state, grads, jnp.float32(1.0), optimizer())
  return state.replace(
    old=ema.update(state.old, state.trainable, jnp.float32(0.5)),
    reference=ema.update(state.reference, state.trainable, jnp.float32(0.25)),
  )


def assert_same(ours, theirs):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def two_steps(tmp_path):
  """(folder, state after step 2, state after step 4), both saved."""
  checkpoints = Checkpoints(tmp_path / "stage")
  second = advance(fresh_state(), 2)
  fourth = advance(second, 2)
  checkpoints.save(2, second, {"position": 2}, CONFIG)
  checkpoints.save(4, fourth, {"position": 4}, CONFIG)
  checkpoints.close()
  return tmp_path / "stage", second, fourth


def test_the_newest_state_comes_back_whole(two_steps):
  folder, _, fourth = two_steps
  state, data = Checkpoints(folder).restore(fresh_state())
  assert data == {"position": 4}
  assert_same(state, fourth)


@pytest.mark.parametrize("item", ["state", "data"])
def test_a_torn_step_is_set_aside_for_the_one_before(two_steps, item):
  folder, second, fourth = two_steps
  truncate_files(folder / "4" / item)
  checkpoints = Checkpoints(folder)
  state, data = checkpoints.restore(fresh_state())
  assert data == {"position": 2}
  assert_same(state, second)
  assert (folder / "4.damaged").exists()
  # The run reaches step 4 again.
  checkpoints.save(4, fourth, {"position": 4}, CONFIG)
  checkpoints.close()
  assert_same(Checkpoints(folder).restore(fresh_state())[0], fourth)


def largest_values(item):
  """The largest file with numbers of an item of a step."""
  return max((path for path in item.rglob("*") if path.parent.name == "d"), key=lambda path: path.stat().st_size)


def flip_values(file, count: int, seed: int):
  """Flips one bit at a time in the file that holds the numbers; yields after each flip and restores the file."""
  content, rng = file.read_bytes(), np.random.default_rng(seed)
  for _ in range(count):
    flipped = bytearray(content)
    flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
    file.write_bytes(flipped)
    yield
  file.write_bytes(content)


def test_flipped_bits_are_noticed_and_the_step_before_is_taken(two_steps):
  """Most flips leave a file that Orbax reads without complaint."""
  folder, second, fourth = two_steps
  values = largest_values(folder / "4" / "state")
  taken = []
  for _ in flip_values(values, 40, seed=0):
    state, data = Checkpoints(folder).restore(fresh_state())
    taken.append(data["position"])
    assert_same(state, second if data["position"] == 2 else fourth)
    if data["position"] == 2:
      (folder / "4.damaged").rename(folder / "4")
  # The other flips changed no number.
  assert taken.count(2) >= 35


def test_a_flipped_bit_in_a_result_is_noticed(two_steps):
  folder, _, fourth = two_steps
  checkpoints = Checkpoints(folder)
  checkpoints.save_final(4, fourth.params, CONFIG)
  for _ in flip_values(largest_values(folder / "4" / "params"), 1, seed=1):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fourth.params)
    assert checkpoints.restore_final(abstract) is None
    (folder / "4.damaged").rename(folder / "4")


def test_the_position_in_the_data_has_a_checksum(two_steps):
  folder, second, _ = two_steps
  file = next(
    path for path in (folder / "4" / "data").rglob("*") if path.is_file() and b"position" in path.read_bytes()
  )
  file.write_bytes(file.read_bytes().replace(b"4", b"5"))
  state, data = Checkpoints(folder).restore(fresh_state())
  assert data == {"position": 2}
  assert_same(state, second)


def test_a_state_that_is_not_finite_is_set_aside(two_steps, monkeypatch):
  """Such a state was saved by a version that did not look."""
  folder, second, fourth = two_steps
  checkpoints = Checkpoints(folder)
  inspect = inspection.inspect
  monkeypatch.setattr(inspection, "inspect", lambda tree: (inspect(tree)[0], True))
  bad = fourth.replace(trainable=jax.tree.map(lambda x: x * jnp.inf, fourth.trainable))
  checkpoints.save(6, bad, {"position": 6}, CONFIG)
  checkpoints.close()
  monkeypatch.undo()
  assert Checkpoints(folder).restore(fresh_state())[1] == {"position": 4}
  assert (folder / "6.damaged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_depends_on_every_bit_and_position_but_not_on_the_mesh(dtype):
  x = (jnp.arange(64) % 7).astype(dtype).reshape(8, 8)
  checksum = inspection.inspect([x])[0]
  mesh = sharding.make_mesh(fsdp=8)
  cut = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
  assert inspection.inspect([cut])[0] == checksum
  assert inspection.inspect([x.at[3, 4].set(x[3, 4] + 1 if dtype != "bool" else ~x[3, 4])])[0] != checksum
  assert inspection.inspect([x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])])[0] != checksum


def test_the_result_of_a_stage_replaces_its_last_state(two_steps):
  folder, _, fourth = two_steps
  checkpoints = Checkpoints(folder)
  checkpoints.save_final(4, fourth.params, CONFIG)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fourth.params)
  assert_same(Checkpoints(folder).restore_final(abstract), fourth.params)


def test_a_torn_result_is_set_aside_for_the_state_before(two_steps):
  folder, second, fourth = two_steps
  checkpoints = Checkpoints(folder)
  checkpoints.save_final(4, fourth.params, CONFIG)
  truncate_files(folder / "4" / "params")
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fourth.params)
  assert checkpoints.restore_final(abstract) is None
  assert_same(checkpoints.restore(fresh_state())[0], second)


def test_a_state_moves_to_another_mesh(tmp_path):
  def placed(state, **shape):
    mesh = sharding.make_mesh(**shape)
    cut, whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")), sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, cut if x.shape == (2000,) else whole), state)

  state = placed(advance(fresh_state(), 2), data=4, fsdp=2)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, state, {}, CONFIG)
  checkpoints.close()
  target = placed(fresh_state(), fsdp=4, tensor=2)
  restored, _ = Checkpoints(tmp_path).restore(target)
  assert_same(restored, state)
  for ours, theirs in zip(jax.tree.leaves(restored.opt_state), jax.tree.leaves(target.opt_state), strict=True):
    assert ours.sharding == theirs.sharding


@pytest.mark.parametrize("mode, best", [("max", 1), ("min", 3)])
def test_the_last_and_the_best_are_kept(tmp_path, mode, best):
  checkpoints = Checkpoints(tmp_path, CheckpointOptions(last=1, best=1, metric="reward", mode=mode))
  state = advance(fresh_state(), 1)
  for step, reward in enumerate((0.9, 0.2, 0.1, 0.3, 0.4), 1):
    checkpoints.save(step, state, {}, CONFIG, {"reward": jnp.float32(reward), "loss": 0.0})
  checkpoints.save_final(6, state.params, CONFIG)
  assert Checkpoints(tmp_path).steps() == [6, best]
  checkpoints.close()


def test_a_metric_that_is_not_logged_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"config\.checkpoints\.metric = 'reward': the stage logs only loss"):
    Checkpoints(tmp_path, CheckpointOptions(best=1, metric="reward")).save(
      1, advance(fresh_state(), 1), {}, CONFIG, {"loss": 0.0}
    )


@pytest.mark.parametrize("wrong, message", [({"last": 0}, r"last = 0"), ({"mode": "most"}, "mode = 'most'")])
def test_impossible_settings_name_their_field(wrong, message):
  config = new_config()
  config.checkpoints.update(wrong)
  with pytest.raises(ValueError, match=rf"config\.checkpoints\.{message}"):
    read_config(config)


def wait_until_still(folder):
  """Waits until nothing in a folder has changed for a second."""
  before, now = None, sorted(folder.rglob("*"))
  while before != now:
    time.sleep(1.0)
    before, now = now, sorted(folder.rglob("*"))


@pytest.mark.parametrize("kind", ["state", "final"])
def test_a_disk_that_takes_no_more_is_one_error_and_loses_nothing(tmp_path, kind):
  """A file size limit simulates a full disk: all writing code, native included, gets the corresponding errors."""
  checkpoints = Checkpoints(tmp_path)
  second = advance(fresh_state(), 2)
  fourth = advance(second, 2)
  checkpoints.save(2, second, {"position": 2}, CONFIG)
  checkpoints.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
  try:
    with pytest.raises(SaveError, match="could not be written .*steps on disk: 2. Make room") as caught:
      if kind == "final":
        checkpoints.save_final(4, fourth.params, CONFIG)
      else:
        checkpoints.save(4, fourth, {"position": 4}, CONFIG)
        checkpoints.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  # The message that the command prints.
  assert command_line.one_line(caught.value) == str(caught.value)
  # The same command succeeds once there is space. Its process has no threads that still write the failed save.
  wait_until_still(tmp_path)
  again = Checkpoints(tmp_path)
  state, data = again.restore(fresh_state())
  assert data == {"position": 2}
  assert_same(state, second)
  again.save(4, fourth, {"position": 4}, CONFIG)
  again.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
