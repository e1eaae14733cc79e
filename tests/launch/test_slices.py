"""The table of slices agrees with itself, with the chips of the planner, and with the names of Google Cloud."""

import pytest

from launch import slices
from uae_jax.planning import topology
from uae_jax.planning.chips import CHIPS

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
  ("text", "topology", "accelerator_type", "machine", "num_hosts"),
  [
    ("v5e:4x4", "4x4", "v5litepod-16", "ct5lp-hightpu-4t", 4),
    ("v5litepod-8", "2x4", "v5litepod-8", "ct5lp-hightpu-8t", 1),
    ("v5e-1", "1x1", "v5litepod-1", "ct5lp-hightpu-1t", 1),
    ("v6e-256", "16x16", "v6e-256", "ct6e-standard-4t", 64),
    ("v5p-8", "2x2x1", "v5p-8", "ct5p-hightpu-4t", 1),
    ("v5p:4x4x8", "4x4x8", "v5p-256", "ct5p-hightpu-4t", 32),
    ("v4-16", "2x2x2", "v4-16", "ct4p-hightpu-4t", 2),
    ("tpu7x:1x1x1", "1x1x1", "tpu7x-2", "tpu7x-standard-1t", 1),
    ("tpu7x-128", "4x4x4", "tpu7x-128", "tpu7x-standard-4t", 16),
  ],
)
def test_a_slice_has_googles_names(text, topology, accelerator_type, machine, num_hosts):
  found = slices.parse(text)
  assert (found.topology, found.accelerator_type) == (topology, accelerator_type)
  assert (found.machine_type, found.num_hosts) == (machine, num_hosts)
  assert slices.parse(str(found)) == found


def test_every_generation_is_a_chip_of_the_planner_and_has_a_price_with_its_source():
  assert set(slices.GENERATIONS) == set(CHIPS)
  for generation in slices.GENERATIONS.values():
    assert generation.price.usd > 0 and generation.price.source and generation.price.region
  assert "about 38.40 USD per hour (1.20 per chip in us-central1; SkyPilot's catalog, 2026-11-28)" in slices.parse(
    "v5e:4x4"
  ).cost(2)


def test_the_default_shape_is_the_most_cubic_one():
  assert slices.parse("v5p-512").topology == "4x8x8"
  assert not slices.parse("v5p:4x4x16").is_default_shape
  for generation in slices.GENERATIONS.values():
    for chips in range(1, 1025):
      for shape in generation.shapes(chips):
        assert slices.Slice(generation, shape).num_chips == chips


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v5e:3x3", "v5e does not come in this size, but in v5e:1x1, v5e:2x2"),
    ("v5p-9", "v5p does not come in this size, but in v5p:2x2x1"),
    ("tpu7:4x4x4", "unknown slice 'tpu7:4x4x4', did you mean tpu7x?"),
    ("16", "expected GENERATION:SHAPE such as v5e:4x4"),
  ],
)
def test_an_unknown_slice_is_an_error_that_names_known_ones(text, message):
  with pytest.raises(ValueError) as error:
    slices.parse(text)
  assert message in str(error.value)


def test_plans_and_launchers_give_slices_the_same_names():
  for name, topology_name in topology.CLOUD_NAMES.items():
    assert str(slices.parse(name)) == topology_name and topology.parse(str(slices.parse(name)))[1] == topology_name
