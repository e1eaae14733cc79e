"""The whole method on a laptop: every net from scratch on the small world, then all four stages of UAE.

uae-jax train --config=configs/scenes.py --workdir=runs/demo
uae-jax train --config=configs/scenes.py:smoke --workdir=runs/smoke      every stage in two minutes; learns nothing
"""

from ml_collections import ConfigDict


def optimizer(learning_rate, **changes):
  fields = dict(
    learning_rate=learning_rate,
    schedule="cosine",
    warmup_percent=5.0,
    end_factor=0.05,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
    spike_factor=0.0,
    muon="",
  )
  return ConfigDict(fields | changes)


def stage(
  total_steps,
  batch_size,
  learning_rate,
  *,
  captions,
  trainable,
  options,
  target_loss=0.0,
  ema_decay=0.0,
  **optimizer_changes,
):
  """What every stage has: how long, on what, what trains and how."""
  return ConfigDict(
    dict(
      total_steps=total_steps,
      target_loss=target_loss,  # ends the stage when the loss averages less; 0 never does
      batch_size=batch_size,
      captions=captions,
      trainable=trainable,
      ema_decay=ema_decay,
      num_microbatches=1,
      log_every_steps=10,
      save_every_steps=200,
      optimizer=optimizer(learning_rate, **optimizer_changes),
      options=ConfigDict(options),
    )
  )


def judge():
  """A reward by HTTP, which `("http", weight)` in a stage's reward_weights switches on; see docs/algorithms.md."""
  return ConfigDict(
    dict(
      url="",
      timeout_seconds=30.0,
      retries=3,
      backoff_seconds=0.5,
      max_concurrency=8,
      on_failure="drop",
      sends_images=True,
      token_variable="",
    )
  )


