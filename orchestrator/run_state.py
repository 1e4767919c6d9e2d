"""What a run leaves in `output_dir/run_name`, and how the same command finds it again.

A checkpoint is written to a temporary folder and renamed when it is whole; the newest whole one is resumed from.
"""

import json
import pathlib
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from configs.load import ConfigurationError
from configs.schema import RecipeConfig

PREFIX = "step-"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run is: `step` is the next step to do."""

    step: int
    optim_steps: int
    weight_version: int
    identity: dict[str, Any]
    """What the run trains on what; see `identity_of`."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: pathlib.Path
    state: RunState

    @property
    def policy(self) -> str:
        """The Hugging Face folder."""
        return str(self.folder / "policy")


def identity_of(recipe: str, config: RecipeConfig) -> dict[str, Any]:
    """The recipe and the keys that a resumed run must share with its checkpoint: weights and rows depend on them."""
    values = config.model_dump(mode="json")
    kept = {name: values[name] for name in ("seed", "model", "data")}
    algorithm = values.get("algorithm", {})
    sizes = {name: algorithm[name] for name in ("prompts_per_step", "num_minibatches") if name in algorithm}
    return {"recipe": recipe} | kept | sizes


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raises ConfigurationError, naming the keys, if the checkpoint is of another recipe, model or data."""
    saved = checkpoint.state.identity
    different = [name for name in identity if identity[name] != saved.get(name)]
    if different:
        parts = [f"{name} is {identity[name]!r}, was {saved.get(name)!r}" for name in different]
        raise ConfigurationError(
            f"{checkpoint.folder} cannot be resumed: {'; '.join(parts)}. Set it back, or use another run_name"
        )


def newest_checkpoint(run_dir: pathlib.Path) -> Checkpoint | None:
    """The last whole checkpoint of a run, or None.

    Raises:
        ConfigurationError: it was written by another version.
    """
    folders = _whole_checkpoints(run_dir)
    if not folders:
        return None
    try:
        return Checkpoint(folders[-1], RunState(**json.loads((folders[-1] / STATE).read_text())))
    except (TypeError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{folders[-1] / STATE} is of another version: use another run_name") from error


def checkpoint_folder(run_dir: pathlib.Path, step: int) -> pathlib.Path:
    return run_dir / "checkpoints" / f"{PREFIX}{step:08d}"


def temporary_folder(run_dir: pathlib.Path, step: int) -> pathlib.Path:
    """An empty folder to write a checkpoint into."""
    folder = run_dir / "checkpoints" / f"tmp-{step:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_checkpoint(run_dir: pathlib.Path, temporary: pathlib.Path, state: RunState, keep: int) -> Checkpoint:
    """Complete a checkpoint by its state and its final name; remove all but the newest `keep`."""
    (temporary / STATE).write_text(json.dumps(asdict(state)))
    final = checkpoint_folder(run_dir, state.step)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in _whole_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(final, state)


def _whole_checkpoints(run_dir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder for folder in (run_dir / "checkpoints").glob(PREFIX + "*") if (folder / STATE).is_file())
