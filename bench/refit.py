"""Refits of a 0.6B model on one host: ours, what other frameworks do, and the memory speed that bounds both.

`python -m bench.refit [--arms a,b] [--repetitions 15] [--warmups 3] [--scale 1.0] [--json] [--plot PATH.svg]`. A refit
starts with the trainer's new fp32 shards and ends when the engine's live bf16 parameters hold their values: casting,
sending and loading count. The weights are random, in the 310 tensors of Qwen3-0.6B.

Every repetition runs each arm once, in an order rotated from one to the next. Two calibrations take turns with them, on
one thread of the trainer: M, a warm memcpy of the same number of bytes, and F, a warm cast of all shards into private
memory. Every refit moves new weights, and after each, outside the timing, the digest of each tensor in the engine must
equal that of its cast in the trainer. It needs a quiet machine.
"""

import argparse
import asyncio
import html
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table

from bench.refit_memory import ENGINE_DTYPE
from bench.refit_ours import our_arms
from bench.refit_rivals import Arm, BenchError, Half, Meeting, Process, Processes, rival_arms, within_deadline
from bench.refit_sides import EngineSide, Part, TrainerSide, qwen3_parts
from orchestrator.driver import WORKER_ENVIRONMENT

CALIBRATIONS = ("memcpy", "floor", "floor_one_thread")
QUIET_CPU_PERCENT = 10.0
ENVIRONMENT = {**WORKER_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True, slots=True)
class Rig:
    """How the two processes are made, what each asks of Ray, and which of the trainer's methods calibrate."""

    make_trainer: Callable[[list[Part]], TrainerSide]
    make_engine: Callable[[list[Part]], EngineSide]
    calibrations: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def processes(self, parts: list[Part], meeting: Meeting) -> Processes:
        actor: Any = ray.remote(Process).options(
            num_cpus=0, max_restarts=0, enable_tensor_transport=True, **self.options
        )
        return Processes(actor.remote(self.make_trainer, parts), actor.remote(self.make_engine, parts), meeting)


ON_CPU = Rig(TrainerSide, EngineSide, CALIBRATIONS)


