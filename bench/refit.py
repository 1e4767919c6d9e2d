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
import ctypes
import html
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
import xxhash
from rich.console import Console
from rich.table import Table

from bench.refit_ours import our_arms
from bench.refit_rivals import (
    ENGINE_DTYPE,
    Arm,
    BenchError,
    Half,
    Meeting,
    Process,
    Processes,
    private_buffer,
    rival_arms,
    within_deadline,
)
from orchestrator.driver import WORKER_ENVIRONMENT
from transport.base import Landing
from transport.packing import FusedCopy
from transport.team import set_team_size

CALIBRATIONS = ("memcpy", "floor", "floor_one_thread")
RANDOM_ELEMENTS = 16_777_213  # a prime, so that no two tensors begin at the same place of the random block
VERSION_STRIDE = 1_000_003
DIGEST_ELEMENTS = 1 << 20
QUIET_CPU_PERCENT = 10.0
ENVIRONMENT = {**WORKER_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True, slots=True)
class Part:
    """One of the trainer's tensors, and its place in the engine: the rows of `parameter` from `row` on.

    Part("model.layers.0.self_attn.k_proj.weight", (1024, 1024), "model.layers.0.self_attn.qkv_proj.weight", 2048)
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    row: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def qwen3_parts(scale: float) -> list[Part]:
    """The 310 tensors of Qwen3-0.6B, embeddings tied; `scale` is that of the hidden size, and so of the bytes."""
    hidden = max(16, round(1024 * scale / 16) * 16)
    intermediate, vocabulary, head, queries, keys = 3072, 151936, 128, 16 * 128, 8 * 128

    def whole(name: str, *shape: int) -> Part:
        return Part(name, shape, name, 0)

    parts = [whole("model.embed_tokens.weight", vocabulary, hidden)]
    for layer in range(28):
        prefix = f"model.layers.{layer}"
        qkv, gate_up = f"{prefix}.self_attn.qkv_proj.weight", f"{prefix}.mlp.gate_up_proj.weight"
        parts += [
            whole(f"{prefix}.input_layernorm.weight", hidden),
            Part(f"{prefix}.self_attn.q_proj.weight", (queries, hidden), qkv, 0),
            Part(f"{prefix}.self_attn.k_proj.weight", (keys, hidden), qkv, queries),
            Part(f"{prefix}.self_attn.v_proj.weight", (keys, hidden), qkv, queries + keys),
            whole(f"{prefix}.self_attn.q_norm.weight", head),
            whole(f"{prefix}.self_attn.k_norm.weight", head),
            whole(f"{prefix}.self_attn.o_proj.weight", hidden, queries),
            whole(f"{prefix}.post_attention_layernorm.weight", hidden),
            Part(f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden), gate_up, 0),
            Part(f"{prefix}.mlp.up_proj.weight", (intermediate, hidden), gate_up, intermediate),
            whole(f"{prefix}.mlp.down_proj.weight", hidden, intermediate),
        ]
    return [*parts, whole("model.norm.weight", hidden)]


class TrainerSide:
    """What the trainer's halves share: the fp32 `shards`, and their places in the bf16 buffer `flat` (uint8).

    Shards and `packed` have the parts' shapes and order. `flat` keeps nothing from one refit to the next.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        sizes = [part.size for part in parts]
        self.flat_shards = private_buffer(sum(sizes) * torch.float32.itemsize).view(torch.float32)
        self.flat = private_buffer(sum(sizes) * ENGINE_DTYPE.itemsize)
        self.shards = [t.view(part.shape) for t, part in zip(self.flat_shards.split(sizes), parts, strict=True)]
        packed = self.flat.view(ENGINE_DTYPE).split(sizes)
        self.packed = [t.view(part.shape) for t, part in zip(packed, parts, strict=True)]
        set_team_size(num_processes=1)
        self._cast = FusedCopy(list(zip(self.packed, self.shards, strict=True)))
        self._random = torch.randn(RANDOM_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(0.02)

    def pack(self) -> None:
        """Cast every shard into its place in `flat`."""
        torch._foreach_copy_(self.packed, self.shards)

    def fill(self, version: int) -> None:
        """The optimiser's stand-in: new weights in every shard, a function of the version alone."""
        start, rest = version * VERSION_STRIDE % RANDOM_ELEMENTS, self.flat_shards
        while rest.numel():
            piece = self._random[start : start + rest.numel()]
            rest[: piece.numel()].copy_(piece)
            start, rest = 0, rest[piece.numel() :]

    def digests(self) -> list[str]:
        """xxh3_128 of every shard's cast, in the parts' order."""
        digests = []
        for shard in self.shards:
            state = xxhash.xxh3_128()
            for piece in shard.view(-1).split(DIGEST_ELEMENTS):
                state.update(piece.to(ENGINE_DTYPE).view(torch.uint8).numpy().data)
            digests.append(state.hexdigest())
        return digests

    def memcpy(self) -> float:
        """Seconds to copy as many bytes as a refit brings, from the first half of the shards' memory into `flat`."""
        start = time.perf_counter()
        ctypes.memmove(self.flat.data_ptr(), self.flat_shards.data_ptr(), self.flat.nbytes)
        return time.perf_counter() - start

    def floor(self) -> float:
        """Seconds to cast all shards into private memory, by as many threads as our own arms cast with."""
        start = time.perf_counter()
        self._cast.run(verify=False)
        return time.perf_counter() - start

    def floor_one_thread(self) -> float:
        """The same by one thread."""
        start = time.perf_counter()
        self.pack()
        return time.perf_counter() - start


class EngineSide:
    """What the engine's halves share: its fused live `parameters`, and `live`, the view of them that each part fills.

    An arm may turn a parameter to other memory (`parameter.data = ...`), and leave in `leftovers` what it need not free
    under the clock.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        num_rows = {part.parameter: part.row + part.shape[0] for part in parts}
        shapes = {part.parameter: (num_rows[part.parameter], *part.shape[1:]) for part in parts}
        sizes = [math.prod(shape) for shape in shapes.values()]
        pieces = private_buffer(sum(sizes) * ENGINE_DTYPE.itemsize).view(ENGINE_DTYPE).split(sizes)
        self._home = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        self.parameters = {name: torch.nn.Parameter(home, requires_grad=False) for name, home in self._home.items()}
        self.live = self._views()
        self.leftovers: Any = None
        self.landing: Landing | None = None

    def come_home(self) -> None:
        """Turn every parameter back to the engine's own memory, for the next arm."""
        for name, home in self._home.items():
            self.parameters[name].data = home

    def digests(self) -> list[str]:
        """xxh3_128 of what the live parameters hold of every part, in the parts' order."""
        return [xxhash.xxh3_128_hexdigest(view.reshape(-1).view(torch.uint8).numpy().data) for view in self._views()]

    def retire(self) -> None:
        self.leftovers = None

    def _views(self) -> list[torch.Tensor]:
        return [self.parameters[part.parameter].data.narrow(0, part.row, part.shape[0]) for part in self.parts]


def all_arms() -> list[Arm]:
    """Every arm, not yet connected, in the order of the table."""
    return [*our_arms(), *rival_arms()]


class Bench:
    """Runs calibrations and arms in turns; `seconds` holds what each took, without warm-ups."""

    def __init__(self, parts: list[Part], arms: Sequence[Arm], processes: Processes) -> None:
        self._parts, self._processes = parts, processes
        self._arms = {arm.name: arm for arm in arms}
        self._trainer, self._engine = Half(processes.trainer, "side"), Half(processes.engine, "side")
        self._version = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in (*CALIBRATIONS, *self._arms)}

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
        if name in CALIBRATIONS:
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
        table.add_row(name, f"{row.median_s:.3f}", f"{row.p95_s:.3f}", *(f"{value:.2f}" for value in ratios))
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
            f'<text x="{whisker + 6:.1f}" y="{y + 14}">{row.median_s:.3f}</text>',
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


