"""Supervised steps on a task's demonstrations: what the sft recipe consists of, and the warm start of the sort task."""

from typing import TYPE_CHECKING

from configs.schema import TrainerConfig, WarmStartConfig
from recipes.objectives import NegativeLogLikelihood

if TYPE_CHECKING:
    from orchestrator.orchestrator import Orchestrator
    from recipes.task import Task


async def fit(orchestrator: "Orchestrator", task: "Task", trainer: TrainerConfig, config: WarmStartConfig) -> None:
    """Supervised steps before another recipe's own."""
    await orchestrator.configure_optimizer(trainer, config.steps)
    orchestrator.log.phase(f"supervised warm start, {config.steps} steps")
    for step in range(config.steps):
        orchestrator.check_stop()
        metrics = await fit_step(orchestrator, task, step, config.batch_size)
        orchestrator.log.warm_start(step + 1, config.steps, metrics["loss"])


async def fit_step(orchestrator: "Orchestrator", task: "Task", step: int, batch_size: int) -> dict[str, float]:
    """One optimiser step on the demonstrations of `step`."""
    metrics = await orchestrator.forward_backward(task.demonstrations(step, batch_size), NegativeLogLikelihood())
    metrics.merge(await orchestrator.optim_step())
    return metrics.flat()
