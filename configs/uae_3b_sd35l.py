"""The paper's system at full size: Qwen2.5-VL-3B and SD3.5-large, LoRA 32, on a TPU slice.

uae-jax plan  --config=configs/uae_3b_sd35l.py:512 --topology=v5e:4x4       does it fit, and what does a step cost?
uae-jax train --config=configs/uae_3b_sd35l.py:512 --workdir=/mnt/bucket/run --config.mesh.fsdp=16
uae-jax train --config=configs/uae_3b_sd35l.py:1024 ...                     the paper's inference resolution

The argument is the image side in pixels. The mesh fits v5e-16; for other slices set
--config.mesh.{data,fsdp,tensor}. Weights, embedders and data are folders supplied by the user, see `config.init`.

Everything that is not set here has its default from `uae_jax.options`. Sources of the numbers: UAE arXiv 2509.09666 and
its inference code; Flow-GRPO arXiv 2505.05470 and its SD3.5 configs; TRL 1.16 (GRPOConfig,
examples/scripts/grpo_vlm.py); SD3 arXiv 2403.03206. UAE's authors have not published their training code: values
without a source are marked "ours".
"""

from uae_jax.options import new_config

IMAGE_PX = (512, 1024)

# AdamW with the settings of Flow-GRPO on SD3.5: betas, weight decay, clip norm, constant rate. Warmup: ours.
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
  # UAE (adapters llm_lora and dit_lora) and Flow-GRPO: rank 32, alpha 64.
  config.lora.update(rank=32, alpha=64.0)
  config.mesh.fsdp = 16
  # Usual flags of TPU recipes for asynchronous collectives; nothing here has run on a TPU, so measure before use:
  # config.libtpu_init_args = (
  #   "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
  #   "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
  #   "--xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=65536"
  # )
  config.data.update(
    source="jsonl:data/long_captions/{split}.jsonl",
    image_px=image_px,
    caption_tokens=512,  # UAE: captions of up to 512 new tokens
  )
  # Saved often: adapters are small, and an RL step may take longer than the notice before a preemption.
  for name in config.stages:
    config[name].update(batch_size=16, log_every_steps=1, save_every_steps=10, optimizer=ADAMW)

  # Stage 0, rectified flow on long captions. UAE: decoder and connector are trained on 700k images; one epoch. Learning
  # rate and context dropout: ours; the rate is a tenth of SD3's 1e-4 because the decoder is already trained.
  config.pretrain.update(
    total_steps=2734,
    batch_size=256,
    num_microbatches=16,  # one row per chip of v5e-16
    save_every_steps=100,
    optimizer=dict(learning_rate=1e-5, weight_decay=0.01),
    options=dict(context_dropout=0.1),
  )
  # Stage 1. UAE: 10 sampler steps, guidance 5.0, answer conditioning, 1 - cos of CLIP through sampler, VAE and
  # embedder; these are the defaults. Training steps, batch and learning rate: ours.
  config.cold_start.update(total_steps=500, optimizer=dict(learning_rate=1e-4))
  # Stage 2, token GRPO. UAE: clipped token ratio, CLIP reward. Group size, clip range and temperature: TRL's defaults;
  # learning rate: TRL's grpo_vlm.py for adapters; KL weight: PromptRL for Qwen2.5-VL-3B with a flow decoder
  # (G-U-N/UniRL), there of k3 without the ratio that is TRL's default and ours.
  config.generation_for_understanding.update(
    total_steps=500,
    optimizer=dict(learning_rate=1e-5, weight_decay=0.0),
    options=dict(guidance=5.0, held_out_embedder="dinov2", decode_chunks=8, logit_chunks=8),
    objective=dict(loss="grpo", beta=0.01),
  )
  # Stage 3, Flow-GRPO. Its SD3.5 configs: learning rate 3e-4, group size 24, 10 sampler steps, guidance 4.5, noise
  # level 0.7, advantages divided by the std of the batch and clipped to +-5, EMA 0.9 every 8 optimizer steps, and a
  # shared initial noise with the CLIP reward; its Fast variant: two SDE steps within the first half, no KL, clip range
  # 1e-5. Caption temperature: UAE's inference code.
  config.understanding_for_generation.update(
    total_steps=500,
    ema_decay=0.9,
    ema_interval=8,
    optimizer=dict(learning_rate=3e-4),
    options=dict(
      guidance=4.5,
      held_out_embedder="dinov2",
      decode_chunks=24,
      replay_chunks=12 if image_px == IMAGE_PX[0] else 24,  # 24 chunks: one image of each group per chunk
    ),
    objective=dict(clip_low=1e-5, clip_high=1e-5),
    advantage=dict(scale="batch", is_unbiased=False, clip=5.0),
  )
  # UAE: 40 Euler steps, guidance 5.0; the text tower is that of training.
  config.evaluation.update(num_images=128, batch_size=16, guidance=5.0)
  return config


def sweep(add):
  """Varies what published recipes disagree on: the group size and the width of both clip ranges."""
  for num_rollouts in (8, 16, 24):
    add(**{"generation_for_understanding.options.num_rollouts": num_rollouts})
  for clip in (1e-5, 1e-4):
    add(
      **{
        "understanding_for_generation.objective.clip_low": clip,
        "understanding_for_generation.objective.clip_high": clip,
      }
    )
