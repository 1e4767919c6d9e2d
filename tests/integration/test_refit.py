"""Invariant 1 on real parts: sampler and trainer agree after every refit, and an updated engine equals a fresh one."""

import functools
import pathlib

import pytest

from configs.schema import CheckpointConfig, ModelConfig, RolloutConfig, TransportConfig
from orchestrator.orchestrator import Orchestrator, PolicySource
from orchestrator.placement import actor_options, place
from recipes.grpo import Config
from recipes.objectives import ClippedPolicyLoss
from tests.integration.conftest import FAMILIES
from transport.types import Completion, Prompt
from workers.engine import SamplingSpec
from workers.rollout import Request, RolloutWorker, make_vllm_engine

PROMPTS = [Prompt(row, tokens, "", "") for row, tokens in enumerate([[3, 4, 5, 2], [7, 3, 11, 9, 10, 2], [5, 5, 2]])]
SAMPLING = SamplingSpec(n=4, max_tokens=8)


@pytest.mark.parametrize(
    ("family", "transport", "num_ranks"),
    [
        *((family, "nixl", 1) for family in FAMILIES),
        ("qwen3_tied", "object_store", 1),
        ("qwen3_tied", "stream", 1),
        ("qwen3_moe", "collective", 1),
        ("qwen3_tied", "stream", 2),
        *((family, transport, 2) for family in ("qwen3_tied", "qwen3_moe") for transport in ("auto", "nixl")),
    ],
)
async def test_an_updated_engine_agrees_with_the_trainer_and_equals_a_fresh_engine(
    cluster: None, model_folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, family: str, transport: str,
    num_ranks: int,
) -> None:  # fmt: skip
    config = Config(
        model=ModelConfig(path=str(model_folders[family])),
        data={"path": "unused.jsonl"},
        rollout=RolloutConfig(num_workers=1, max_tokens=8, tensor_parallel_size=num_ranks),
        transport=TransportConfig(type=transport),
        checkpoint=CheckpointConfig(every=0),
    )
    folder = str(model_folders[family])
    orchestrator = Orchestrator("recipes.grpo", config, str(tmp_path))
    try:
        await orchestrator.launch_trainer(PolicySource(folder), 1.0)
        await orchestrator.launch_rollouts(folder, config.rollout, 8, config.transport)
        await orchestrator.configure_optimizer(config.trainer.model_copy(update={"learning_rate": 1e-2}), 2)
        loss = ClippedPolicyLoss(0.2, 0.28, 0.0)
        await orchestrator.refit()
        for version in (1, 2):
            groups = await orchestrator.rollout(PROMPTS, SAMPLING, f"train {version}")
            for group in groups:
                for index, trajectory in enumerate(group.trajectories):
                    assert trajectory.completion.weight_version == version
                    trajectory.advantage = (-1.0) ** index
            metrics = (await orchestrator.forward_backward(groups, loss)).flat()
            assert metrics["logprob_diff/max"] <= 1e-4
            assert metrics["clip_fraction"] == 0
            assert abs(metrics["ratio/mean"] - 1) <= 1e-5
            await orchestrator.optim_step()
            report = await orchestrator.refit()
            assert report.verified
        samples = await orchestrator.rollouts.call("generate", _requests(), 5, 60.0, deadline_s=60)
        updated = samples[0]
        assert all(sorted(of_rank) == sorted(updated) for of_rank in samples)
        await orchestrator.save_policy(tmp_path, folder)
        fresh = await _fresh_engine_samples(orchestrator, config, str(tmp_path / "policy"))
        for (_, updated_group), (_, fresh_group) in zip(sorted(updated), sorted(fresh), strict=True):
            for one, other in zip(updated_group, fresh_group, strict=True):
                assert one.tokens == other.tokens
                assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) <= 1e-5
    finally:
        await orchestrator.close()


def _requests() -> list[Request]:
    return [Request(str(prompt.row), prompt.tokens, SAMPLING) for prompt in PROMPTS]


async def _fresh_engine_samples(
    orchestrator: Orchestrator, config: Config, folder: str
) -> list[tuple[str, list[Completion]]]:
    """What an engine of one rank samples that has read its weights from disk."""
    whole = config.rollout.model_copy(update={"tensor_parallel_size": 1})
    engine = functools.partial(make_vllm_engine, ModelConfig(), whole, folder, 16, config.seed, load_format="auto")
    placement = await place("fresh", 1, 0.0, 60)
    options = actor_options(0.0, max_concurrency=4)
    group = orchestrator.launch("fresh", RolloutWorker, placement, options, (engine,))
    return await group.call_rank(0, "generate", _requests(), 5, 120.0, deadline_s=120)
