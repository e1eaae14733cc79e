"""Options of the policy-gradient objectives; their formulas are in `algorithms`."""

import dataclasses

from uae_jax.options.base import Options, option

TOKEN_LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
IMPORTANCE_LEVELS = ("token", "sequence")
TOKEN_KLS = ("k1", "k2", "k3", "exact")
TRUNCATIONS = ("train", "mask")
SAMPLING_CORRECTIONS = ("token_truncate", "token_mask")

SDE_LOSSES = ("flow_grpo",)
FORWARD_LOSSES = ("nft", "awm")
RATIOS = ("plain", "guard")
TRUST_REGIONS = ("clip", "divergence")
STEP_WEIGHTS = ("uniform", "noise", "inverse_dt")
FLOW_KLS = ("gaussian", "gaussian_no_dt", "velocity", "mean")
ADVANTAGE_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")
AWM_WEIGHTS = ("uniform", "sigma", "sigma_square", "huber", "ghuber")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenObjective(Options):
  """Objective of stage 2, token GRPO; the defaults are those of TRL 1.16. Formulas: `algorithms.grpo`.

  TRL's own correction for its external sampler, on by default there, is off here: this sampler is the policy itself.

  Attributes:
    loss: token loss and its normalizer, see the table in `algorithms.grpo`.
    importance_level: one ratio per "token", or per "sequence" (GSPO; clip ranges are then of order 3e-4).
    clip_low: the ratio is clipped below at 1 - clip_low.
    clip_high: the ratio is clipped above at 1 + clip_high; DAPO uses 0.28.
    delta: upper bound of the ratio where the advantage is negative, above 1 + clip_high; None disables.
    ratio_cap: upper bound of cispo's importance weight.
    temperature_positive: tau of sapo where the advantage is positive.
    temperature_negative: tau of sapo elsewhere.
    k_positive: k of vespo where the advantage is positive.
    k_negative: k of vespo elsewhere.
    lambda_positive: lambda of vespo where the advantage is positive.
    lambda_negative: lambda of vespo elsewhere.
    beta: weight of the KL to the reference; 0 needs no reference.
    kl: estimator of the KL to the reference, or "exact" over the vocabulary.
    is_kl_weighted: multiplies the estimate by the token's ratio to the policy that sampled. Without it, on policy too,
      the gradient of k3 is that of KL(reference, policy) and the gradient of k1 is zero, see `algorithms.kl.weighted`.
    entropy_bonus: c in l_t - c H_t. The loss reduces H_t as it does the token term: grpo and sapo take the mean over
      captions of their mean, dr_grpo divides by the budget, luspo adds the tokens of a caption, the others take the
      mean over tokens, as TRL does for all. All tokens count, also with top_entropy, where TRL takes those it keeps.
    top_entropy: fraction of tokens, those of highest entropy, that have a policy gradient (arXiv 2506.01939 uses 0.2).
    sampling_cap: upper bound of the importance weight p_old / p_sampler of a token, for a sampler whose
      log-probabilities differ from replay; 0 sets none. TRL's clip_max.
    sampling_floor: lower bound of that weight; 0 sets none. TRL's clip_min. Without either bound nothing is corrected.
    sampling_correction: a weight outside the bounds is clipped ("token_truncate") or 0 ("token_mask").
    off_policy_threshold: rollouts with negative advantage whose mean_t (log p_sampler - log p) exceeds it have no
      policy gradient; 0 disables.
    truncation: rollouts without a closing token "train" as others, or are left out ("mask", DAPO's overlong filtering).
      To penalize them instead, give the text rewards "truncation" or "length" a weight.
  """

  loss: str = option("dapo", choices=TOKEN_LOSSES)
  importance_level: str = option("token", choices=IMPORTANCE_LEVELS)
  clip_low: float = option(0.2, more_than=0)
  clip_high: float = option(0.2, more_than=0)
  delta: float | None = option(None, more_than=0)
  ratio_cap: float = option(5.0, more_than=0)
  temperature_positive: float = option(1.0, more_than=0)
  temperature_negative: float = option(1.05, more_than=0)
  k_positive: float = option(2.0, at_least=0)
  k_negative: float = option(3.0, at_least=0)
  lambda_positive: float = option(3.0, more_than=0)
  lambda_negative: float = option(2.0, more_than=0)
  beta: float = option(0.0, at_least=0)
  kl: str = option("k3", choices=TOKEN_KLS)
  is_kl_weighted: bool = True
  entropy_bonus: float = option(0.0, at_least=0)
  top_entropy: float = option(1.0, more_than=0, at_most=1)
  sampling_cap: float = option(0.0, at_least=0)
  sampling_floor: float = option(0.0, at_least=0, at_most=1)
  sampling_correction: str = option("token_truncate", choices=SAMPLING_CORRECTIONS)
  off_policy_threshold: float = option(0.0, at_least=0)
  truncation: str = option("train", choices=TRUNCATIONS)

  @property
  def corrects_sampler(self) -> bool:
    """Whether importance weights correct the difference of sampler and replay."""
    return self.sampling_cap > 0 or self.sampling_floor > 0

  def check(self) -> None:
    loss = f"loss = {self.loss!r}"
    if self.loss == "luspo" and self.importance_level != "sequence":
      raise ValueError("importance_level = 'token': loss = 'luspo' needs 'sequence'")
    if self.loss == "vespo":
      self.refuse_inert(("importance_level",), "loss = 'vespo', whose ratio is that of whole captions")
    else:
      self.refuse_inert(("k_positive", "k_negative", "lambda_positive", "lambda_negative"), loss)
    if self.loss != "cispo":
      self.refuse_inert(("ratio_cap",), loss)
    if self.loss != "sapo":
      self.refuse_inert(("temperature_positive", "temperature_negative"), loss)
    if self.loss in ("cispo", "sapo", "vespo"):
      self.refuse_inert(("clip_low", "clip_high", "delta"), loss)
    if self.delta is not None and self.delta <= 1 + self.clip_high:
      raise ValueError(f"delta = {self.delta}: expected more than 1 + clip_high = {1 + self.clip_high}")
    if not self.beta:
      self.refuse_inert(("kl", "is_kl_weighted"), "beta = 0")
    if self.kl == "exact":
      self.refuse_inert(("is_kl_weighted",), "kl = 'exact', which is no estimate from samples")
    if not self.corrects_sampler:
      self.refuse_inert(("sampling_correction",), "sampling_cap = 0 and sampling_floor = 0")
    if 0 < self.sampling_cap < 1:
      raise ValueError(
        f"sampling_cap = {self.sampling_cap}: expected 0 to set none, or at least 1, the weight on policy"
      )
    if self.sampling_floor == self.sampling_cap == 1:
      raise ValueError("sampling_floor = 1.0: expected less than sampling_cap = 1.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageObjective(Options):
  """Objective of stage 3. Formulas: `algorithms.flow_grpo` for "flow_grpo", `algorithms.forward_process` otherwise.

  Attributes:
    loss: "flow_grpo" (policy gradient of SDE steps), "nft" (DiffusionNFT) or "awm".
    clip_low: flow_grpo and awm clip the ratio below at 1 - clip_low; None uses 1e-4 for flow_grpo, whose
      log-probabilities are means over elements, and 1 for awm.
    clip_high: the ratio is clipped above at 1 + clip_high; None as for clip_low.
    beta: weight of the KL to the reference; 0 needs no reference.
    kl: flow_grpo: which KL, each with its own order of beta, see `algorithms.kl.flow`.
    ratio: flow_grpo: "plain", or "guard" (samplers "flow" and "dance" only; clip ranges of order 2e-6).
    trust_region: flow_grpo: "clip" the ratio, or mask steps by their "divergence" from the old policy.
    divergence_threshold: flow_grpo: largest divergence under trust_region = "divergence".
    step_weight: flow_grpo: weight of each SDE step.
    mix: nft: beta of the paper, how far v+ and v- lie from the old policy; 1 in Flow-Factory, 0.5 in verl-omni.
    max_advantage: nft: advantages are clipped to it and mapped to [0, 1].
    advantage_mode: nft: which advantages count, and whether by size or by sign, see `algorithms.forward_process`;
      adv_mode of DiffusionNFT's code.
    weight: awm: w(sigma) = 1, sigma or sigma^2, or "huber" and "ghuber", with log p = -sigma ((mean + 1e-10)^q -
      1e-10^q) c; q = 1/2, c = 1 and q = 1/4, c = 4.
    average_beta: nft and awm: weight of mean (v - v_average)^2; awm collapses without it or the clip. 0 needs no
      average.
  """

  loss: str = option("flow_grpo", choices=(*SDE_LOSSES, *FORWARD_LOSSES))
  clip_low: float | None = option(None, more_than=0)
  clip_high: float | None = option(None, more_than=0)
  beta: float = option(0.0, at_least=0)
  kl: str = option("gaussian_no_dt", choices=FLOW_KLS)
  ratio: str = option("plain", choices=RATIOS)
  trust_region: str = option("clip", choices=TRUST_REGIONS)
  divergence_threshold: float = option(1e-5, more_than=0)
  step_weight: str = option("uniform", choices=STEP_WEIGHTS)
  mix: float = option(1.0, more_than=0)
  max_advantage: float = option(5.0, more_than=0)
  advantage_mode: str = option("all", choices=ADVANTAGE_MODES)
  weight: str = option("uniform", choices=AWM_WEIGHTS)
  average_beta: float = option(0.0, at_least=0)

  @property
  def is_forward(self) -> bool:
    """Whether the loss noises finished images again instead of following SDE steps."""
    return self.loss in FORWARD_LOSSES

  @property
  def clip_range(self) -> tuple[float, float]:
    """(clip_low, clip_high) with the defaults of the loss."""
    default = 1.0 if self.is_forward else 1e-4
    low = default if self.clip_low is None else self.clip_low
    high = default if self.clip_high is None else self.clip_high
    return low, high

  def check(self) -> None:
    loss = f"loss = {self.loss!r}"
    if self.is_forward:
      self.refuse_inert(("kl", "ratio", "trust_region", "divergence_threshold", "step_weight"), loss)
    else:
      self.refuse_inert(("average_beta",), loss)
    if self.loss != "nft":
      self.refuse_inert(("mix", "max_advantage", "advantage_mode"), loss)
    if self.loss != "awm":
      self.refuse_inert(("weight",), loss)
    if self.trust_region != "divergence":
      self.refuse_inert(("divergence_threshold",), "trust_region = 'clip'")
    if not self.beta:
      self.refuse_inert(("kl",), "beta = 0")
