"""Advantages and losses: pure functions over arrays and tensors.

Losses use tensor methods only, so that importing a recipe does not import torch. A loss returns the SUM over its
tokens; the train worker divides by the minibatch's global token count (invariant 5), which is the token-mean of DAPO
(arXiv 2503.14476, eq. 8).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transport.types import Metrics, Microbatch

if TYPE_CHECKING:
    import torch

MAX_LOG_RATIO = 20.0
"""A token that an engine thought all but impossible must not make the ratio, and every gradient with it, infinite."""


def group_advantages(rewards_G: Sequence[float | None], by_std: bool, epsilon: float) -> list[float]:
    """Rewards of one group relative to the group's mean (GRPO, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards_G: one reward per trajectory; None marks an invalid one, which takes no part and gets 0.
        by_std: divide by the group's standard deviation; without it, Dr. GRPO's advantage (arXiv 2503.20783).
        epsilon: added to the standard deviation. The deviation is the sample's (n - 1), as in verl and TRL.
    """
    valid = [reward for reward in rewards_G if reward is not None]
    if not valid:
        return [0.0] * len(rewards_G)
    mean = math.fsum(valid) / len(valid)
    scale = 1.0
    if by_std:
        variance = math.fsum((reward - mean) ** 2 for reward in valid) / max(len(valid) - 1, 1)
        scale = math.sqrt(variance) + epsilon
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards_G]


@dataclass(frozen=True, slots=True)
class ClippedPolicyLoss:
    """PPO's clipped surrogate with separate bounds (arXiv 1707.06347, eq. 7; clip-higher: arXiv 2503.14476, eq. 10).

    The ratio is to the distribution that sampled the tokens. `kl_coef` adds the k3 estimate of KL(policy, reference)
    (arXiv 2402.03300, eq. 4).
    """

    clip_low: float
    clip_high: float
    kl_coef: float

    def __call__(self, logprobs_N: "torch.Tensor", batch: Microbatch) -> "tuple[torch.Tensor, Metrics]":
        ratios_N = (logprobs_N - batch.logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped_N = ratios_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses_N = -(ratios_N * batch.advantages_N).minimum(clipped_N * batch.advantages_N)
        is_clipped_N = (ratios_N * batch.advantages_N) > (clipped_N * batch.advantages_N)
        metrics = Metrics()
        metrics.add("clip_fraction", is_clipped_N.sum().item(), len(ratios_N))
        metrics.add("ratio/mean", ratios_N.detach().sum().item(), len(ratios_N))
        if self.kl_coef > 0:
            kl_N = k3_divergence(logprobs_N, batch.reference_logprobs_N)
            metrics.add("kl", kl_N.detach().sum().item(), len(kl_N))
            losses_N = losses_N + self.kl_coef * kl_N
        return losses_N.sum(), metrics


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning: minus the logprob of every target token."""

    def __call__(self, logprobs_N: "torch.Tensor", batch: Microbatch) -> "tuple[torch.Tensor, Metrics]":
        return -logprobs_N.sum(), Metrics()


def k3_divergence(logprobs_N: "torch.Tensor", reference_N: "torch.Tensor") -> "torch.Tensor":
    """Per-token estimate of KL(policy, reference): exp(d) - d - 1 with d = reference - policy; never negative."""
    difference_N = (reference_N - logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference_N.exp() - difference_N - 1
