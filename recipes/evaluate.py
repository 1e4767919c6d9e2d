"""What a run reports of its samples: held-out accuracy and the metrics of a step's groups."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.schema import RolloutConfig
from transport.types import TrajectoryGroup

if TYPE_CHECKING:
    from orchestrator.orchestrator import Orchestrator
    from recipes.task import Task


NUM_SHOWN = 4


async def evaluate(orchestrator: "Orchestrator", task: "Task", rollout: RolloutConfig) -> float:
    """Mean reward over held-out prompts, sampled as `rollout` says; invalid samples are left out, NaN if all are.

    The first few go to the run's record of text samples.
    """
    from workers.engine import SamplingSpec

    sampling = SamplingSpec(1, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    with orchestrator.timed("evaluate"):
        groups_P = await orchestrator.rollout(task.held_out, sampling, "evaluate")
        await orchestrator.score(groups_P)
    for group in groups_P[:NUM_SHOWN]:
        (trajectory,) = group.trajectories
        text = task.decode(trajectory.completion.tokens)
        orchestrator.log.sample(group.prompt.text, text, trajectory.reward, group.prompt.answer)
    rewards = [group.trajectories[0].reward for group in groups_P if group.trajectories[0].invalid is None]
    return math.fsum(rewards) / len(rewards) if rewards else math.nan


def describe(groups_P: Sequence[TrajectoryGroup], version: int, invalid: dict[str, int]) -> dict[str, float]:
    """Metrics of a step's samples.

    Args:
        version: the trainer's weight version when it began to learn from them.
        invalid: count of samples without a reward, by reason.
    """
    trajectories = [trajectory for group in groups_P for trajectory in group.trajectories]
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.invalid is None]
    staleness = [version - trajectory.completion.weight_version for trajectory in trajectories]
    tokens = sum(len(trajectory.completion.tokens) for trajectory in trajectories)
    metrics = {
        "staleness/mean": sum(staleness) / len(staleness),
        "staleness/max": max(staleness),
        "weight_version": version,
        "tokens/completion": tokens / len(trajectories),
        "tokens/step": tokens,
        "samples/invalid": sum(invalid.values()),
    }
    if rewards:
        metrics["reward/mean"] = sum(rewards) / len(rewards)
    return metrics | {f"samples/invalid/{reason}": count for reason, count in invalid.items()}
