"""Janus-Pro-7B, one network that reads and writes images, LoRA 32, on a TPU slice.

uae-jax plan  --config=configs/janus_pro_7b.py --topology=v5e:4x4
uae-jax train --config=configs/janus_pro_7b.py --workdir=/mnt/bucket/run --config.mesh.fsdp=16

Both directions train the same adapters of the language model: captions by `generation_for_understanding`, in which the
model without adapters generates the images, and images by `image_tokens`; with several rounds they alternate. Vision
tower, image tokenizer, aligners and heads are frozen. Weights, embedders and data are folders supplied by the user.

Everything that is not set here has its default from `uae_jax.options`. Sources of the numbers: Janus-Pro arXiv
2501.17811 and its inference code (guidance 5, temperature 1, 384 px); TRL 1.16 (GRPOConfig). No training of both
directions has been published: values without a source are marked "ours".
"""

from uae_jax.options import new_config

STAGES = ("generation_for_understanding", "image_tokens")
# Both directions in one step, instead of `STAGES`: --config.stages="('joint_tokens',)" --config.rounds=1
JOINT = "joint_tokens"


def get_config(arg=None):
  if arg not in (None, ""):
    raise ValueError(f"configs/janus_pro_7b.py:{arg}: there are no variants")
  config = new_config()
  config.model = "janus_pro_7b"
  config.dtype = "bfloat16"
  config.remat = "full"
  config.init.weights = "weights/Janus-Pro-7B"
  config.embedders.update(clip="weights/clip-vit-large-patch14", dinov2="weights/dinov2-large")
  config.lora.update(rank=32, alpha=64.0)
  config.mesh.fsdp = 16
  config.stages = STAGES
  config.rounds = 2
  config.data.update(source="jsonl:data/long_captions/{split}.jsonl", image_px=384, caption_tokens=256)
  for name in (*STAGES, JOINT):
    config[name].update(batch_size=16, log_every_steps=1, save_every_steps=10, total_steps=250)
    # Group size, clip range and temperature: TRL's defaults; learning rate: TRL's grpo_vlm.py for adapters; KL: ours.
    config[name].optimizer.update(
      learning_rate=1e-5, schedule="constant", warmup_percent=1.0, b2=0.999, weight_decay=0.0
    )
    config[name].objective.update(loss="grpo", beta=0.01)
    config[name].options.update(
      guidance=5.0, held_out_embedder="dinov2", max_new_tokens=256, decode_chunks=8, logit_chunks=8
    )
  config[JOINT].options.update(num_rollouts=4, images_per_caption=4)  # ours
  # What training has learned is used to generate as well.
  config.evaluation.update(num_images=128, batch_size=16, guidance=5.0, max_new_tokens=256, text_tower="policy")
  return config


def sweep(add):
  """Varies the group sizes of both directions and the weight of the KL."""
  for name in STAGES:
    for num_rollouts in (4, 16):
      add(**{f"{name}.options.num_rollouts": num_rollouts})
  add(**{f"{name}.objective.beta": 0.04 for name in STAGES})
