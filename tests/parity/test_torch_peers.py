"""The benchmark's own PyTorch modules, which stand in for diffusers and PEFT, compute the same as these."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
import pytest
import torch

from benchmarks.torch_peers import autoencoder, decoder, lora, mmdit

DECODER = dict(
  sample_size=32,
  patch_size=2,
  in_channels=16,
  out_channels=16,
  num_layers=3,
  attention_head_dim=16,
  num_attention_heads=2,
  joint_attention_dim=24,
  caption_projection_dim=32,
  pooled_projection_dim=20,
  pos_embed_max_size=12,
  qk_norm="rms_norm",
  dual_attention_layers=(),
)
VAE = dict(
  in_channels=3,
  out_channels=3,
  down_block_types=["DownEncoderBlock2D"] * 3,
  up_block_types=["UpDecoderBlock2D"] * 3,
  block_out_channels=[8, 16, 16],
  layers_per_block=2,
  latent_channels=4,
  norm_num_groups=4,
  use_quant_conv=False,
  use_post_quant_conv=False,
  mid_block_add_attention=True,
)


def velocity(model, rows=2):
  torch.manual_seed(1)
  return model(
    hidden_states=torch.randn(rows, 16, 12, 8),
    timestep=torch.linspace(100, 900, rows),
    encoder_hidden_states=torch.randn(rows, 5, 24),
    pooled_projections=torch.randn(rows, 20),
    return_dict=False,
  )[0]


@pytest.mark.parametrize("duals", [(), (0,)])
def test_the_decoder(duals):
  theirs = SD3Transformer2DModel.from_config(DECODER | {"dual_attention_layers": duals})
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
  ours = mmdit.SD3Transformer.from_config(DECODER | {"dual_attention_layers": duals})
  torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)
  ours.load_state_dict(theirs.state_dict())
  torch.testing.assert_close(velocity(ours), velocity(theirs))
  ours.enable_gradient_checkpointing()
  velocity(theirs).square().sum().backward()
  velocity(ours).square().sum().backward()
  name = "transformer_blocks.0.attn.to_q.weight"
  torch.testing.assert_close(ours.get_parameter(name).grad, theirs.get_parameter(name).grad)


def test_the_vae():
  theirs, ours = AutoencoderKL.from_config(VAE), autoencoder.Autoencoder.from_config(VAE)
  ours.load_state_dict(theirs.state_dict())
  images = torch.randn(2, 3, 32, 32)
  with torch.no_grad():
    latents = theirs.encode(images).latent_dist.mode()
    torch.testing.assert_close(ours.encode(images).latent_dist.mode(), latents)
    torch.testing.assert_close(ours.decode(latents)[0], theirs.decode(latents, return_dict=False)[0])


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_schedule(steps):
  scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
  scheduler.set_timesteps(steps)
  nets = type("Nets", (), {"device": torch.device("cpu")})
  levels, timesteps = decoder.schedule(nets, steps)
  torch.testing.assert_close(torch.tensor(levels), scheduler.sigmas)
  torch.testing.assert_close(timesteps, scheduler.timesteps)


def test_adapters(tmp_path):
  """Read from PEFT's folder, on a linear layer and on a patch convolution; on, off and merged."""
  targets = ["to_q", "pos_embed.proj"]
  base = SD3Transformer2DModel.from_config(DECODER)
  torch.nn.init.normal_(base.proj_out.weight)
  ours = mmdit.SD3Transformer.from_config(DECODER)
  ours.load_state_dict(base.state_dict())
  theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False))
  theirs.save_pretrained(tmp_path)
  policy = lora.Policy.from_pretrained(ours, tmp_path)
  on = velocity(theirs).detach()
  torch.testing.assert_close(velocity(policy), on)
  with theirs.disable_adapter(), policy.disable_adapter():
    off = velocity(theirs)
    torch.testing.assert_close(velocity(policy), off)
  assert (on - off).abs().max() > 1e-3
  policy.merge_adapter()
  torch.testing.assert_close(velocity(policy), on, atol=1e-4, rtol=1e-4)
  policy.unmerge_adapter()
  torch.testing.assert_close(velocity(policy), on, atol=1e-4, rtol=1e-4)
  assert len(list(policy.adapters())) == DECODER["num_layers"] + 1
