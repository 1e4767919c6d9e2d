"""GRPO (arXiv 2402.03300): `python -m recipes.grpo [CONFIG.yaml] [key=value ...]`.

Per step: sample groups, score them, compare within each group, learn in minibatches, refit the engines. Departures from
the paper: the ratio is to the engine's own logprobs, the loss is a mean over all tokens of the minibatch and the upper
clip bound is wider (both DAPO, arXiv 2503.14476), and there is no KL term unless `algorithm.kl_coef` asks for it.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from configs.schema import (
    AlgorithmConfig,
    EnvironmentConfig,
    EvaluationConfig,
    RecipeConfig,
    RolloutConfig,
    TransportConfig,
    WarmStartConfig,
)
from recipes.data import check_files
from recipes.evaluate import describe, evaluate
from recipes.objectives import ClippedPolicyLoss, group_advantages
from recipes.rewards import resolve
from transport.types import Metrics, TrajectoryGroup

if TYPE_CHECKING:
    from orchestrator.orchestrator import Orchestrator
    from recipes.task import Task

Advantages = Callable[[Sequence[float | None]], list[float]]
"""Rewards of one group (None: invalid) -> an advantage for each."""


class Config(RecipeConfig):
    """Keys of the grpo recipe."""

    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    transport: TransportConfig = TransportConfig()
    reward: str = Field(default="exact_match", validate_default=True)
    """exact_match, math_verify, or the import path package.module:function of your own."""
    environment: EnvironmentConfig = EnvironmentConfig()
    eval: EvaluationConfig = EvaluationConfig()
    warm_start: WarmStartConfig = WarmStartConfig()

    @field_validator("reward")
    @classmethod
    def _reward_can_be_imported(cls, value: str) -> str:
        return resolve(value)

    @model_validator(mode="after")
    def _ranks_of_an_engine_share_no_gpu(self) -> "Config":
        if self.rollout.tensor_parallel_size > 1 and self.cluster.gpus_per_worker < 1 and self.cluster.device != "cpu":
            raise ValueError(
                "rollout.tensor_parallel_size above 1 needs a GPU for every rank: set cluster.gpus_per_worker=1, or "
                "cluster.device=cpu"
            )
        return self

    def num_model_workers(self) -> int:
        reference = self.trainer.num_workers if self.algorithm.kl_coef > 0 else 0
        return self.trainer.num_workers + self.rollout.num_workers * self.rollout.tensor_parallel_size + reference

    def num_workers(self) -> int:
        return self.num_model_workers() + self.environment.num_workers


def check(config: Config) -> None:
    """Read the user's rows. Raises ConfigurationError naming the first bad one."""
    check_files(config.data, config.model.path, config.eval.num_prompts)


async def train(config: Config, orchestrator: "Orchestrator", advantages: Advantages | None = None) -> None:
    """Run the whole recipe.

    Args:
        advantages: instead of the group advantage that `config.algorithm` describes.
    """
    from workers.engine import SamplingSpec

    algorithm = config.algorithm
    advantages = advantages or (
        lambda rewards_G: group_advantages(rewards_G, algorithm.advantage_by_std, algorithm.advantage_epsilon)
    )
    loss = ClippedPolicyLoss(algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef)
    sampling = SamplingSpec(algorithm.group_size, config.rollout.max_tokens, config.rollout.temperature)
    task = await launch(config, orchestrator)

    async for step in orchestrator.steps():
        prompts_P = task.prompts(step, algorithm.prompts_per_step)
        groups_P = await orchestrator.rollout(prompts_P, sampling, "train")
        invalid = await orchestrator.score(groups_P)
        for group in groups_P:
            set_advantages(group, advantages)
        learned = Metrics()
        for minibatch in orchestrator.minibatches(groups_P, algorithm.num_minibatches):
            learned.merge(await orchestrator.forward_backward(minibatch, loss))
            learned.merge(await orchestrator.optim_step())
        await orchestrator.refit()
        metrics = learned.flat() | describe(groups_P, orchestrator.weight_version - 1, invalid)
        if orchestrator.is_due(step, config.eval.every):
            metrics["eval/accuracy"] = await evaluate(orchestrator, task, config.rollout)
        orchestrator.end_step(step, metrics)
        await orchestrator.maybe_save(step, task.tokenizer_folder)


async def launch(config: Config, orchestrator: "Orchestrator") -> "Task":
    """Start every worker, warm up the policy if the task needs it, and serve it: version 1 is on every engine."""
    from recipes.task import check_context, load_task

    task = await asyncio.to_thread(load_task, config, config.eval.num_prompts, config.warm_start)
    check_context(config.model, task.policy.folder, task.longest_prompt + config.rollout.max_tokens)
    for note in task.notes:
        orchestrator.log.note(note)
    temperature, algorithm = config.rollout.temperature, config.algorithm
    await orchestrator.launch_trainer(task.policy, temperature)
    _, _, start = await asyncio.gather(
        orchestrator.launch_rollouts(task.policy.folder, config.rollout, task.longest_prompt, config.transport),
        orchestrator.launch_environments(config.environment, config.reward, task.tokenizer_folder),
        task.warm_start(orchestrator),
    )
    await orchestrator.configure_optimizer(config.trainer, config.steps * algorithm.num_minibatches)
    if algorithm.kl_coef > 0:
        await orchestrator.launch_reference(start, temperature)
    await orchestrator.refit()
    orchestrator.log.phase("training")
    if orchestrator.first_step == 0 and config.eval.every > 0:
        accuracy = await evaluate(orchestrator, task, config.rollout)
        orchestrator.log.metrics({"step": 0, "eval/accuracy": accuracy}, config.steps)
    return task


def set_advantages(group: TrajectoryGroup, advantages: Advantages) -> None:
    """Compare the group's valid trajectories with each other."""
    rewards_G = [trajectory.reward if trajectory.invalid is None else None for trajectory in group.trajectories]
    for trajectory, advantage in zip(group.trajectories, advantages(rewards_G), strict=True):
        trajectory.advantage = advantage


if __name__ == "__main__":
    from orchestrator.driver import main

    sys.exit(main("recipes.grpo"))