class Bench:
    """Runs calibrations and arms in turns; `seconds` holds what each took, without warm-ups."""

    def __init__(
        self, parts: list[Part], arms: Sequence[Arm], processes: Processes, calibrations: tuple[str, ...] = ()
    ) -> None:
        self._parts, self._processes, self._calibrations = parts, processes, calibrations
        self._arms = {arm.name: arm for arm in arms}
        self._trainer, self._engine = Half(processes.trainer, "side"), Half(processes.engine, "side")
        self._version = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in (*calibrations, *self._arms)}

    async def run(self, repetitions: int, warmups: int) -> None:
        for arm in self._arms.values():
            await arm.connect(self._processes)
        names = list(self.seconds)
        for index in range(warmups + repetitions):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                seconds = await self._turn(name)
                if index >= warmups:
                    self.seconds[name].append(seconds)
            print(f"round {index + 1} of {warmups + repetitions} done", file=sys.stderr)

    async def _turn(self, name: str) -> float:
        """Seconds of one refit, or of one calibration, on weights that nobody has seen before."""
        self._version += 1
        await self._ask(self._trainer, "fill", self._version)
        if name in self._calibrations:
            return await self._ask(self._trainer, name)
        await self._ask(self._engine, "come_home")
        arm = self._arms[name]
        start = time.perf_counter()
        await arm.refit(self._version)
        seconds = time.perf_counter() - start
        await self._check(name)
        await arm.retire(self._version)
        return seconds

    async def _check(self, name: str) -> None:
        """Raises BenchError, naming arm and tensor, unless the engine holds what the trainer's shards cast to."""
        expected, actual = await asyncio.gather(self._ask(self._trainer, "digests"), self._ask(self._engine, "digests"))
        wrong = [part.name for part, a, b in zip(self._parts, expected, actual, strict=True) if a != b]
        if wrong:
            raise BenchError(
                f"{name}: version {self._version}: {wrong[0]} has other bytes in the engine than in the trainer "
                f"({len(wrong)} of {len(self._parts)} tensors differ)"
            )

    async def _ask(self, side: Half, method: str, *arguments: Any) -> Any:
        return (await within_deadline(side.run.remote(method, *arguments), method)).result


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of one arm over its repetitions; p95 by nearest rank."""

    median_s: float
    p95_s: float


def figures_of(seconds: Sequence[float]) -> Figures:
    return Figures(statistics.median(seconds), sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1])


def print_table(figures: Mapping[str, Figures], num_bytes: int) -> None:
    """For people: what each arm took, in seconds, in memcpys (M) and in casts (F)."""
    memcpy_s, floor_s = figures["memcpy"].median_s, figures["floor"].median_s
    table = Table(title=f"{num_bytes / 1e9:.2f} GB of bf16 from fp32 shards to live parameters")
    for column in ("arm", "median s", "p95 s", "x M", "x F", "GB/s"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in figures.items():
        ratios = (row.median_s / memcpy_s, row.median_s / floor_s, num_bytes / row.median_s / 1e9)
        table.add_row(name, f"{row.median_s:.4f}", f"{row.p95_s:.4f}", *(f"{value:.2f}" for value in ratios))
    Console(width=100).print(table)


def plot(figures: Mapping[str, Figures], num_bytes: int) -> str:
    """An SVG: a bar per arm for its median, a whisker to its p95, and dashed lines at M and F."""
    left, width, height = 220, 560, 26
    per_second = width / max(row.p95_s for row in figures.values())
    bottom = 50 + height * len(figures)
    drawn = [f'<text x="10" y="24" font-size="15">Refit of {num_bytes / 1e9:.2f} GB, seconds (median, p95)</text>']
    for name, label in (("memcpy", "M"), ("floor", "F")):
        x = left + figures[name].median_s * per_second
        drawn.append(f'<path d="M{x:.1f} 40V{bottom}" stroke="#888" stroke-dasharray="4 3"/>')
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{label}</text>')
    for index, (name, row) in enumerate(figures.items()):
        y = 45 + height * index
        bar, whisker = row.median_s * per_second, left + row.p95_s * per_second
        colour = "#999" if name in CALIBRATIONS else "#c58b5b" if name.startswith("rival_") else "#2f6fb0"
        drawn += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{html.escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{bar:.1f}" height="18" fill="{colour}"/>',
            f'<path d="M{left + bar:.1f} {y + 9}H{whisker:.1f}m0 -4v8" stroke="#333" fill="none"/>',
            f'<text x="{whisker + 6:.1f}" y="{y + 14}">{row.median_s:.4f}</text>',
        ]
    size = f'width="{left + width + 70}" height="{bottom + 24}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>\n"])


def start_ray(num_bytes: int) -> None:
    """Ray on this machine alone, with an object store that holds two versions in shared memory.

    Raises:
        BenchError: there is not enough shared memory for that and for a safetensors file.
    """
    store_bytes = 2 * num_bytes + (512 << 20)
    free_bytes = psutil.disk_usage("/dev/shm").free
    if free_bytes < store_bytes + num_bytes:
        needed = f"{(store_bytes + num_bytes) / 1e9:.1f}"
        raise BenchError(f"/dev/shm has {free_bytes / 1e9:.1f} GB free, {needed} are needed")
    os.environ |= ENVIRONMENT
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=store_bytes,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=True,
    )
    token = pathlib.Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)


@dataclass(frozen=True, slots=True)
class Trial:
    """How much is measured."""

    parts: list[Part]
    repetitions: int
    warmups: int
    disk: str

    @property
    def num_bytes(self) -> int:
        """What a refit brings to the engine."""
        return sum(part.size for part in self.parts) * ENGINE_DTYPE.itemsize


def measure(trial: Trial, arms: Sequence[Arm], rig: Rig) -> dict[str, Figures]:
    """Start Ray and both processes, run every arm, and leave nothing behind."""
    places = (None, "/dev/shm", trial.disk)
    folders = [tempfile.TemporaryDirectory(prefix="rayfit-bench-", dir=place) for place in places]
    try:
        start_ray(trial.num_bytes)
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        private, memory, on_disk = (pathlib.Path(folder.name) for folder in folders)
        processes = rig.processes(trial.parts, Meeting(private, memory, on_disk, store.port))
        bench = Bench(trial.parts, arms, processes, rig.calibrations)
        asyncio.run(bench.run(trial.repetitions, trial.warmups))
    finally:
        ray.shutdown()
        for folder in folders:
            folder.cleanup()
    return {name: figures_of(seconds) for name, seconds in bench.seconds.items()}


def parse_arguments(description: str, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(names), help="arms to run, by name, with commas; default: all")
    parser.add_argument("--repetitions", type=int, default=15, help="refits of every arm that are measured")
    parser.add_argument("--warmups", type=int, default=3, help="refits of every arm before these")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the model's hidden size, for quick trials")
    parser.add_argument("--disk", default="/var/tmp", help="folder on a disk, for the arm that writes to one")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--plot", type=pathlib.Path, help="write a bar plot (SVG) to this file")
    arguments = parser.parse_args()
    arguments.arms = [name for name in arguments.arms.split(",") if name]
    if unknown := [name for name in arguments.arms if name not in names]:
        parser.error(f"--arms: no arm is called {unknown[0]}; there are {', '.join(names)}")
    if arguments.repetitions < 1 or arguments.warmups < 0:
        parser.error(f"--repetitions must be >= 1 and --warmups >= 0, got {arguments.repetitions}, {arguments.warmups}")
    if not 0 < arguments.scale <= 1:
        parser.error(f"--scale must be above 0 and at most 1, got {arguments.scale}")
    return arguments


def run(description: str, arms: Sequence[Arm], rig: Rig) -> None:
    """The command line of a refit bench on one rig."""
    arguments = parse_arguments(description, [arm.name for arm in arms])
    chosen = [arm for arm in arms if arm.name in arguments.arms]
    trial = Trial(qwen3_parts(arguments.scale), arguments.repetitions, arguments.warmups, arguments.disk)
    others_cpu_percent = psutil.cpu_percent(interval=2.0)
    try:
        figures = measure(trial, chosen, rig)
    except BenchError as error:
        sys.exit(f"refit: {error}")
    print_table(figures, trial.num_bytes)
    if others_cpu_percent > QUIET_CPU_PERCENT:
        print(f"NOT a quiet machine: other work used {others_cpu_percent:.0f} % of its CPU before the run")
    if arguments.plot:
        arguments.plot.write_text(plot(figures, trial.num_bytes))
    if arguments.json:
        rows = {arm.name: figures[arm.name] for arm in chosen}
        described = {
            name: {"median_s": row.median_s, "p95_s": row.p95_s, "bytes": trial.num_bytes} for name, row in rows.items()
        }
        calibrated = {f"{name}_s": figures[name].median_s for name in rig.calibrations}
        print(json.dumps({**calibrated, "arms": described}))


def main() -> None:
    run(str(__doc__), [*our_arms(), *rival_arms()], ON_CPU)


if __name__ == "__main__":
    main()
