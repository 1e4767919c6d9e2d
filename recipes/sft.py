"""Supervised fine-tuning: `python -m recipes.sft [CONFIG.yaml] [key=value ...]`.

Without arguments it teaches the built-in model a mixture of four skills, of which GRPO then finds the right one; the
GRPO recipe's warm start calls the same functions.
"""

import asyncio
import sys
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from configs.schema import RecipeConfig, TrainerConfig, WarmStartConfig
from recipes.data import check_files
from recipes.supervised import fit_step

if TYPE_CHECKING:
    from orchestrator.orchestrator import Orchestrator


class Config(RecipeConfig):
    """Keys of the sft recipe."""

    steps: PositiveInt = 250
    """Optimiser steps."""
    batch_size: PositiveInt = 128
    """Demonstrations of one step."""
    trainer: TrainerConfig = TrainerConfig(learning_rate=2e-3)


def check(config: Config) -> None:
    """Read the user's rows. Raises ConfigurationError naming the first bad one."""
    check_files(config.data, config.model.path, num_held_out=0)


async def train(config: Config, orchestrator: "Orchestrator") -> None:
    """One pass of supervised steps over the demonstrations, saved as it goes."""
    from recipes.task import load_task

    task = await asyncio.to_thread(load_task, config, num_held_out=0, warm_start=WarmStartConfig(steps=0))
    for note in task.notes:
        orchestrator.log.note(note)
    await orchestrator.launch_trainer(task.policy, temperature=1.0)
    await orchestrator.configure_optimizer(config.trainer, config.steps)
    orchestrator.log.phase("supervised training")
    async for step in orchestrator.steps():
        metrics = await fit_step(orchestrator, task, step, config.batch_size)
        orchestrator.end_step(step, metrics)
        await orchestrator.maybe_save(step, task.tokenizer_folder)


if __name__ == "__main__":
    from orchestrator.driver import main

    sys.exit(main("recipes.sft"))
