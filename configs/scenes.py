"""The whole method on a laptop: trains every model from scratch on the small world, then runs all four stages of UAE.

uae-jax train --config=configs/scenes.py --workdir=runs/demo
uae-jax train --config=configs/scenes.py:smoke --workdir=runs/smoke      every stage, in a few minutes, without learning
uae-jax sweep --config=configs/scenes.py --workdir=runs/seeds            three seeds, as in the README's table

Everything that is not set here has its default from `uae_jax.options`.
"""

from uae_jax.options import new_config


def get_config(arg=None):
  if arg not in (None, "", "smoke"):
    raise ValueError(f"configs/scenes.py:{arg}: the only variant is 'smoke'")
  config = new_config()
  config.embedders.update(clip="fresh", dinov2="fresh")
  config.data.update(image_px=32, caption_tokens=26)
  config.stages = (
    "clip",
    "dinov2",
    "vae",
    "captioner",
    "pretrain",
    "cold_start",
    "generation_for_understanding",
    "understanding_for_generation",
  )

  # Base models: they replace the published CLIP, DINOv2, SD3 VAE and Qwen2.5-VL of a full-size run.
  config.clip.update(total_steps=600, optimizer=dict(learning_rate=3e-3))
  config.dinov2.update(total_steps=500, optimizer=dict(learning_rate=3e-3))
  config.vae.update(total_steps=1000, optimizer=dict(learning_rate=5e-3))
  config.captioner.update(total_steps=2000, captions="partial", optimizer=dict(learning_rate=3e-3))
  # Stage 0. The decoder learns shapes suddenly, after 700 to 2000 steps. The target loss ends the stage shortly after,
  # with a good but not fully trained decoder, so that stage 3 can still improve it.
  config.pretrain.update(
    total_steps=4000,
    target_loss=0.1,
    optimizer=dict(learning_rate=5e-3, schedule="constant", muon="^decoder/(layers|last)/.*kernel$"),
    # More noise than the sampler's shift of 3: the binding of words to positions is learned at high noise levels.
    options=dict(shift=6.0),
  )
  # Stage 1. The captioner is frozen: training its adapters would change captions but not the text tower, which runs
  # without adapters.
  config.cold_start.update(
    total_steps=60,
    trainable="^decoder/.*lora_|^connector/",
    optimizer=dict(learning_rate=3e-4),
    options=dict(
      conditioning="text",
      text_tower="reference",
      captions="sampled",
      sampler_steps=4,
      gradient_steps=4,
      guidance=1.0,
      flow_weight=1.0,
    ),
  )
  # Stage 2: token GRPO.
  config.generation_for_understanding.update(
    total_steps=220,
    batch_size=16,
    optimizer=dict(learning_rate=1.5e-3),
    options=dict(max_new_tokens=26, sampler_steps=5, held_out_embedder="dinov2"),
    objective=dict(loss="bnpo", beta=0.01),
    advantage=dict(eps=1e-2),
  )
  # Stage 3: Flow-GRPO.
  config.understanding_for_generation.update(
    total_steps=160,
    batch_size=24,
    optimizer=dict(learning_rate=8e-4),
    options=dict(
      num_rollouts=8,
      max_new_tokens=26,
      temperature=1.0,
      sampler_steps=8,
      window_range=(0, 4),
      held_out_embedder="dinov2",
    ),
    objective=dict(clip_low=1e-3, clip_high=1e-3),
    # A standard deviation over the batch is that of the few scenes whose images are wrong now and then, as long as the
    # decoder makes such mistakes: they would drown the others.
    advantage=dict(scale="group", eps=1e-3, clip=3.0),
  )
  config.evaluation.update(num_noises=5, max_new_tokens=26, sampler_steps=8, caption_every_steps=10)
  if arg == "smoke":
    shrink(config)
  return config


def shrink(config):
  """Applies the smoke variant: two steps per stage, with low compiler effort because compiling dominates."""
  config.xla_flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  for name in config.stages:
    config[name].update(total_steps=2, batch_size=4, log_every_steps=1)
  config.generation_for_understanding.options.num_rollouts = 2
  config.understanding_for_generation.options.num_rollouts = 2
  config.evaluation.update(num_images=4, batch_size=4, num_noises=1, gallery_images=2)


def sweep(add):
  """Runs the default config with three seeds, as in the README's table."""
  for seed in range(3):
    add(seed=seed)
