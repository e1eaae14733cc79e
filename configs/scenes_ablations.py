"""Ablations on the small world: the RL stages, starting from a finished run of `configs/scenes.py`.

uae-jax sweep --config=configs/scenes.py --workdir=runs/seeds                   the base runs, with three seeds
uae-jax sweep --config=configs/scenes_ablations.py --workdir=runs/ablations --config-points --grid=config.seed=0,1,2
python -m benchmarks.ablations runs/ablations                                   the tables of docs/ablations.md
uae-jax train --config=configs/scenes_ablations.py:gspo --workdir=DIR --config.init.checkpoint=RUN:cold_start

The argument is the name of a row in `ROWS`, which lists its changes to the default. A row starts from the checkpoint
of its `start` stage and runs its own `stages`.
"""

from configs import scenes

BASE = "runs/seeds"
CAPTIONER, DECODER = "generation_for_understanding", "understanding_for_generation"


def captioner(objective=None, **options):
  """A row of stage 2, from the cold start."""
  changes = {f"{CAPTIONER}.options.{name}": value for name, value in options.items()}
  if objective is not None:
    changes |= {f"{CAPTIONER}.objective.{name}": value for name, value in objective.items()}
    # With one update per rollout every ratio is 1, and the objectives differ only in their normalizer.
    changes[f"{CAPTIONER}.updates.num_minibatches"] = 2
  return dict(start="cold_start", stages=(CAPTIONER,), changes=changes)


def decoder(objective=None, **options):
  """A row of stage 3, from stage 2."""
  changes = {f"{DECODER}.options.{name}": value for name, value in options.items()}
  if objective is not None:
    changes |= {f"{DECODER}.objective.{name}": value for name, value in objective.items()}
  return dict(start=CAPTIONER, stages=(DECODER,), changes=changes)


FORWARD = dict(sampler="ode", is_noise_shared=False)

ROWS = {
  # Stage 2: objective, all with two updates per rollout.
  "bnpo": captioner(dict(loss="bnpo")),
  "grpo": captioner(dict(loss="grpo")),
  "dr_grpo": captioner(dict(loss="dr_grpo")),
  "dapo": captioner(dict(loss="dapo", clip_high=0.28, beta=0.0, truncation="mask")),
  "cispo": captioner(dict(loss="cispo")),
  "gspo": captioner(dict(loss="grpo", importance_level="sequence", clip_low=3e-4, clip_high=4e-4)),
  # Stage 2: group, conditioning, reward, noise, length. "default" is stage 2 of configs/scenes.py.
  "default": captioner(),
  "group_4": captioner(num_rollouts=4),
  "group_16": captioner(num_rollouts=16),
  "answer": dict(
    start="pretrain",
    stages=("cold_start", CAPTIONER),
    changes={
      "cold_start.options.conditioning": "answer",
      f"{CAPTIONER}.options.conditioning": "answer",
      "evaluation.conditioning": "answer",
    },
  ),
  # The decoder was pre-trained on text conditioning: here all of its weights adapt to answers, for 600 steps instead
  # of 60 steps of adapters.
  "answer_long": dict(
    start="pretrain",
    stages=("cold_start", CAPTIONER),
    changes={
      "cold_start.options.conditioning": "answer",
      "cold_start.total_steps": 600,
      "cold_start.trainable": "^(decoder|connector)/(?!.*lora_)",
      f"{CAPTIONER}.options.conditioning": "answer",
      "evaluation.conditioning": "answer",
    },
  ),
  "own_noise": captioner(is_noise_shared=False),
  "two_rewards": captioner(reward_weights=(("clip", 0.5), ("dinov2", 0.5)), held_out_embedder=""),
  "length_price": captioner(reward_weights=(("clip", 1.0), ("length", 0.2))),
  # Does caption growth depend on a decoder that was trained on long captions, as in "default"?
  "short_captions": dict(
    start="captioner",
    stages=("pretrain", "cold_start", CAPTIONER),
    changes={"pretrain.captions": "partial", "cold_start.captions": "partial"},
  ),
  # Stage 3: sampler and objective. "flow" is stage 3 of configs/scenes.py.
  "flow": decoder(),
  "cps": decoder(sampler="cps", noise_level=0.8),
  "dance": decoder(sampler="dance", noise_level=0.3),
  "guard": decoder(dict(ratio="guard", clip_low=2e-6, clip_high=2e-6, step_weight="inverse_dt")),
  "fixed_window": decoder(window_strategy="fixed"),
  "images_16": decoder(num_rollouts=16),
  "nft": decoder(dict(loss="nft"), **FORWARD, samples_from="old", old_decay=0.5),
  "awm": decoder(dict(loss="awm", average_beta=1.0), **FORWARD, old_decay=0.3),
  # Co-evolution: one pass vs. two rounds of half the length.
  "one_pass": dict(start="cold_start", stages=(CAPTIONER, DECODER), changes={}),
  "two_rounds": dict(
    start="cold_start",
    stages=(CAPTIONER, DECODER),
    changes={"rounds": 2, f"{CAPTIONER}.total_steps": 110, f"{DECODER}.total_steps": 80},
  ),
}


def get_config(arg=None):
  row = arg or "default"
  if row not in ROWS:
    raise ValueError(f"configs/scenes_ablations.py:{row}: expected one of {', '.join(ROWS)}")
  config = scenes.get_config()
  config.stages = ROWS[row]["stages"]
  # A quarter of the scenes of the full evaluation and a single noise, since rows are only compared with each other.
  config.evaluation.update(num_images=192, num_noises=1, caption_every_steps=20)
  config.update_from_flattened_dict(ROWS[row]["changes"])
  return config


def sweep(add):
  """Runs every row from the base run of its seed, which `--grid=config.seed=...` sets."""
  for name, row in ROWS.items():
    checkpoint = f"{BASE}/seed-{{seed}}:{row['start']}"
    add(name, stages=row["stages"], **{"seed": 0, "init.checkpoint": checkpoint}, **row["changes"])
