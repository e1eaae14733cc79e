"""A hundred thousand captions of the variant "rich" are read exactly."""

import pytest

from tests.properties.test_paraphrases import assert_round_trip

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("start", range(0, 100_000, 10_000))
def test_scenes_round_trip(start):
  assert_round_trip(start, 10_000)
