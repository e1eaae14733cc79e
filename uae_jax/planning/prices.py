"""List prices of TPU chips: the only table of prices, for `uae-jax plan` and for the launchers.

Source: catalogs/v8/gcp/vms.csv at commit 8427bbf of skypilot-org/skypilot-catalog, which is made from Google's billing
catalog; read on 2026-11-28. Spot prices change every day and are in no table.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Price:
  """Price of a chip on demand.

  Attributes:
    usd: US dollars per chip-hour.
    region: where it applies; other regions differ.
    source: whose price it is, and of when.
  """

  usd: float
  region: str
  source: str = "SkyPilot's catalog, 2026-11-28"

  def __str__(self) -> str:
    return f"{self.usd:.2f} USD per chip-hour ({', '.join(filter(None, (self.region, self.source)))})"


# Generation -> price. The catalog has none of tpu7x.
PRICES = {
  "v4": Price(3.22, "us-central2"),
  "v5e": Price(1.20, "us-central1"),
  "v5p": Price(4.20, "us-east5"),
  "v6e": Price(2.70, "us-east5"),
  "tpu7x": Price(12.00, "us-central1", "one reader of Google's page, 2026-08; unconfirmed"),
}


def usd_per_1000_steps(step_seconds: float, num_chips: int, price: Price) -> float:
  """US dollars of 1000 steps on `num_chips` chips."""
  return 1000 * step_seconds * num_chips * price.usd / 3600
