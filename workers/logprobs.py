"""Logprobs and entropies of given tokens under given logits, in float32, a block of tokens at a time.

A vocabulary of 150,000 makes full float32 logits the largest tensor of training; blocks bound that memory, and the
backward pass recomputes each block's softmax.
"""

import torch
from torch.utils.checkpoint import checkpoint

BLOCK_TOKENS = 1024


def token_logprobs(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob of each target and entropy of each distribution, both of shape N, at the sampling temperature.

    The entropy carries no gradient.
    """
    if len(targets_N) <= BLOCK_TOKENS:
        return _block(logits_NV, targets_N, temperature)
    parts = [
        checkpoint(_block, logits, targets, temperature, use_reentrant=False)
        for logits, targets in zip(logits_NV.split(BLOCK_TOKENS), targets_N.split(BLOCK_TOKENS), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _block(logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    all_logprobs = (logits_NV.float() / temperature).log_softmax(dim=-1)
    with torch.no_grad():
        entropies = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    return -torch.nn.functional.nll_loss(all_logprobs, targets_N, reduction="none"), entropies
