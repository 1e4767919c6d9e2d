"""GRPO learns the embedded task, and the same loop with negated advantages does not."""

import json
import pathlib

from configs.schema import CheckpointConfig, EvaluationConfig, ModelConfig
from orchestrator.orchestrator import Orchestrator
from recipes.grpo import Config

STEPS = 12


async def test_accuracy_rises_and_with_negated_advantages_it_does_not(cluster: None, tmp_path: pathlib.Path) -> None:
    learned = await _accuracies("recipes.grpo", tmp_path)
    assert learned[0] < 0.25
    assert learned[-1] > 0.5
    negated = await _accuracies("tests.integration.negated_recipe", tmp_path)
    assert negated[0] == learned[0], "both start from the same policy and sample the same completions"
    assert negated[-1] <= negated[0]


async def _accuracies(recipe: str, output_dir: pathlib.Path) -> list[float]:
    """Held-out sampled accuracy before the first step and after the last."""
    run_dir = output_dir / recipe
    run_dir.mkdir()
    config = Config(
        output_dir=str(output_dir), run_name=recipe, steps=STEPS, model=ModelConfig(),
        eval=EvaluationConfig(every=STEPS), checkpoint=CheckpointConfig(every=0),
    )  # fmt: skip
    assert await Orchestrator(recipe, config, str(run_dir)).run() == STEPS
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["logprob_diff/max"] <= 1e-4 and row["refit/verified"] == 1 for row in rows if row["step"] > 0)
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
