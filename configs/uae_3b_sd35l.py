"""The paper's system at full size: Qwen2.5-VL-3B and SD3.5-large, LoRA 32, on a TPU slice.

uae-jax plan  --config=configs/uae_3b_sd35l.py:512 --topology=v5e:4x4       does it fit, and what does a step cost
uae-jax train --config=configs/uae_3b_sd35l.py:512 --workdir=/mnt/bucket/run --config.mesh.fsdp=16
uae-jax train --config=configs/uae_3b_sd35l.py:1024 ...                     the resolution of the paper's inference

The argument is the side of the images in pixels. The mesh is that of v5e-16; another slice needs
--config.mesh.{data,fsdp,tensor}. Weights, embedders and data are the user's own folders, see `config.init`.

Everything that is not set here has the default of `uae_jax.options`. Sources of the numbers: UAE arXiv 2509.09666 and
its inference code; Flow-GRPO arXiv 2505.05470 and its SD3.5 configs; TRL 1.10 (GRPOConfig,
examples/scripts/grpo_vlm.py); SD3 arXiv 2403.03206. UAE's authors never published their training code: what no source
gives is marked "ours".
"""

from uae_jax.options import new_config

IMAGE_PX = (512, 1024)

# AdamW as Flow-GRPO runs it on SD3.5: betas, decay, clip norm, no schedule. Warmup: ours.
ADAMW = dict(schedule="constant", warmup_percent=1.0, b2=0.999, weight_decay=1e-4)


def get_config(arg=None):
  if arg not in (None, "", *map(str, IMAGE_PX)):
    raise ValueError(f"configs/uae_3b_sd35l.py:{arg}: expected one of {', '.join(map(str, IMAGE_PX))} (pixels)")
  image_px = int(arg or IMAGE_PX[0])
  config = new_config()
  config.model = "uae_3b_sd35_large"
  config.dtype = "bfloat16"
  config.remat = "full"
  config.init.weights = "weights/UAE"
  config.embedders.update(clip="weights/clip-vit-large-patch14", dinov2="weights/dinov2-large")
  # UAE, adapters of llm_lora and dit_lora: rank 32, alpha 64; the same in Flow-GRPO.
  config.lora.update(rank=32, alpha=64.0)
  config.mesh.fsdp = 16
  config.data.update(
    source="jsonl:data/long_captions/{split}.jsonl",
    image_px=image_px,
    caption_tokens=512,  # UAE: captions of up to 512 new tokens
  )
  # Adapters are small, and a step of RL may take longer than a preemption notice.
  for name in config.stages:
    config[name].update(batch_size=16, log_every_steps=1, save_every_steps=10, optimizer=ADAMW)

  # Stage 0, rectified flow on long captions. UAE: decoder and connector train, 700k images; one epoch. Rate and context
  # dropout: ours, a tenth of SD3's 1e-4 because the decoder is already trained.
  config.pretrain.update(
    total_steps=2734,
    batch_size=256,
    num_microbatches=16,  # one row per chip of v5e-16
    save_every_steps=100,
    optimizer=dict(learning_rate=1e-5, weight_decay=0.01),
    options=dict(context_dropout=0.1),
  )
  # Stage 1. UAE: 10 steps, guidance 5.0, answer conditioning, 1 - cos of CLIP through sampler, VAE and embedder, which
  # are the defaults. Steps, batch and rate: ours.
  config.cold_start.update(total_steps=500, optimizer=dict(learning_rate=1e-4))
  # Stage 2, token GRPO. UAE: clipped token ratio, CLIP reward. Group, clip, temperature: TRL's defaults; rate: TRL's
  # grpo_vlm.py for adapters; KL: PromptRL's for Qwen2.5-VL-3B with a flow decoder (G-U-N/UniRL).
  config.generation_for_understanding.update(
    total_steps=500,
    optimizer=dict(learning_rate=1e-5, weight_decay=0.0),
    options=dict(guidance=5.0, held_out_embedder="dinov2", decode_chunks=8, logit_chunks=8),
    objective=dict(loss="grpo", beta=0.01),
  )
  # Stage 3, Flow-GRPO. Its SD3.5 configs: rate 3e-4, group 24, 10 steps, guidance 4.5, noise level 0.7, advantages over
  # the std of the batch and within +-5, EMA 0.9, and the initial noise shared where the reward is CLIP's; its Fast
  # variant: two SDE steps within the first half, KL off, clip 1e-5. Temperature of captions: UAE's inference.
  config.understanding_for_generation.update(
    total_steps=500,
    ema_decay=0.9,
    optimizer=dict(learning_rate=3e-4),
    options=dict(
      guidance=4.5,
      held_out_embedder="dinov2",
      decode_chunks=24,
      replay_chunks=12 if image_px == IMAGE_PX[0] else 24,  # 24 is one image of each group
    ),
    objective=dict(clip_low=1e-5, clip_high=1e-5),
    advantage=dict(scale="batch", is_unbiased=False, clip=5.0),
  )
  # UAE: 40 Euler steps, guidance 5.0; the text tower is the one that training used.
  config.evaluation.update(num_images=128, batch_size=16, guidance=5.0)
  return config


def sweep(add):
  """What published recipes disagree about: the group, and the width of the two clip ranges."""
  for num_rollouts in (8, 16, 24):
    add(**{"generation_for_understanding.options.num_rollouts": num_rollouts})
  for clip in (1e-5, 1e-4):
    add(
      **{
        "understanding_for_generation.objective.clip_low": clip,
        "understanding_for_generation.objective.clip_high": clip,
      }
    )
