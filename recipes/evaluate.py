"""Held-out evaluation: one sampled completion per prompt, scored by the recipe's reward."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.schema import RolloutConfig
from transport.types import Prompt

if TYPE_CHECKING:
    from orchestrator.orchestrator import Orchestrator


async def evaluate(orchestrator: "Orchestrator", prompts_P: Sequence[Prompt], rollout: RolloutConfig) -> float:
    """Mean reward over held-out prompts, sampled as `rollout` says; invalid samples are left out, NaN if all are."""
    from workers.engine import SamplingSpec

    sampling = SamplingSpec(1, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    with orchestrator.timed("evaluate"):
        groups_P = await orchestrator.rollout(prompts_P, sampling, "evaluate")
        await orchestrator.score(groups_P)
    rewards = [group.trajectories[0].reward for group in groups_P if group.trajectories[0].invalid is None]
    return math.fsum(rewards) / len(rewards) if rewards else math.nan
