import pathlib

import pytest

from configs.load import ConfigurationError
from configs.schema import DataConfig, ModelConfig
from orchestrator.run_state import (
    RunState,
    check_identity,
    checkpoint_folder,
    finish_checkpoint,
    identity_of,
    newest_checkpoint,
    temporary_folder,
)
from recipes import grpo, sft

IDENTITY = identity_of("recipes.grpo", grpo.Config())


def save(run_dir: pathlib.Path, step: int, keep: int = 2, weights: str = "weights") -> None:
    temporary = temporary_folder(run_dir, step)
    (temporary / "policy").mkdir()
    (temporary / "policy" / "model.safetensors").write_text(weights)
    finish_checkpoint(run_dir, temporary, RunState(step, 2 * step, step + 1, IDENTITY), keep)


def names(run_dir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_new_run_has_no_checkpoint(tmp_path: pathlib.Path):
    assert newest_checkpoint(tmp_path / "absent") is None


def test_the_newest_checkpoint_is_found_with_its_state_and_policy(tmp_path: pathlib.Path):
    for step in (9, 10):
        save(tmp_path, step, weights=f"of {step}")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == RunState(step=10, optim_steps=20, weight_version=11, identity=IDENTITY)
    assert found.folder == checkpoint_folder(tmp_path, 10)
    assert (pathlib.Path(found.policy) / "model.safetensors").read_text() == "of 10"


def test_step_100_is_newer_than_step_99(tmp_path: pathlib.Path):
    for step in (99, 100):
        save(tmp_path, step)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state.step == 100


def test_finish_returns_what_a_resumed_run_finds(tmp_path: pathlib.Path):
    made = finish_checkpoint(tmp_path, temporary_folder(tmp_path, 4), RunState(4, 8, 5, 50), keep=1)
    assert made == newest_checkpoint(tmp_path)


def test_a_checkpoint_that_was_never_finished_is_not_found(tmp_path: pathlib.Path):
    save(tmp_path, 5)
    torn = temporary_folder(tmp_path, 10)
    (torn / "policy").mkdir()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state.step == 5


def test_a_folder_without_a_state_is_not_a_checkpoint(tmp_path: pathlib.Path):
    save(tmp_path, 5)
    checkpoint_folder(tmp_path, 10).mkdir()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state.step == 5


def test_a_finished_checkpoint_leaves_no_temporary_folder(tmp_path: pathlib.Path):
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005"]


def test_a_temporary_folder_starts_empty_after_a_crash(tmp_path: pathlib.Path):
    (temporary_folder(tmp_path, 5) / "half-written").write_text("x")
    assert list(temporary_folder(tmp_path, 5).iterdir()) == []


def test_only_the_newest_are_kept(tmp_path: pathlib.Path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]


def test_a_folder_without_a_state_does_not_push_out_a_whole_checkpoint(tmp_path: pathlib.Path):
    checkpoint_folder(tmp_path, 10).mkdir(parents=True)
    save(tmp_path, 5, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state.step == 5


def test_a_run_of_another_recipe_model_or_data_is_not_resumed(tmp_path: pathlib.Path):
    save(tmp_path, 4)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    check_identity(checkpoint, identity_of("recipes.grpo", grpo.Config(steps=900, eval={"every": 1})))
    with pytest.raises(ConfigurationError, match=r"recipe is 'recipes.sft', was 'recipes.grpo'.*another run_name"):
        check_identity(checkpoint, identity_of("recipes.sft", sft.Config()))
    other = grpo.Config(model=ModelConfig(path="other"), data=DataConfig(path="rows.jsonl"))
    with pytest.raises(ConfigurationError, match=r"model is .*'other'.*data is .*'rows.jsonl'"):
        check_identity(checkpoint, identity_of("recipes.grpo", other))
    with pytest.raises(ConfigurationError, match="prompts_per_step is 8, was 64"):
        check_identity(checkpoint, identity_of("recipes.grpo", grpo.Config(algorithm={"prompts_per_step": 8})))


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: pathlib.Path):
    save(tmp_path, 4)
    (checkpoint_folder(tmp_path, 4) / "state.json").write_text('{"step": 4, "epoch": 1}')
    with pytest.raises(ConfigurationError, match=r"state.json is of another version"):
        newest_checkpoint(tmp_path)
