"""The example of a reward server answers the client of the external reward."""

from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from uae_jax.options import ExternalRewardOptions
from uae_jax.rewards.external import ExternalReward, RewardError

SERVER = Path(__file__).parents[2] / "examples" / "reward_server.py"


@pytest.fixture(scope="module")
def url():
  process = subprocess.Popen([sys.executable, SERVER, "--port", "0"], stdout=subprocess.PIPE, text=True)
  yield process.stdout.readline().split()[-1]
  process.terminate()
  process.communicate()


@pytest.mark.parametrize("metadata", [None, [{"count": 2}]])
def test_the_example_rewards_contrast_in_order(url, metadata, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  images = np.zeros((1, 2, 8, 8, 3), np.uint8)
  images[0, 1, :4] = 255
  originals = images[:, 0] if metadata is None else None
  found = ExternalReward(ExternalRewardOptions(url=url))([("a", "b")], originals, images, metadata)
  np.testing.assert_allclose(found, [[0, 1]], atol=1e-6)


def test_captions_alone_have_no_reward_in_the_example(url, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  reward = ExternalReward(ExternalRewardOptions(url=url, sends_images=False, on_failure="fail"))
  with pytest.raises(RewardError, match="2 of 2 rollouts have no external reward .*no finite numbers"):
    reward([("a", "b")], None, np.zeros((1, 2, 8, 8, 3), np.uint8))