def get_config(arg=None):
  if arg not in (None, "", "smoke"):
    raise ValueError(f"configs/scenes.py:{arg}: the only variant is 'smoke'")
  config = ConfigDict()
  config.seed = 0
  config.model = "scenes"
  config.processor = ""  # folder of the processor; the small world builds its own
  config.dtype = "float32"  # of the nets; what trains is kept in float32 in any case
  config.remat = "none"  # or "full", "dots": what of a layer is computed again in the backward pass
  config.xla_flags = ""  # of the compiler, as in the environment's XLA_FLAGS
  # What the run starts from: a folder of weights, or a stage of another run ("runs/demo:cold_start").
  config.init = ConfigDict(dict(weights="", checkpoint=""))
  config.embedders = ConfigDict(dict(clip="fresh", dinov2="fresh"))  # "fresh", a folder of weights, or "" for none
  config.lora = ConfigDict(dict(rank=16, alpha=16.0))  # where the weights have no adapters yet
  config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
  config.profile = ConfigDict(dict(first_step=10, num_steps=0))  # traced steps of every stage, see docs/profiling.md
  config.max_skipped_in_a_row = 20  # updates that are not finite, before the run stops
  config.tensorboard = True  # event files beside metrics.jsonl
  # The newest states of a stage that stay on disk, and so many more of the best by a metric of its own.
  config.checkpoints = ConfigDict(dict(last=2, best=0, metric="loss", mode="min"))
  config.data = ConfigDict(
    dict(
      source="scenes",
      data_dir="",
      image_px=32,
      caption_tokens=26,
      max_bad_fraction=0.01,
      variant="plain",
    )
  )
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
  config.rounds = 1

  # Base nets: what CLIP, DINOv2, the SD3 vae and Qwen2.5-VL are to a real run.
  contrast = dict(noise_level=0.2)
  config.clip = stage(
    600, 32, 3e-3, captions="contrastive", trainable="^(embedders/clip|contrastive)/", options=contrast
  )
  config.dinov2 = stage(
    500, 32, 3e-3, captions="contrastive", trainable="^(embedders/dinov2|contrastive)/", options=contrast
  )
  config.vae = stage(
    1000,
    32,
    5e-3,
    captions="full",
    trainable="^vae/",
    options=dict(absolute_weight=0.1, kl_weight=2e-4),
  )
  config.captioner = stage(
    2000,
    32,
    3e-3,
    captions="partial",
    trainable="^captioner/(?!.*lora_)",
    options=dict(noise_level=6.0, text_only_weight=0.15),
  )
  # Stage 0.
  config.pretrain = stage(
    4000,
    32,
    5e-3,
    # Shapes are learned all at once, after 700 steps or 2000: it ends where they are, with a decoder that is good but
    # not finished, so that stage 3 has something to gain.
    target_loss=0.1,
    schedule="constant",
    # Long captions, as the paper has it: what a caption leaves out, or does not place, teaches to guess.
    captions="full",
    trainable="^(decoder|connector)/(?!.*lora_)",
    # More noise than the sampler's 3.0 asks for: what binds words to places is learned where little else is to be seen.
    options=dict(shift=6.0, context_dropout=0.0),
    muon="^decoder/(layers|last)/.*kernel$",
  )
  # Stage 1.
  config.cold_start = stage(
    60,
    32,
    3e-4,
    captions="full",
    # The captioner stays: its adapters would move the captions, while the text tower below is the one without them.
    trainable="^decoder/.*lora_|^connector/",
    options=dict(
      conditioning="text",
      text_tower="reference",
      captions="sampled",
      temperature=1.0,
      sampler_steps=4,
      gradient_steps=4,
      guidance=1.0,
      shift=3.0,
      flow_weight=1.0,
      encoder="clip",
    ),
  )
  # Stage 2: token GRPO.
  config.generation_for_understanding = stage(
    220,
    16,
    1.5e-3,
    captions="full",
    trainable="^captioner/.*lora_",
    options=dict(
      num_rollouts=8,
      max_new_tokens=26,
      temperature=1.0,
      conditioning="text",
      text_tower="reference",
      sampler_steps=5,
      guidance=1.0,
      shift=3.0,
      is_noise_shared=True,
      reward_weights=(("clip", 1.0),),
      held_out_embedder="dinov2",
      decode_chunks=1,
      logit_chunks=1,
    ),
  )
  config.generation_for_understanding.objective = ConfigDict(
    dict(
      loss="bnpo",
      clip_low=0.2,
      clip_high=0.2,
      beta=0.01,
      kl="k3",
      importance_level="token",
      entropy_bonus=0.0,
      top_entropy=1.0,
      truncation="train",
    )
  )
  config.generation_for_understanding.text_rewards = ConfigDict(dict(length_free_tokens=0, repetition_ngram=3))
  config.generation_for_understanding.http_reward = judge()
  config.generation_for_understanding.advantage = ConfigDict(dict(scale="group", eps=1e-2))
  config.generation_for_understanding.updates = ConfigDict(dict(num_epochs=1, num_minibatches=1, num_microbatches=1))
  # Stage 3: Flow-GRPO.
  config.understanding_for_generation = stage(
    160,
    24,
    3e-4,
    captions="full",
    trainable="^decoder/.*lora_",
    options=dict(
      num_rollouts=8,
      captions="sampled",
      max_new_tokens=26,
      temperature=1.0,
      conditioning="text",
      text_tower="reference",
      sampler="flow",
      sampler_steps=8,
      noise_level=0.7,
      shift=3.0,
      window=2,
      window_range=(0, 4),
      window_strategy="random",
      window_stride=1,
      window_hold=1,
      guidance=1.0,
      is_guided_in_training=True,
      is_noise_shared=True,
      noising_points=4,
      samples_from="current",
      old_decay=0.0,
      reward_weights=(("clip", 1.0),),
      held_out_embedder="dinov2",
      decode_chunks=1,
      replay_chunks=1,
    ),
  )
  config.understanding_for_generation.objective = ConfigDict(
    dict(loss="flow_grpo", clip_low=1e-3, clip_high=1e-3, beta=0.0)
  )
  config.understanding_for_generation.http_reward = judge()
  config.understanding_for_generation.advantage = ConfigDict(dict(scale="batch", eps=1e-3, is_unbiased=True, clip=3.0))
  config.understanding_for_generation.updates = ConfigDict(dict(num_epochs=1, num_minibatches=1, num_microbatches=1))

  config.evaluation = ConfigDict(
    dict(
      num_images=768,
      batch_size=64,
      num_noises=5,
      max_new_tokens=26,
      sampler_steps=8,
      guidance=1.0,
      shift=3.0,
      conditioning="text",
      text_tower="reference",
      embedders=("clip", "dinov2"),
      gallery_images=8,
      caption_every_steps=10,
    )
  )
  if arg == "smoke":
    shrink(config)
  return config


def shrink(config):
  """The smoke variant: every stage, two steps of each. Nearly all it does is to compile, so the compiler hurries."""
  config.xla_flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  for name in config.stages:
    config[name].total_steps = 2
    config[name].batch_size = 4
    config[name].log_every_steps = 1
  config.generation_for_understanding.options.num_rollouts = 2
  config.understanding_for_generation.options.num_rollouts = 2
  config.evaluation.num_images = 4
  config.evaluation.batch_size = 4
  config.evaluation.num_noises = 1
  config.evaluation.gallery_images = 2


def sweep(add):
  """Three seeds of the default run: the README's table."""
  for seed in range(3):
    add(seed=seed)