def measure(parts: list[Part], arms: Sequence[Arm], repetitions: int, warmups: int, disk: str) -> dict[str, Figures]:
    """Start Ray and both processes, run every arm, and leave nothing behind."""
    num_bytes = sum(part.size for part in parts) * ENGINE_DTYPE.itemsize
    folders = [tempfile.TemporaryDirectory(prefix="rayfit-bench-", dir=place) for place in (None, "/dev/shm", disk)]
    try:
        start_ray(num_bytes)
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        private, memory, on_disk = (pathlib.Path(folder.name) for folder in folders)
        meeting = Meeting(private, memory, on_disk, store.port)
        process: Any = ray.remote(Process).options(num_cpus=0, max_restarts=0, enable_tensor_transport=True)
        processes = Processes(process.remote(TrainerSide, parts), process.remote(EngineSide, parts), meeting)
        bench = Bench(parts, arms, processes)
        asyncio.run(bench.run(repetitions, warmups))
    finally:
        ray.shutdown()
        for folder in folders:
            folder.cleanup()
    return {name: figures_of(seconds) for name, seconds in bench.seconds.items()}


def parse_arguments(names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def main() -> None:
    arms = all_arms()
    arguments = parse_arguments([arm.name for arm in arms])
    chosen = [arm for arm in arms if arm.name in arguments.arms]
    parts = qwen3_parts(arguments.scale)
    num_bytes = sum(part.size for part in parts) * ENGINE_DTYPE.itemsize
    others_cpu_percent = psutil.cpu_percent(interval=2.0)
    try:
        figures = measure(parts, chosen, arguments.repetitions, arguments.warmups, arguments.disk)
    except BenchError as error:
        sys.exit(f"refit: {error}")
    print_table(figures, num_bytes)
    if others_cpu_percent > QUIET_CPU_PERCENT:
        print(f"NOT a quiet machine: other work used {others_cpu_percent:.0f} % of its CPU before the run")
    if arguments.plot:
        arguments.plot.write_text(plot(figures, num_bytes))
    if arguments.json:
        rows = {arm.name: figures[arm.name] for arm in chosen}
        described = {name: {"median_s": r.median_s, "p95_s": r.p95_s, "bytes": num_bytes} for name, r in rows.items()}
        calibrated = {f"{name}_s": figures[name].median_s for name in CALIBRATIONS}
        print(json.dumps({**calibrated, "arms": described}))


if __name__ == "__main__":
    main()
