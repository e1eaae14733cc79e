"""A captioner's processor without files, for tests that need no chat template."""

from uae_jax.data.processing import Processor


def processor_of(tokenizer) -> Processor:
  """A processor of images whose sides are multiples of 8."""
  sizes = dict(patch_size=4, merge_size=2, min_pixels=8**2, max_pixels=64**2, resample=3)
  return Processor(
    tokenizer, "", **sizes, pad_id=tokenizer.pad_token_id, end_ids=(tokenizer.eos_token_id, tokenizer.pad_token_id)
  )
