import os
import pathlib
import re

import pytest

from configs.load import ConfigurationError
from orchestrator import preflight as module
from orchestrator.preflight import preflight
from recipes.grpo import Config

WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"


@pytest.fixture(autouse=True)
def this_machine_is_large_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 0)
    monkeypatch.setattr(module, "DISK_BYTES", 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config(folder: pathlib.Path, **fields: object) -> Config:
    return Config.model_validate({"output_dir": str(folder), **fields})


def problems(config: Config) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        preflight(config)
    return str(caught.value).splitlines()


def model_problem(folder: pathlib.Path, path: str) -> str:
    (line,) = problems(config(folder, model={"path": path}, data={"path": "rows.jsonl"}))
    return line


def write_model(folder: pathlib.Path, *files: str) -> pathlib.Path:
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_this_machine_passes(tmp_path: pathlib.Path):
    preflight(config(tmp_path))


def test_a_package_of_another_version_is_named_with_the_fix(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.VERSIONS, "ray", "2.6")
    (line,) = problems(config(tmp_path))
    assert line.startswith("ray 2.60")
    assert line.endswith("is installed, 2.6 is needed: run `make install`")


def test_a_short_version_matches_all_its_releases(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.VERSIONS, "ray", "2")
    preflight(config(tmp_path))


def test_a_missing_package_is_named_with_the_fix(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.VERSIONS, "no-such-package", "1.0")
    assert problems(config(tmp_path)) == [
        "no-such-package 1.0 is not installed: run `make install`, then use .venv/bin/python"
    ]


def test_another_build_of_the_same_package_will_do(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.VERSIONS, "no-such-package", "2.60.0")
    monkeypatch.setitem(module.ALTERNATIVES, "no-such-package", ("no-such-package", "ray"))
    preflight(config(tmp_path))


def test_every_problem_is_said_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.VERSIONS, "no-such-package", "1.0")
    monkeypatch.setitem(module.VERSIONS, "ray", "1.0")
    assert len(problems(config(tmp_path))) == 2


def test_a_whole_model_folder_and_a_hub_id_pass(tmp_path: pathlib.Path):
    folder = write_model(tmp_path, CONFIG, WEIGHTS, TOKENIZER)
    for path in (str(folder), "Qwen/Qwen3-0.6B"):
        preflight(config(tmp_path, model={"path": path}, data={"path": "rows.jsonl"}))


def test_a_missing_model_folder_is_named_with_the_fix(tmp_path: pathlib.Path):
    path = str(tmp_path / "absent")
    assert model_problem(tmp_path, path).startswith(f"model.path: {path} is not a folder: give a Hugging Face folder")


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ((WEIGHTS, TOKENIZER), "no config.json: give the folder that save_pretrained wrote"),
        ((CONFIG, TOKENIZER), "no weights (*.safetensors): give the folder that save_pretrained wrote"),
        ((CONFIG, WEIGHTS), "no tokenizer: save one there with tokenizer.save_pretrained"),
    ],
)
def test_what_a_model_folder_lacks_is_named_with_the_fix(tmp_path: pathlib.Path, files: tuple[str, ...], missing: str):
    path = str(write_model(tmp_path, *files))
    assert model_problem(tmp_path, path) == f"model.path: {path} has {missing}"


def test_an_output_folder_that_is_not_writable_is_named_with_the_fix(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert problems(config(tmp_path / "runs")) == [
        f"output_dir: {tmp_path} is not writable: set output_dir to a folder that is"
    ]


@pytest.mark.parametrize("below", ["", "runs"])
def test_an_output_folder_that_is_a_file_is_named(tmp_path: pathlib.Path, below: str):
    (tmp_path / "file").write_text("")
    (line,) = problems(config(tmp_path / "file" / below))
    assert line.startswith(f"output_dir: {tmp_path / 'file'}")


def test_an_output_folder_that_does_not_exist_yet_will_do(tmp_path: pathlib.Path):
    preflight(config(tmp_path / "a" / "b"))


def test_a_full_disk_is_named_with_the_fix(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DISK_BYTES", 1 << 60)
    (line,) = problems(config(tmp_path))
    assert line.startswith("output_dir: ")
    assert f"GiB are free in {tmp_path}, {1 << 30} are needed" in line


def test_too_little_memory_is_named_with_the_fix_unless_the_run_joins_a_cluster(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MEMORY_BYTES", 1 << 60)
    (line,) = problems(config(tmp_path))
    assert line.endswith(f"GiB of memory are free, {1 << 30} are needed: close other programs")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    preflight(config(tmp_path))


def test_a_tracker_that_is_not_installed_is_named(tmp_path: pathlib.Path):
    with pytest.raises(ConfigurationError, match="pip install trackio"):
        preflight(config(tmp_path, logging={"trackio_project": "rayfit"}))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: nothing answers there"),
        ("ray://head:10001", "give host:port of the head node's GCS"),
        ("", "give host:port"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named_before_ray_tries(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        preflight(Config(output_dir=str(tmp_path)))
