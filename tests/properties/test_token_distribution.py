"""Captions contain text only, and truncation keeps the tokens that transformers and a loop keep, and no others."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.processors import processor_of
from uae_jax.models.prompts import Prompts
from uae_jax.rollouts import captions
from uae_jax.rollouts.token_distribution import REMOVED, kept_tokens, pack, remove, unpack

TRUNCATIONS = [
  dict(),
  dict(top_k=3),
  dict(top_k=1000),
  dict(top_p=0.8),
  dict(top_p=1e-6),
  dict(min_p=0.2),
  dict(min_p=1.0),
  dict(top_k=7, top_p=0.6),
  dict(top_k=9, top_p=0.95, min_p=0.3),
]
IDS = [",".join(f"{name}={value}" for name, value in options.items()) or "off" for options in TRUNCATIONS]


def scores_of(rows=6, vocabulary=19):
  return 2 * np.random.default_rng(0).normal(size=(rows, vocabulary))


def by_hand(scores, top_k=0, top_p=1.0, min_p=0.0):
  """The kept tokens of one row, taken one after the other from the most likely one."""
  order = [int(i) for i in np.argsort(-scores)]
  if top_k:
    order = order[:top_k]
  probabilities = {i: np.exp(scores[i]) / sum(np.exp(scores[j]) for j in order) for i in order}
  kept, total = [], 0.0
  for i in order:
    if total >= top_p:
      break
    kept.append(i)
    total += probabilities[i]
  best = probabilities[order[0]]
  return {i for i in kept if probabilities[i] >= min_p * best}


@pytest.mark.parametrize("options", TRUNCATIONS, ids=IDS)
def test_kept_tokens_equal_the_loop_and_transformers(options):
  from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

  scores = scores_of()
  with jax.enable_x64(True):
    is_kept = np.asarray(kept_tokens(jnp.asarray(scores), **options))
  assert [set(np.flatnonzero(row)) for row in is_kept] == [by_hand(row, **options) for row in scores]
  theirs = torch.tensor(scores)
  for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
    if name in options:
      theirs = warper(options[name])(None, theirs)
  np.testing.assert_array_equal(is_kept, torch.isfinite(theirs).numpy())
  ours = np.where(is_kept, scores, -np.inf)
  ours = np.exp(ours) / np.exp(ours).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(jax.nn.softmax(remove(jnp.float32(scores), is_kept)), ours, atol=1e-6)
  np.testing.assert_allclose(torch.softmax(theirs, -1).numpy(), ours, atol=1e-12)


def test_equally_likely_tokens_are_kept_together():
  scores = jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
  for options in (dict(top_k=1), dict(top_p=0.1), dict(min_p=1.0)):
    assert kept_tokens(scores, **options).tolist() == [[True, True, True, False]]


def test_removed_tokens_stay_removed_and_have_no_gradient():
  """They must not come back through a later truncation, nor make an entropy or its gradient NaN."""
  scores = remove(jnp.asarray(scores_of(2), jnp.float32), jnp.arange(19) >= 2)
  assert not kept_tokens(scores, top_k=18, top_p=0.99999)[:, :2].any()

  def entropy(x):
    log_p = jax.nn.log_softmax(remove(x, scores > REMOVED / 2))
    return -jnp.sum(jnp.exp(log_p) * log_p)

  value, gradient = jax.value_and_grad(entropy)(scores)
  assert np.isfinite(value) and np.all(np.asarray(gradient)[:, :2] == 0) and np.any(gradient != 0)


@pytest.mark.parametrize("vocabulary", [16, 19])
def test_sets_survive_packing(vocabulary):
  is_kept = np.random.default_rng(1).uniform(size=(2, 3, vocabulary)) < 0.5
  packed = pack(jnp.asarray(is_kept))
  assert packed.shape == (2, 3, -(-vocabulary // 8)) and packed.dtype == jnp.uint8
  np.testing.assert_array_equal(unpack(packed, vocabulary), is_kept)


# Tokens that Qwen2.5-VL adds to its vocabulary: name -> whether the tokenizer calls it special.
ADDED = {
  "<|endoftext|>": True,
  "<|im_start|>": True,
  "<|im_end|>": True,
  "<|vision_start|>": True,
  "<|image_pad|>": True,
  "<tool_call>": False,
  "<|fim_prefix|>": False,
}


def qwen_like_processor(*letters: str):
  """A processor with two words, ids 0 and 1, before the added tokens, as Qwen2.5-VL's vocabulary is ordered.

  Args:
    *letters: further added tokens, such as DeepSeek's tokenizers have.
  """
  from tokenizers import AddedToken, Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.WordLevel({"red": 0, "cat": 1}, unk_token="red"))
  tokenizer.add_tokens([AddedToken(name, special=is_special) for name, is_special in ADDED.items()])
  tokenizer.add_tokens(list(letters))
  # `special` of an added token is kept only by `add_special_tokens`.
  tokenizer.add_special_tokens([AddedToken(name, special=True) for name, is_special in ADDED.items() if is_special])
  return processor_of(
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
  )


def prompts_of(processor) -> Prompts:
  nothing = np.zeros(0, np.int32)
  return Prompts(
    nothing,
    nothing,
    nothing,
    nothing,
    (1, 1),
    processor.pad_id,
    processor.end_ids,
    processor.control_ids,
    processor.vocab_size,
  )


def test_captions_are_made_of_words_and_closing_tokens():
  processor = qwen_like_processor()
  assert not set(processor.tokenizer.convert_tokens_to_ids(["<tool_call>", "<|fim_prefix|>"])) & set(
    processor.tokenizer.all_special_ids
  )
  # Two ids of the model are larger than the tokenizer's.
  is_sampled = prompts_of(processor).vocabulary(len(processor.tokenizer) + 2)
  names = processor.tokenizer.convert_ids_to_tokens([int(i) for i in np.flatnonzero(is_sampled)])
  assert names == ["red", "cat", "<|endoftext|>", "<|im_end|>"] and len(is_sampled) == 11


def test_control_tokens_that_are_not_special_are_text_in_a_text():
  processor = qwen_like_processor("\u00fc")
  letter = processor.tokenizer.convert_tokens_to_ids("\u00fc")
  assert prompts_of(processor).vocabulary(len(processor.tokenizer))[letter]
  assert processor.encode("\u00fc<tool_call>\u00fc<|fim_prefix|>").count(letter) == 2
  assert set(processor.encode("\u00fc<tool_call>\u00fc<|fim_prefix|>")).isdisjoint(processor.control_ids)


class Constant:
  """A captioner that always predicts the same logits, largest for tokens that are not text."""

  vocab_size = 11

  def __init__(self, logits):
    self.table = jnp.asarray(logits, jnp.float32)

  def for_decoding(self):
    return self

  def logits(self, hidden):
    return jnp.broadcast_to(self.table, (*hidden.shape[:-1], self.vocab_size))

  def init_suffix(self, *sizes):
    return jnp.zeros(())

  def embed(self, tokens):
    return jnp.zeros((*tokens.shape, 1))

  def continuation_positions(self, *arguments):
    return None

  def extend(self, embeddings, positions, prefix, suffix=None, start=0):
    return embeddings, suffix


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=1.5), dict(temperature=3.0, top_k=3)])
def test_the_sampler_never_draws_other_tokens_and_its_log_probs_are_renormalized(options):
  prompts = prompts_of(qwen_like_processor())
  is_sampled = prompts.vocabulary(11)
  logits = np.where(is_sampled, np.arange(11) / 10, 20.0)
  cache = types.SimpleNamespace(dtype=jnp.float32)
  prefix = captions.Prefix(cache, jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))
  model = Constant(logits)
  sampled = captions.sample_captions(model, prompts, prefix, jax.random.key(0), num_rollouts=8, max_tokens=6, **options)
  tokens, mask = np.asarray(sampled.tokens), np.asarray(sampled.mask)
  assert is_sampled[tokens].all() and sampled.is_closed.any()
  temperature = options["temperature"] or 1.0
  kept = sorted(np.flatnonzero(is_sampled), key=lambda i: -logits[i])[: options.get("top_k") or 11]
  log_p = {int(i): logits[i] / temperature - np.log(sum(np.exp(logits[j] / temperature) for j in kept)) for i in kept}
  expected = np.vectorize(lambda i: log_p[int(i)])(tokens[mask])
  np.testing.assert_allclose(np.asarray(sampled.log_probs)[mask], expected, atol=1e-6)
  if options["temperature"]:
    assert len(set(tokens[mask])) == len(kept)
    replayed, _ = captions.token_log_probs(
      model, jnp.zeros((2, 8, 6, 1)), sampled.tokens, temperature=temperature, vocabulary=np.isin(np.arange(11), kept)
    )
    np.testing.assert_array_equal(np.asarray(replayed)[mask], np.asarray(sampled.log_probs)[mask])
