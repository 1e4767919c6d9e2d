"""Invariant 5: the gradient does not depend on micro-batch split, packing or the number of dp ranks."""

import pathlib

import numpy as np

from configs.schema import CheckpointConfig, ModelConfig, TrainerConfig
from orchestrator.orchestrator import Orchestrator, PolicySource
from recipes.grpo import Config
from recipes.objectives import ClippedPolicyLoss
from transport.types import Completion, Prompt, Trajectory, TrajectoryGroup

LAYOUTS = {
    "one rank, one microbatch": TrainerConfig(num_workers=1, microbatch_tokens=8192, row_tokens=128),
    "one rank, a microbatch per row": TrainerConfig(num_workers=1, microbatch_tokens=1, row_tokens=128),
    "one rank, a row per completion": TrainerConfig(num_workers=1, microbatch_tokens=64, row_tokens=1),
    "two ranks, uneven microbatches": TrainerConfig(num_workers=2, microbatch_tokens=40, row_tokens=24),
}


async def test_the_gradient_is_the_same_for_every_split(
    cluster: None, model_folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folder = model_folders["qwen3_tied"]
    gradients = {name: await _gradient(folder, tmp_path, trainer) for name, trainer in LAYOUTS.items()}
    expected = gradients.pop("one rank, one microbatch")
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in expected.values()))
    assert norm > 0.01
    for name, found in gradients.items():
        distance = np.sqrt(sum(np.square(found[key] - expected[key]).sum() for key in expected))
        assert distance / norm <= 1e-5, f"{name}: relative difference {distance / norm:.1e}"


def _groups() -> list[TrajectoryGroup]:
    """Five groups of uneven size and length; one trajectory is invalid, one prompt is long."""
    generator = np.random.default_rng(3)
    groups = []
    for row, (prompt_length, lengths) in enumerate(
        [(3, [1, 9, 4]), (25, [2]), (6, [12, 12, 1, 7]), (2, [5, 3]), (9, [11])]
    ):
        trajectories = [
            Trajectory(
                Completion(
                    generator.integers(3, 60, length).tolist(), (-4 - generator.random(length)).tolist(), "stop", 1
                ),
                reward=1.0,
                advantage=float(generator.normal()),
            )
            for length in lengths
        ]
        groups.append(
            TrajectoryGroup(Prompt(row, generator.integers(3, 60, prompt_length).tolist(), "", ""), trajectories)
        )
    groups[2].trajectories[1].invalid = "timeout"
    return groups


async def _gradient(folder: pathlib.Path, run_dir: pathlib.Path, trainer: TrainerConfig) -> dict[str, np.ndarray]:
    config = Config(
        model=ModelConfig(path=str(folder)), data={"path": "unused.jsonl"}, trainer=trainer,
        checkpoint=CheckpointConfig(every=0),
    )  # fmt: skip
    orchestrator = Orchestrator("recipes.grpo", config, str(run_dir))
    try:
        await orchestrator.launch_trainer(PolicySource(str(folder)), 1.0)
        await orchestrator.configure_optimizer(trainer, 1)
        await orchestrator.forward_backward(_groups(), ClippedPolicyLoss(0.2, 0.28, 0.0))
        return (await orchestrator.trainer.call("gradients", deadline_s=60))[0]
    finally:
        await orchestrator.close()
