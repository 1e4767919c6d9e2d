"""Engines of several ranks: each rank an actor that pulls its own slices, all in step, whatever happens meanwhile."""

import asyncio
import contextlib
import os
import pathlib
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from configs.schema import CheckpointConfig, DeadlineConfig, ModelConfig, RolloutConfig
from orchestrator.batching import Row, pack
from orchestrator.errors import WorkerFailed
from orchestrator.orchestrator import Orchestrator, PolicySource
from recipes import sort_task
from recipes.grpo import Config
from recipes.objectives import ClippedPolicyLoss
from transport.types import Completion, Prompt, Trajectory
from workers.engine import SamplingSpec
from workers.rollout import Request

PROMPTS = [Prompt(row, tokens, "", "") for row, tokens in enumerate([[3, 4, 5, 2], [7, 3, 11, 9, 10, 2], [5, 5, 2]])]
LONGEST = 6
LONG = SamplingSpec(n=8, max_tokens=100)
LOSS = ClippedPolicyLoss(0.2, 0.28, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tied model that 2 ranks cannot cut evenly: one kv head, which both hold, and 100 tokens, padded to 128."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    folder = tmp_path_factory.mktemp("uneven")
    sort_task.write_model_folder(folder)
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@contextlib.asynccontextmanager
async def launched(folder: str, run_dir: pathlib.Path, num_engines: int) -> AsyncIterator[Orchestrator]:
    """A trainer and engines of two ranks that serve its weights as version 1."""
    config = Config(
        model=ModelConfig(path=folder), data={"path": "unused.jsonl"}, checkpoint=CheckpointConfig(every=0),
        rollout=RolloutConfig(num_workers=num_engines, max_tokens=LONG.max_tokens, tensor_parallel_size=2),
        deadline=DeadlineConfig(refit_s=8, rollout_s=60),
    )  # fmt: skip
    assert config.num_model_workers() == config.trainer.num_workers + 2 * num_engines
    orchestrator = Orchestrator("recipes.grpo", config, str(run_dir))
    try:
        await orchestrator.launch_trainer(PolicySource(folder), 1.0)
        await orchestrator.launch_rollouts(folder, config.rollout, LONGEST, config.transport)
        await orchestrator.configure_optimizer(config.trainer.model_copy(update={"learning_rate": 1e-2}), 9)
        await orchestrator.refit()
        yield orchestrator
    finally:
        await orchestrator.close()


def record(orchestrator: Orchestrator) -> list[tuple[str, dict[int, Any]]]:
    """(method, results by rank) of every call to some of the rollout workers, from now on."""
    calls: list[tuple[str, dict[int, Any]]] = []
    original = orchestrator.rollouts.scatter_some

    async def recorded(method: str, per_rank: Any, *, deadline_s: float) -> dict[int, Any]:
        results = await original(method, per_rank, deadline_s=deadline_s)
        calls.append((method, results))
        return results

    orchestrator.rollouts.scatter_some = recorded  # type: ignore[method-assign]
    return calls


def freeze_before_commit(orchestrator: Orchestrator, pid: int) -> None:
    """Stop a process when the next commit begins."""
    original = orchestrator.rollouts.scatter_some

    async def freezing(method: str, per_rank: Any, *, deadline_s: float) -> dict[int, Any]:
        if method == "commit":
            orchestrator.rollouts.scatter_some = original  # type: ignore[method-assign]
            os.kill(pid, signal.SIGSTOP)
        return await original(method, per_rank, deadline_s=deadline_s)

    orchestrator.rollouts.scatter_some = freezing  # type: ignore[method-assign]


def shared_memory() -> set[str]:
    """Named segments of vLLM's."""
    return {path.name for path in pathlib.Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "-tp"))}


async def learn(orchestrator: Orchestrator, purpose: str) -> dict[str, float]:
    groups = await orchestrator.rollout(PROMPTS, SamplingSpec(n=4, max_tokens=8), purpose)
    for group in groups:
        for index, trajectory in enumerate(group.trajectories):
            trajectory.advantage = (-1.0) ** index
    metrics = (await orchestrator.forward_backward(groups, LOSS)).flat()
    await orchestrator.optim_step()
    return metrics


