"""When do understanding and generation gain from each other? Stages 2 and 3 on the harder small world, as a grid.

python -m benchmarks.mutual_gain --out=runs/mutual_gain --seeds=0,1,2        all cells, resumable
uae-jax train --config=configs/mutual_gain.py:third.one_pass --workdir=DIR --config.init.checkpoint=RUN:cold_start

The argument names a cell:
  base              embedders, VAE and captioner, once per seed
  DECODER           stage 0 for that many steps and stage 1, from the base: a starting point of `DECODERS`
  DECODER.TREATMENT one of `TREATMENTS`, from that starting point
  none.understanding stage 2 against a random decoder, from the base: a control
"""

from configs import rich_scenes

CAPTIONER, DECODER = "generation_for_understanding", "understanding_for_generation"
# Steps of stage 0: a third, two thirds and all of what configs/rich_scenes.py takes.
DECODERS = {"third": 1000, "two_thirds": 2000, "all": 3000}
RANDOM = "none"


def _rounds(count: int) -> dict:
  """Both stages in `count` rounds; the number of updates of each stage does not depend on it."""
  shares = {f"{CAPTIONER}.total_steps": 220 // count, f"{DECODER}.total_steps": 160 // count}
  return dict(stages=(CAPTIONER, DECODER), rounds=count, **shares)


TREATMENTS = {
  "understanding": dict(stages=(CAPTIONER,)),
  "generation": dict(stages=(DECODER,)),
  "one_pass": _rounds(1),
  "two_rounds": _rounds(2),
  "four_rounds": _rounds(4),
  # A control: what stage 3 gains if the captioner has nothing to do with it.
  # The temperature of sampled captions is back at its default: with those of the data, it must not be set.
  "true_captions": {
    "stages": (DECODER,),
    f"{DECODER}.options.captions": "dataset",
    f"{DECODER}.options.temperature": 0.7,
  },
}
CELLS = (
  "base",
  *DECODERS,
  *(f"{decoder}.{treatment}" for decoder in DECODERS for treatment in TREATMENTS),
  f"{RANDOM}.understanding",
)


def start_of(cell: str) -> tuple[str, str] | None:
  """(the cell that a cell starts from, its stage); None for the base."""
  if cell == "base":
    return None
  decoder, _, treatment = cell.partition(".")
  return (decoder, "cold_start") if treatment and decoder != RANDOM else ("base", "captioner")


def get_config(arg=None):
  cell = arg or "all.one_pass"
  if cell not in CELLS:
    raise ValueError(f"configs/mutual_gain.py:{cell}: expected one of {', '.join(CELLS)}")
  config = rich_scenes.get_config()
  # The cells are measured by the benchmark; these figures only show that a run learns.
  config.evaluation.update(num_images=96, num_noises=1, caption_every_steps=0)
  decoder, _, treatment = cell.partition(".")
  if cell == "base":
    config.stages = ("clip", "dinov2", "vae", "captioner")
  elif not treatment:
    config.stages = ("pretrain", "cold_start")
    config.pretrain.total_steps = DECODERS[decoder]
  else:
    config.update_from_flattened_dict(TREATMENTS[treatment])
  return config
