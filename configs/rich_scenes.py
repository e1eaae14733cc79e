"""A harder small world: 48 px, up to 6 objects, textures, and captions of up to 60 words in a grammar with synonyms.

uae-jax train --config=configs/rich_scenes.py --workdir=runs/rich
uae-jax train --config=configs/rich_scenes.py:smoke --workdir=runs/rich_smoke

The recipe is that of configs/scenes.py; only what the larger world needs differs. It takes about three times as long.
"""

from configs import scenes


def get_config(arg=None):
  if arg not in (None, "", "smoke"):
    raise ValueError(f"configs/rich_scenes.py:{arg}: the only variant is 'smoke'")
  config = scenes.get_config()
  config.model = "rich_scenes"
  config.data.update(image_px=48, variant="rich", caption_tokens=61)
  for name in ("generation_for_understanding", "understanding_for_generation"):
    config[name].options.max_new_tokens = 61
  config.evaluation.max_new_tokens = 61
  config.vae.total_steps = 1500
  # Muon learns shapes, sizes and textures in half the steps of AdamW. Pixel noise as strong as that of
  # configs/scenes.py would hide them.
  for name, steps in (("clip", 1000), ("dinov2", 800)):
    muon = dict(learning_rate=6e-3, muon="layers.*kernel$")
    config[name].update(total_steps=steps, optimizer=muon, options=dict(pixel_noise_std=0.1))
  # The captioner learns shapes, sizes and textures one after the other, from step 1700 to 3000 or so. The target loss
  # ends the stage between them, so that stage 2 can still improve it.
  config.captioner.update(
    total_steps=4000,
    target_loss=0.9,
    captions="mixed",
    optimizer=dict(learning_rate=6e-3, muon="^captioner/.*(layers|merger|patch_embed).*kernel$"),
  )
  # A share of this many steps, instead of a target loss: the quality of the decoder is part of the experiment of
  # configs/mutual_gain.py.
  config.pretrain.update(total_steps=3000, target_loss=0.0)
  if arg == "smoke":
    scenes.shrink(config)
  return config
