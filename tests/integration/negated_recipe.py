"""The grpo recipe with its advantages negated: the control of the test of learning."""

from collections.abc import Sequence

from orchestrator.orchestrator import Orchestrator
from recipes import grpo
from recipes.objectives import group_advantages


async def train(config: grpo.Config, orchestrator: Orchestrator) -> None:
    def negated(rewards_G: Sequence[float | None]) -> list[float]:
        return [-advantage for advantage in group_advantages(rewards_G, True, 1e-6)]

    await grpo.train(config, orchestrator, negated)
