"""The paper's system at full size: Qwen2.5-VL-3B and SD3.5-large, LoRA 32, on a TPU slice.

uae-jax plan  --config=configs/uae_3b_sd35l.py:512 --topology=v5e:4x4       does it fit, and what does a step cost
uae-jax train --config=configs/uae_3b_sd35l.py:512 --workdir=/mnt/bucket/run --config.mesh.fsdp=16
uae-jax train --config=configs/uae_3b_sd35l.py:1024 ...                     the resolution of the paper's inference

The argument is the side of the images in pixels. The mesh is that of v5e-16; another slice needs
--config.mesh.{data,fsdp,tensor}. Weights, embedders and data are the user's own folders, see `config.init`.

Where numbers come from: UAE arXiv 2509.09666 and its inference code; Flow-GRPO arXiv 2505.05470 and its SD3.5 configs;
TRL 1.10 (GRPOConfig, examples/scripts/grpo_vlm.py); SD3 arXiv 2403.03206. UAE's authors never published their training
code: what no source gives is marked "ours".
"""

from ml_collections import ConfigDict

IMAGE_PX = (512, 1024)


def optimizer(learning_rate, **changes):
  """AdamW as Flow-GRPO runs it on SD3.5: betas, decay, clip norm, no schedule. Warm-up: ours."""
  fields = dict(
    learning_rate=learning_rate,
    schedule="constant",
    warmup_percent=1.0,
    end_factor=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-4,
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
  trainable,
  options,
  num_microbatches=1,
  ema_decay=0.0,
  save_every_steps=10,  # adapters are small, and a step of RL may be longer than a notice
  **optimizer_changes,
):
  """What every stage has: how long, on what, what trains and how."""
  return ConfigDict(
    dict(
      total_steps=total_steps,
      target_loss=0.0,  # ends the stage when the loss averages less; 0 never does
      batch_size=batch_size,
      captions="full",
      trainable=trainable,
      ema_decay=ema_decay,
      num_microbatches=num_microbatches,
      log_every_steps=1,
      save_every_steps=save_every_steps,
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
  if arg not in (None, "", *map(str, IMAGE_PX)):
    raise ValueError(f"configs/uae_3b_sd35l.py:{arg}: expected one of {', '.join(map(str, IMAGE_PX))} (pixels)")
  image_px = int(arg or IMAGE_PX[0])
  config = ConfigDict()
  config.seed = 0
  config.model = "uae_3b_sd35_large"
  config.processor = ""  # of the weights
  config.dtype = "bfloat16"
  config.xla_flags = ""  # of the compiler, as in the environment's XLA_FLAGS
  config.remat = "full"  # layers are computed again in the backward pass
  config.init = ConfigDict(dict(weights="weights/UAE", checkpoint=""))
  config.embedders = ConfigDict(dict(clip="weights/clip-vit-large-patch14", dinov2="weights/dinov2-large"))
  # UAE, adapters of llm_lora and dit_lora: rank 32, alpha 64; the same in Flow-GRPO.
  config.lora = ConfigDict(dict(rank=32, alpha=64.0))
  config.mesh = ConfigDict(dict(data=1, fsdp=16, tensor=1))
  config.profile = ConfigDict(dict(first_step=10, num_steps=0))  # traced steps of every stage, see docs/profiling.md
  config.max_skipped_in_a_row = 20
  config.tensorboard = True
  config.checkpoints = ConfigDict(dict(last=2, best=0, metric="loss", mode="min"))
  config.data = ConfigDict(
    dict(
      source="jsonl:data/long_captions/{split}.jsonl",
      data_dir="",
      image_px=image_px,
      caption_tokens=512,  # UAE: captions of up to 512 new tokens
      max_bad_fraction=0.01,
      variant="plain",
    )
  )
  config.stages = ("pretrain", "cold_start", "generation_for_understanding", "understanding_for_generation")
  config.rounds = 1

  # Stage 0, rectified flow on long captions. UAE: decoder and connector train, 700k images; one pass. Rate, EMA and
  # context dropout: ours, a tenth of SD3's 1e-4 because the decoder is already trained.
  config.pretrain = stage(
    2734,
    256,
    1e-5,
    trainable="^(decoder|connector)/(?!.*lora_)",
    num_microbatches=16,  # one row a chip of v5e-16
    save_every_steps=100,
    options=dict(shift=3.0, context_dropout=0.1),
    weight_decay=0.01,
  )
  # Stage 1. UAE: 10 steps, guidance 5.0, answer conditioning, 1 - cos of CLIP through sampler, codec and encoder.
  # Steps, batch and rate: ours.
  config.cold_start = stage(
    500,
    16,
    1e-4,
    trainable="lora_|^connector/",
    options=dict(
      conditioning="answer",
      text_tower="policy",
      captions="dataset",
      temperature=1.0,
      sampler_steps=10,
      gradient_steps=10,
      guidance=5.0,
      shift=3.0,
      flow_weight=0.0,
      encoder="clip",
    ),
  )
  # Stage 2, token GRPO. UAE: clipped token ratio, CLIP reward. Group, clip, temperature: TRL's defaults; rate: TRL's
  # grpo_vlm.py for adapters; KL: PromptRL's for Qwen2.5-VL-3B with a flow decoder (G-U-N/UniRL).
  config.generation_for_understanding = stage(
    500,
    16,
    1e-5,
    trainable="^captioner/.*lora_",
    options=dict(
      num_rollouts=8,
      max_new_tokens=512,
      temperature=1.0,
      conditioning="text",
      text_tower="reference",
      sampler_steps=10,
      guidance=5.0,
      shift=3.0,
      is_noise_shared=True,
      reward_weights=(("clip", 1.0),),
      held_out_embedder="dinov2",
      decode_chunks=8,
      logit_chunks=8,
    ),
    weight_decay=0.0,
  )
  config.generation_for_understanding.objective = ConfigDict(
    dict(
      loss="grpo",
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
  config.generation_for_understanding.advantage = ConfigDict(dict(scale="group", eps=1e-4))
  config.generation_for_understanding.updates = ConfigDict(dict(num_epochs=1, num_minibatches=1, num_microbatches=1))
  # Stage 3, Flow-GRPO. Its SD3.5 configs: rate 3e-4, group 24, 10 steps, guidance 4.5, noise level 0.7, advantages over
  # the std of the batch and within +-5, EMA 0.9, and the initial noise shared where the reward is CLIP's; its Fast
  # variant: two SDE steps within the first half, KL off, clip 1e-5.
  config.understanding_for_generation = stage(
    500,
    16,
    3e-4,
    trainable="^decoder/.*lora_",
    ema_decay=0.9,
    options=dict(
      num_rollouts=24,
      captions="sampled",
      max_new_tokens=512,
      temperature=0.7,  # UAE's inference
      conditioning="text",
      text_tower="reference",
      sampler="flow",
      sampler_steps=10,
      noise_level=0.7,
      shift=3.0,
      window=2,
      window_range=(0, 5),
      window_strategy="random",
      window_stride=1,
      window_hold=1,
      guidance=4.5,
      is_guided_in_training=True,
      is_noise_shared=True,
      noising_points=4,
      samples_from="current",
      old_decay=0.0,
      reward_weights=(("clip", 1.0),),
      held_out_embedder="dinov2",
      decode_chunks=24,
      replay_chunks=12 if image_px == IMAGE_PX[0] else 24,  # 24 is one image of each group
    ),
  )
  config.understanding_for_generation.objective = ConfigDict(
    dict(loss="flow_grpo", clip_low=1e-5, clip_high=1e-5, beta=0.0)
  )
  config.understanding_for_generation.http_reward = judge()
  config.understanding_for_generation.advantage = ConfigDict(dict(scale="batch", eps=1e-4, is_unbiased=False, clip=5.0))
  config.understanding_for_generation.updates = ConfigDict(dict(num_epochs=1, num_minibatches=1, num_microbatches=1))

  # UAE: 40 Euler steps, guidance 5.0; the text tower is the one that training used.
  config.evaluation = ConfigDict(
    dict(
      num_images=128,
      batch_size=16,
      num_noises=1,
      max_new_tokens=512,
      sampler_steps=40,
      guidance=5.0,
      shift=3.0,
      conditioning="text",
      text_tower="reference",
      embedders=("clip", "dinov2"),
      gallery_images=8,
      caption_every_steps=50,
    )
  )
  return config


def sweep(add):
  """What published recipes disagree about: the group, and how sharp the two clips are."""
  for num_rollouts in (8, 16, 24):
    add(**{"generation_for_understanding.options.num_rollouts": num_rollouts})
  for clip in (1e-5, 1e-4):
    add(
      **{
        "understanding_for_generation.objective.clip_low": clip,
        "understanding_for_generation.objective.clip_high": clip,
      }
    )
