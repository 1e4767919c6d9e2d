"""Whole runs through the command line, on a user's own model, data and reward."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"question": f"{n}{n + 7}=", "solution": n} for n in range(1, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: pathlib.Path, data: pathlib.Path, output: pathlib.Path, name: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "recipes.grpo", f"model.path={model}", f"data.path={data}", "data.prompt_column=question",
        "data.answer_column=solution", "reward=tests.integration.sample_rewards:share_of_small_digits",
        f"output_dir={output}", f"run_name={name}", f"steps={STEPS}", "algorithm.prompts_per_step=8",
        "algorithm.group_size=4", "algorithm.kl_coef=0.05", "eval.every=2", "eval.num_prompts=16", "checkpoint.every=0",
        "rollout.max_tokens=6", "trainer.learning_rate=1e-3", *more,
    ]  # fmt: skip


def metrics(run_dir: pathlib.Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    return [row for row in map(json.loads, lines) if row["step"] > 0]


@pytest.mark.timeout(900)
def test_a_stopped_run_resumes_at_the_next_step_and_samples_what_it_would_have(
    model_folders: dict[str, pathlib.Path], data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole = command(model_folders["qwen3_tied"], data, tmp_path, "whole")
    finished = subprocess.run(whole, timeout=280, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "step 4/4" in finished.stdout
    expected = metrics(tmp_path / "whole")

    stopped = command(model_folders["qwen3_tied"], data, tmp_path, "stopped")
    process = subprocess.Popen(stopped, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not metrics(tmp_path / "stopped") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert f" -m recipes.grpo model.path={model_folders['qwen3_tied']}" in errors
    assert errors.rstrip().endswith("run_name=stopped")
    assert 0 < len(metrics(tmp_path / "stopped")) < STEPS

    resumed = subprocess.run(stopped, timeout=280, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    found = metrics(tmp_path / "stopped")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for key in ("reward/mean", "tokens/completion", "weight_version", "samples/invalid", "loss", "kl", "grad_norm"):
        assert [row[key] for row in found] == [row[key] for row in expected], key

    assert all(row["logprob_diff/max"] <= 1e-4 for row in expected)
    assert all(row["refit/verified"] == 1 and row["staleness/max"] == 0 for row in expected)
    assert sum(row["samples/invalid"] for row in expected) > 0
    assert {key for row in expected for key in row} >= {
        "samples/invalid/exception",
        "samples/invalid/nan",
        "eval/accuracy",
    }
    assert expected[-1]["kl"] > 0

    last = tmp_path / "whole" / "checkpoints" / "step-00000004" / "policy"
    _, loading = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(loading.values()), loading
    assert AutoTokenizer.from_pretrained(last).decode([4, 5]) == "12"
    assert (tmp_path / "whole" / "report.html").stat().st_size > 10_000

    again = subprocess.run(whole, timeout=20, capture_output=True, text=True)
    assert again.returncode == 0 and "is finished at step 4" in again.stdout


def test_a_run_whose_worker_fails_names_the_cause_and_the_resume_command(
    model_folders: dict[str, pathlib.Path], data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = _ray_processes()
    broken = command(model_folders["llama"], data, tmp_path, "broken", "rollout.kv_cache_bytes=1")
    finished = subprocess.run(broken, timeout=280, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    *_, cause, logs, resume = finished.stderr.strip().splitlines()
    assert cause.startswith("error: WorkerFailed: rollout/") and "cache blocks" in cause
    assert logs.startswith("logs: ") and pathlib.Path(logs.removeprefix("logs: ")).exists()
    assert resume.endswith("run_name=broken")
    assert _ray_processes() <= before, "a Ray process outlived its run"


def _ray_processes() -> set[int]:
    lines = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    return {pid for pid, line in lines.items() if line.startswith("ray::") or "/ray/" in line}