async def test_two_uneven_engines_agree_with_the_trainer_and_each_rank_pulls_the_bytes_of_its_shard(
    cluster: None, folder: str, tmp_path: pathlib.Path
) -> None:
    before = shared_memory()
    async with launched(folder, tmp_path, num_engines=2) as orchestrator:
        assert (await learn(orchestrator, "one"))["logprob_diff/max"] <= 1e-4
        calls = record(orchestrator)
        report = await orchestrator.refit()
        pulled = {rank: one.num_bytes for method, by in calls if method == "stage" for rank, one in by.items()}
        # Two layers of qkv (64 + 32 + 32 rows of 64), o (64 x 64), q and k norm (32), gate and up (2 x 48 x 64), down
        # (64 x 48) and two norms (64), a last norm, and 64 or 36 rows of the embedding, which is the head too.
        layer = 128 * 64 + 64 * 64 + 2 * 32 + 96 * 64 + 64 * 48 + 2 * 64
        assert pulled == {rank: 4 * (2 * layer + 64 + (64, 36)[rank % 2] * 64) for rank in range(4)}
        assert report.num_bytes == max(pulled.values())
        assert (await learn(orchestrator, "two"))["logprob_diff/max"] <= 1e-4

        # Work goes to engines that serve, and only there.
        orchestrator._weight_sync.life.fail(0, "for this test")
        calls.clear()
        groups = await orchestrator.rollout(PROMPTS, SamplingSpec(n=2, max_tokens=8), "three")
        assert all(len(group.trajectories) == 2 for group in groups)
        assert [set(by) for method, by in calls if method == "generate"] == [{2, 3}]
        await orchestrator.refit()
        calls.clear()
        await orchestrator.rollout(PROMPTS, SamplingSpec(n=2, max_tokens=8), "four")
        assert [set(by) for method, by in calls if method == "generate"] == [{0, 1, 2, 3}]

        # A rank that freezes before a commit costs its engine the version, and nobody else; the engine heals when it
        # wakes, for its other ranks have waited longer than the refit has.
        pid = (await orchestrator.rollouts.call_rank(1, "describe", deadline_s=30))["pid"]
        freeze_before_commit(orchestrator, pid)
        report = await orchestrator.refit()
        assert set(report.quarantined) == {0}
        assert "rollout/0, rollout/1 did not answer commit within 8 s" in report.quarantined[0]
        assert (await learn(orchestrator, "asleep"))["logprob_diff/max"] <= 1e-4
        os.kill(pid, signal.SIGCONT)
        await asyncio.wait(orchestrator.rollouts._late[0] + orchestrator.rollouts._late[1], timeout=30)
        assert not (await orchestrator.refit()).quarantined
        assert (await learn(orchestrator, "awake"))["logprob_diff/max"] <= 1e-4

        # A rank dies while its engine decodes: the error says which, and the other engine goes on.
        requests = [Request(str(index), [3, 4, 5, 2], LONG) for index in range(64)]
        await orchestrator.rollouts.scatter_some("submit", {0: (requests, 5), 1: (requests, 5)}, deadline_s=30)
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(WorkerFailed, match=r"rollout/[01] failed in collect"):
            await orchestrator.rollouts.scatter_some("collect", {0: (64, 60.0), 1: (64, 60.0)}, deadline_s=60)
        assert time.monotonic() - begin < 20
        report = await orchestrator.refit()
        assert set(report.quarantined) == {0}
        assert orchestrator._weight_sync.life.serving() == [1]
        assert (await learn(orchestrator, "five"))["logprob_diff/max"] <= 1e-4
    assert shared_memory() <= before


async def test_a_refit_while_the_ranks_decode_switches_both_before_the_same_step(
    cluster: None, folder: str, tmp_path: pathlib.Path
) -> None:
    async with launched(folder, tmp_path, num_engines=1) as orchestrator:
        for attempt in range(3):
            requests = [Request(str(prompt.row), prompt.tokens, LONG) for prompt in PROMPTS]
            await learn(orchestrator, f"before {attempt}")
            await orchestrator.rollouts.call("submit", requests, attempt, deadline_s=30)
            versions = [(await orchestrator.refit()).version for _ in range(2)]
            first, second = await orchestrator.rollouts.call("collect", len(requests), 60.0, deadline_s=60)
            assert sorted(first) == sorted(second)
            completions = dict(first)
            spans = {tuple(one.spans) for group in completions.values() for one in group}
            assert spans - {()}, "no completion was in flight"
            for group in completions.values():
                for one in group:
                    seen = [version for version, _ in one.spans]
                    assert seen == sorted(set(seen)) and set(seen) <= {versions[0] - 1, *versions}
                    assert one.weight_version == (seen[0] if seen else one.weight_version)
                    assert not seen or sum(num for _, num in one.spans) == len(one.tokens)
            await check_last_span(orchestrator, completions, versions[-1])


async def check_last_span(orchestrator: Orchestrator, completions: dict[str, list[Completion]], version: int) -> None:
    """What was sampled under the newest version has the trainer's logprobs, keys and values of before included."""
    num_compared = 0
    for prompt in PROMPTS:
        for one in completions[str(prompt.row)]:
            if not one.spans or one.spans[-1][0] != version:
                continue
            batch = pack([Row(prompt.tokens, [Trajectory(one)])], len(one.tokens))
            (logprobs_N,) = (await orchestrator.trainer.call("logprobs", [batch], deadline_s=60))[0]
            num = one.spans[-1][1]
            assert max(abs(a - b) for a, b in zip(logprobs_N[-num:], one.logprobs[-num:], strict=True)) <= 1e-4
            num_compared += num
    assert num_compared > 0
