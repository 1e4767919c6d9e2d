"""Rayfit's GRPO loop against TRL's GRPOTrainer: the same model, data, hyperparameters and machine, in turns.

`python -m bench.loop_vs_trl [--steps 20] [--rounds 2] [--json]`, after `make bench-setup`. Every round runs Rayfit,
then TRL with each number of threads, each in a process of its own and from the same warm-started policy; the ratio
takes the number of threads with which TRL was faster. It needs a quiet machine: other work moves every time, that of
OpenMP with several threads most of all, so what else runs is measured before each run and reported. The ratio of the
fastest steps and the CPU seconds bear it better.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import psutil

from recipes import sort_task

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TRL_PYTHON = REPOSITORY / ".venv-trl" / "bin" / "python"
NUM_COMPLETIONS = 64 * 8
PREPARE_TIMEOUT_S = 600.0
START_TIMEOUT_S = 300.0
STEP_TIMEOUT_S = 30.0
QUIET_CPU_PERCENT = 10.0

# glibc gives freed tensors back to the kernel by default; keeping them saves TRL a fifth of its CPU time.
TRL_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2 * 10**9),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 10**9),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class BenchError(RuntimeError):
    """An arm could not run; the message says which, and how its output ended."""


@dataclasses.dataclass(slots=True)
class Inputs:
    """What both arms start from."""

    policy: pathlib.Path
    train: pathlib.Path
    eval: pathlib.Path


@dataclasses.dataclass(slots=True)
class Run:
    """One arm's run without its warm-up steps; `parts_s` is where the mean step went, for Rayfit alone.

    Run("rayfit", [0.34, 0.35], [3841.0, 3790.0], 0.66, 0.84, {"rollout": 0.16, "train": 0.17, ...})
    """

    arm: str
    seconds_per_step: list[float]
    tokens_per_step: list[float]
    cpu_s_per_step: float | None
    accuracy: float
    parts_s: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Summary:
    """All runs of one arm together."""

    arm: str
    median_s: float
    fastest_s: float
    p90_s: float
    tokens_per_s: float
    cpu_s_per_step: float | None
    accuracy: float


def prepare(folder: pathlib.Path) -> Inputs:
    """Write the sort task's rows and train the policy from which GRPO starts."""
    sort_task.export(folder, seed=0, num_train=4096, num_eval=256)
    overrides = ["run_name=bench-warm", "steps=1", f"output_dir={folder}", "checkpoint.every=0"]
    command = [sys.executable, "-m", "recipes.grpo", *overrides]
    run_process("the warm start", command, {}, folder / "warm.log", PREPARE_TIMEOUT_S)
    (policy,) = folder.glob(".cache/*/warm/policy")
    return Inputs(policy, folder / "train.jsonl", folder / "eval.jsonl")


def run_rayfit(inputs: Inputs, folder: pathlib.Path, round_index: int, steps: int, warmup: int) -> Run:
    name = f"bench-{round_index}"
    overrides = [
        f"model.path={inputs.policy}",
        f"data.path={inputs.train}",
        f"data.eval_path={inputs.eval}",
        "reward=recipes.rewards:exact_match",
        f"run_name={name}",
        f"output_dir={folder}",
        f"seed={round_index}",
        f"steps={steps}",
        "eval.every=0",
        "checkpoint.every=0",
    ]
    command = [sys.executable, "-m", "recipes.grpo", *overrides]
    timeout_s = START_TIMEOUT_S + STEP_TIMEOUT_S * steps
    run_process("Rayfit", command, {}, folder / f"{name}.log", timeout_s)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row.get("step", 0) > warmup and "time/step_s" in row]
    if len(measured) != steps - warmup:
        raise BenchError(f"{name}/metrics.jsonl has {len(measured)} steps after step {warmup}, not {steps - warmup}")
    cpu_s = [row["cpu/step_s"] for row in measured if "cpu/step_s" in row]
    parts = {
        "rollout": "time/rollout_wait_s",
        "score": "time/score_s",
        "train": "time/train_s",
        "refit": "time/refit_s",
    }
    return Run(
        arm="rayfit",
        seconds_per_step=[row["time/step_s"] for row in measured],
        tokens_per_step=[row["tokens/completion"] * NUM_COMPLETIONS for row in measured],
        cpu_s_per_step=statistics.mean(cpu_s) if cpu_s else None,
        accuracy=[row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1],
        parts_s={part: statistics.mean(row[key] for row in measured) for part, key in parts.items()},
    )


