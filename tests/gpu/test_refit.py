"""Invariant 1 on a GPU: after refits an engine equals a fresh one, and agrees with the trainer as far as bf16 lets it.

Trainer, engine and fresh engine share one GPU. Not yet run.
"""

import functools
import pathlib

import pytest

from configs.schema import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    ModelConfig,
    RolloutConfig,
    TrainerConfig,
    TransportConfig,
)
from orchestrator.orchestrator import Orchestrator, PolicySource
from orchestrator.placement import actor_options, place
from recipes.grpo import Config
from recipes.objectives import ClippedPolicyLoss
from tests.integration.test_refit import PROMPTS, SAMPLING
from transport.types import Completion
from workers.rollout import Request, RolloutWorker, make_vllm_engine

GPUS_EACH = 0.33
MAX_MEAN_DIFFERENCE = 0.02
"""Of logprobs in bf16: 0.003 on a CPU; weights in a wrong place make it several."""
REQUESTS = [Request(str(prompt.row), prompt.tokens, SAMPLING) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("family", "transport"), [("qwen3_tied", "auto"), ("qwen3_moe", "auto"), ("qwen3_tied", "stream")]
)
async def test_an_updated_engine_equals_a_fresh_engine_and_agrees_with_the_trainer(
    one_gpu_cluster: None, model_folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, family: str, transport: str
) -> None:
    folder = str(model_folders[family])
    config = Config(
        model=ModelConfig(path=folder),
        data=DataConfig(path="unused.jsonl"),
        trainer=TrainerConfig(num_workers=1, learning_rate=1e-2),
        rollout=RolloutConfig(num_workers=1, dtype="bfloat16", max_tokens=8, gpu_memory_utilization=0.2),
        transport=TransportConfig(type=transport),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(every=0),
        cluster=ClusterConfig(device="cuda", gpus_per_worker=GPUS_EACH),
    )
    orchestrator = Orchestrator("recipes.grpo", config, str(tmp_path))
    try:
        await orchestrator.launch_trainer(PolicySource(folder), 1.0)
        await orchestrator.launch_rollouts(folder, config.rollout, 8, config.transport)
        await orchestrator.configure_optimizer(config.trainer, 2)
        await orchestrator.refit()
        for version in (1, 2):
            groups = await orchestrator.rollout(PROMPTS, SAMPLING, f"train {version}")
            for group in groups:
                for index, trajectory in enumerate(group.trajectories):
                    assert trajectory.completion.weight_version == version
                    trajectory.advantage = (-1.0) ** index
            metrics = (await orchestrator.forward_backward(groups, ClippedPolicyLoss(0.2, 0.28, 0.0))).flat()
            assert metrics["logprob_diff/mean"] <= MAX_MEAN_DIFFERENCE
            await orchestrator.optim_step()
            report = await orchestrator.refit()
            assert report.verified and report.quarantined == {}
        updated = await orchestrator.rollouts.call_rank(0, "generate", REQUESTS, 5, 60.0, deadline_s=60)
        await orchestrator.save_policy(tmp_path, folder)
        fresh = await fresh_engine_samples(orchestrator, config, str(tmp_path / "policy"))
        for (_, updated_group), (_, fresh_group) in zip(sorted(updated), sorted(fresh), strict=True):
            for one, other in zip(updated_group, fresh_group, strict=True):
                assert one.tokens == other.tokens
                assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) <= 1e-5
    finally:
        await orchestrator.close()


async def fresh_engine_samples(
    orchestrator: Orchestrator, config: Config, folder: str
) -> list[tuple[str, list[Completion]]]:
    """What an engine samples that has read its weights from disk."""
    engine = functools.partial(make_vllm_engine, ModelConfig(), config.rollout, folder, 16, config.seed, "auto")
    placement = await place("fresh", 1, GPUS_EACH, 60)
    group = orchestrator.launch(
        "fresh", RolloutWorker, placement, actor_options(GPUS_EACH, max_concurrency=4), (engine,)
    )
    return await group.call_rank(0, "generate", REQUESTS, 5, 240.0, deadline_s=240)
