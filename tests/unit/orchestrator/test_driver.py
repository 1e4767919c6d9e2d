"""Bad input: exit code 2, one message that names the key, file or row and the fix, no stack trace, Ray not started."""

import json
import pathlib
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from orchestrator.driver import main

WITHOUT_FILES = {
    "trainer.lerning_rate=1": "trainer.lerning_rate: unknown key; did you mean trainer.learning_rate?",
    "trainer.lr=1": "trainer.lr: unknown key; trainer has num_workers, learning_rate",
    "trainer.num_workers=many": "trainer.num_workers: Input should be a valid integer",
    "algorithm.group_size=1": "algorithm.group_size=1 leaves nothing to compare",
    "missing.yaml": "missing.yaml: no such configuration file",
    "run_name=../elsewhere": "run_name: becomes a folder",
    "reward=exact_mach": "did you mean exact_match?",
    "reward=no_such_module:score": "No module named 'no_such_module'",
    "model.path=/nowhere": "data.path is not",
}


@pytest.mark.parametrize("argument", WITHOUT_FILES)
def test_bad_input_is_exit_2_with_one_message(
    argument: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("recipes.grpo", [f"output_dir={tmp_path}", argument]) == 2
    _check_message(capsys, WITHOUT_FILES[argument])


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"prompt": "1=", "answer": "1"}, {"answer": "1"}], [], "rows.jsonl line 2: no column 'prompt'"),
        ([{"prompt": "1=", "answer": "1"}], ["data.prompt_column=question"], "line 1: no column 'question'"),
        ([{"prompt": "1=", "answer": "1"}] * 9, ["eval.num_prompts=9"], "holding out 9 of 9 rows leaves none"),
        (
            [{"prompt": "1=", "answer": "1"}] * 9 + [{"prompt": "1111=", "answer": "1"}],
            ["eval.num_prompts=2", "data.max_prompt_tokens=4"],
            "row 10: the prompt has 5 tokens, data.max_prompt_tokens is 4",
        ),
    ],
)
def test_a_bad_row_is_named_before_ray_starts(
    rows: list[dict[str, str]],
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = _model_folder(tmp_path / "model")
    given = [f"output_dir={tmp_path / 'runs'}", f"model.path={model}", f"data.path={path}", *arguments]
    assert main("recipes.grpo", given) == 2
    _check_message(capsys, message)
    assert not (tmp_path / "runs").exists()


def test_help_is_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("recipes.grpo", ["--help"]) == 0
    assert "algorithm.group_size = 8" in capsys.readouterr().out


def _check_message(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def _model_folder(folder: pathlib.Path) -> pathlib.Path:
    """What the preflight looks for, and a tokenizer of one token a character."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    tokenizer = Tokenizer(models.WordLevel({"1": 0, "=": 1}, unk_token="="))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