def run_trl(inputs: Inputs, folder: pathlib.Path, round_index: int, steps: int, warmup: int, threads: int) -> Run:
    output = folder / f"trl-{round_index}-{threads}.json"
    # -P keeps this folder's modules from shadowing libraries in the other environment.
    command = [str(TRL_PYTHON), "-P", str(REPOSITORY / "bench" / "trl_arm.py")]
    command += ["--model", str(inputs.policy), "--data", str(inputs.train), "--eval", str(inputs.eval)]
    command += ["--steps", str(steps), "--warmup", str(warmup), "--threads", str(threads)]
    command += ["--seed", str(round_index), "--output", str(output)]
    environment = {**TRL_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    timeout_s = START_TIMEOUT_S + STEP_TIMEOUT_S * steps
    run_process("TRL", command, environment, output.with_suffix(".log"), timeout_s)
    result = json.loads(output.read_text())
    return Run(
        arm=f"trl, {threads} thread{'s' if threads > 1 else ''}",
        seconds_per_step=result["seconds_per_step"][warmup:],
        tokens_per_step=result["tokens_per_step"][warmup:],
        cpu_s_per_step=result["cpu_seconds_per_step"],
        accuracy=result["accuracy"],
    )


def run_process(
    what: str, command: Sequence[str], environment: Mapping[str, str], log: pathlib.Path, timeout_s: float
) -> None:
    """Run a command at the root of the repository.

    Raises:
        BenchError: with the end of its output, when it fails or is not done after `timeout_s`.
    """
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{what} was not done after {timeout_s:.0f} s:\n{last_lines(log)}") from error
        finally:
            end_group(process)
    if process.returncode != 0:
        raise BenchError(f"{what} ended with exit code {process.returncode}:\n{last_lines(log)}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask what is left of a process and its children to end, then make it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            continue


def last_lines(log: pathlib.Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def summarise(runs: Sequence[Run]) -> Summary:
    seconds = [value for run in runs for value in run.seconds_per_step]
    cpu_s = [run.cpu_s_per_step for run in runs if run.cpu_s_per_step is not None]
    return Summary(
        arm=runs[0].arm,
        median_s=statistics.median(seconds),
        fastest_s=min(seconds),
        p90_s=sorted(seconds)[int(0.9 * (len(seconds) - 1))],
        tokens_per_s=sum(value for run in runs for value in run.tokens_per_step) / sum(seconds),
        cpu_s_per_step=statistics.mean(cpu_s) if cpu_s else None,
        accuracy=statistics.mean(run.accuracy for run in runs),
    )


def print_table(summaries: Sequence[Summary]) -> None:
    print(f"{'arm':16} {'s/step':>8} {'fastest':>8} {'p90':>8} {'tokens/s':>9} {'CPU s/step':>11} {'accuracy':>9}")
    for row in summaries:
        cpu = "-" if row.cpu_s_per_step is None else f"{row.cpu_s_per_step:.3f}"
        print(
            f"{row.arm:16} {row.median_s:8.3f} {row.fastest_s:8.3f} {row.p90_s:8.3f} "
            f"{row.tokens_per_s:9.0f} {cpu:>11} {row.accuracy:9.3f}"
        )


def mean_parts(runs: Sequence[Run]) -> dict[str, float]:
    """Where the mean step of all runs went, in seconds; what no part accounts for is `rest`."""
    step_s = statistics.mean(value for run in runs for value in run.seconds_per_step)
    parts = {part: statistics.mean(run.parts_s[part] for run in runs) for part in runs[0].parts_s}
    return {**parts, "rest": step_s - sum(parts.values())}


def report(
    rayfit_runs: Sequence[Run], trl_runs: Sequence[Sequence[Run]], others_cpu_percent: float
) -> dict[str, object]:
    """Print the table; return the figures for machines."""
    rayfit = summarise(rayfit_runs)
    trls = [summarise(runs) for runs in trl_runs]
    trl = min(trls, key=lambda summary: summary.median_s)
    parts = mean_parts(rayfit_runs)
    ratio = trl.median_s / rayfit.median_s
    ratio_fastest = min(summary.fastest_s for summary in trls) / rayfit.fastest_s
    print_table([rayfit, *trls])
    total_s = sum(parts.values())
    shares = ", ".join(f"{part} {1000 * value:.0f} ms ({value / total_s:.0%})" for part, value in parts.items())
    print(f"Rayfit's mean step: {shares}")
    print(f"TRL / Rayfit, median seconds per step: {ratio:.2f} ({trl.arm}); fastest: {ratio_fastest:.2f}")
    if others_cpu_percent > QUIET_CPU_PERCENT:
        print(f"NOT a quiet machine: other work used up to {others_cpu_percent:.0f} % of its CPU before a run")
    return {
        "ratio": ratio,
        "ratio_fastest": ratio_fastest,
        "others_cpu_percent": others_cpu_percent,
        "rayfit_s_per_step": rayfit.median_s,
        "trl_s_per_step": trl.median_s,
        "rayfit_tokens_per_s": rayfit.tokens_per_s,
        "trl_tokens_per_s": trl.tokens_per_s,
        "rayfit_cpu_s_per_step": rayfit.cpu_s_per_step,
        "trl_cpu_s_per_step": trl.cpu_s_per_step,
        "rayfit_accuracy": rayfit.accuracy,
        "trl_accuracy": trl.accuracy,
        "rayfit_parts_s": parts,
        "trl_arm": trl.arm,
        "trl_s_per_step_by_arm": {summary.arm: summary.median_s for summary in trls},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="GRPO steps of every run, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps of every run, not measured")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every arm")
    parser.add_argument("--trl-threads", type=int, nargs="+", default=[1, 2], help="OpenMP threads to try for TRL")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    if not 0 <= arguments.warmup < arguments.steps:
        parser.error(f"--warmup must be >= 0 and < --steps {arguments.steps}, got {arguments.warmup}")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {arguments.rounds}")
    if not TRL_PYTHON.exists():
        parser.error(f"{TRL_PYTHON} does not exist: run `make bench-setup` first")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    steps, warmup = arguments.steps, arguments.warmup
    rayfit_runs: list[Run] = []
    trl_runs: list[list[Run]] = [[] for _ in arguments.trl_threads]
    others_cpu_percent: list[float] = []
    with tempfile.TemporaryDirectory(prefix="rayfit-bench-") as name:
        folder = pathlib.Path(name)
        try:
            inputs = prepare(folder)
            for index in range(arguments.rounds):
                others_cpu_percent.append(psutil.cpu_percent(interval=2.0))
                rayfit_runs.append(run_rayfit(inputs, folder, index, steps, warmup))
                for threads, runs in zip(arguments.trl_threads, trl_runs, strict=True):
                    others_cpu_percent.append(psutil.cpu_percent(interval=2.0))
                    runs.append(run_trl(inputs, folder, index, steps, warmup, threads))
                print(f"round {index + 1} of {arguments.rounds} done", file=sys.stderr)
        except BenchError as error:
            sys.exit(f"loop_vs_trl: {error}")
    figures = report(rayfit_runs, trl_runs, max(others_cpu_percent))
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
