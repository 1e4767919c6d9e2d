"""An idle run costs nothing: NIXL's progress threads, engine threads and Ray actors sleep."""

import asyncio
import pathlib

import pytest

from configs.schema import CheckpointConfig, ModelConfig, RolloutConfig
from orchestrator.orchestrator import Orchestrator
from recipes.grpo import Config, launch

IDLE_S = 10.0


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_every_actor_uses_less_than_five_percent_of_a_core_when_idle(
    cluster: None, model_folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, num_ranks: int
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join('{"prompt": "12=", "answer": "12"}\n' for _ in range(64)))
    config = Config(
        model=ModelConfig(path=str(model_folders["qwen3_tied"])), data={"path": str(rows)}, output_dir=str(tmp_path),
        eval={"num_prompts": 8}, checkpoint=CheckpointConfig(every=0),
        rollout=RolloutConfig(num_workers=2 // num_ranks, tensor_parallel_size=num_ranks),
    )  # fmt: skip
    orchestrator = Orchestrator("recipes.grpo", config, str(tmp_path))
    try:
        await launch(config, orchestrator)  # the first refit has made every NIXL agent
        groups = (orchestrator.trainer, orchestrator.rollouts, orchestrator.environments)
        before = [await group.call("describe", deadline_s=30) for group in groups]
        await asyncio.sleep(IDLE_S)
        after = [await group.call("describe", deadline_s=30) for group in groups]
        for group, old, new in zip(groups, before, after, strict=True):
            for rank in range(len(group)):
                share = (new[rank]["cpu_s"] - old[rank]["cpu_s"]) / IDLE_S
                assert share < 0.05, f"{group.role}/{rank} uses {share:.0%} of a core"
    finally:
        await orchestrator.close()
