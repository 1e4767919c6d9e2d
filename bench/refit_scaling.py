"""What a refit does not depend on: the number of tensors, of engines, of ranks, and what the engine is doing.

`python -m bench.refit_scaling [tensors] [engines] [plan] [stall] [--scale 0.5] [--repetitions 9] [--json]`. Each part
compares its arms in turns within one run, over shared memory, verification off unless the row says so:

* tensors: the same bytes in 1, 310, 10,000 and 36,945 tensors;
* engines: 1, 2, 4 and 8 on this host: how long the trainer is kept, and the memory that weights take in all of them;
* plan: 36,945 tensors from 64 train ranks to 32 engine ranks;
* stall: how long a decoding vLLM engine stands still for a refit, beside one decode step.
"""

import argparse
import asyncio
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

from bench.refit import start_ray
from bench.refit_memory import ENGINE_DTYPE
from bench.refit_ours import HoldingEngine, OurTrainer
from bench.refit_rivals import DEADLINE_S, Half, Meeting, Process
from bench.refit_sides import Part, TrainerSide, qwen3_parts
from configs.schema import ModelConfig, RolloutConfig, TransportConfig
from orchestrator.weight_sync import RefitReport, WeightSync
from orchestrator.worker_group import WorkerGroup
from transport.layout import Box, Layout, Placement, Shard, merge, share
from transport.plan import plan_transfer
from workers.engine import SamplingSpec
from workers.rollout import Request, RolloutWorker, make_vllm_engine

WARMUPS = 2
TENSOR_COUNTS = (1, 310, 10_000, 36_945)
ENGINE_COUNTS = (1, 2, 4, 8)
ALIGNED_ELEMENTS = 64
PLAN_TENSORS, PLAN_TRAIN_RANKS, PLAN_ENGINE_RANKS = 36_945, 64, 32


class BareEngine(RolloutWorker):
    """An engine rank whose first parameters are untouched memory, as those of a dummy-loaded engine are soon gone."""

    def __init__(self, side: Any, meeting: Meeting, parts: list[Part]) -> None:
        held = {
            part.name: torch.nn.Parameter(torch.empty(part.shape, dtype=ENGINE_DTYPE), requires_grad=False)
            for part in parts
        }
        super().__init__(0, 1, functools.partial(HoldingEngine, held))


class PartedTrainer(OurTrainer):
    """The trainer's half for shards that are cut in another way than the side's own."""

    def __init__(self, side: TrainerSide, meeting: Meeting, parts: list[Part]) -> None:
        flat, first = side.flat_shards, 0
        shards = []
        for part in parts:
            shards.append(flat[first : first + part.size].view(part.shape))
            first += part.size
        super().__init__(Side(parts, shards), meeting)  # type: ignore[arg-type]


class Side:
    """What OurTrainer reads of a TrainerSide."""

    def __init__(self, parts: list[Part], shards: list[torch.Tensor]) -> None:
        self.parts, self.shards = parts, shards


def no_side(parts: list[Part]) -> None:
    """An engine process that shares nothing between its halves."""


def equal_parts(num_tensors: int, num_elements: int) -> list[Part]:
    size = num_elements // num_tensors // ALIGNED_ELEMENTS * ALIGNED_ELEMENTS
    return [Part(f"tensor.{index}", (size,), f"tensor.{index}", 0) for index in range(num_tensors)]


class Row:
    """One arm: a WeightSync between halves of its own, refitted in turns with the others."""

    def __init__(self, name: str, sync: WeightSync, verify: str) -> None:
        self.name, self.sync, self.verify = name, sync, verify
        self.seconds: list[float] = []
        self.reports: list[RefitReport] = []

    @classmethod
    async def connect(cls, name: str, trainer: Half, engines: list[Half], verify: str = "off") -> "Row":
        groups = [WorkerGroup[Any](role, halves, None, lambda *_: None) for role, halves in
                  (("train", [trainer]), ("rollout", engines))]  # fmt: skip
        sync = WeightSync(groups[0], groups[1], TransportConfig(type="shared_memory"), DEADLINE_S, 1, print)
        await sync.connect(DEADLINE_S)
        return cls(name, sync, verify)

    async def refit(self, version: int) -> None:
        self.sync.config = TransportConfig(type="shared_memory", verify=self.verify)
        start = time.perf_counter()
        report = await self.sync.refit(version)
        self.seconds.append(time.perf_counter() - start)
        self.reports.append(report)

    def median_s(self) -> float:
        return statistics.median(self.seconds[WARMUPS:])

    def blocked_s(self) -> float:
        return statistics.median(report.trainer_blocked_s for report in self.reports[WARMUPS:])


async def in_turns(rows: list[Row], repetitions: int) -> None:
    for version in range(1, repetitions + WARMUPS + 1):
        first = version % len(rows)
        for row in rows[first:] + rows[:first]:
            await row.refit(version)


def process_of(make_side: Callable[..., Any], parts: list[Part]) -> Any:
    actor: Any = ray.remote(Process).options(num_cpus=0, max_concurrency=2, enable_tensor_transport=True)
    return actor.remote(make_side, parts)


async def half_of(process: Any, name: str, make_half: Callable[..., Any]) -> Half:
    await process.install.remote(name, make_half, None)
    return Half(process, name)


async def measure_tensors(scale: float, repetitions: int) -> dict[str, Any]:
    parts = qwen3_parts(scale)
    num_elements = sum(part.size for part in parts)
    trainer, engine = process_of(TrainerSide, parts), process_of(no_side, [])
    rows = []
    for count in TENSOR_COUNTS:
        cut = equal_parts(count, num_elements)
        name = f"{count:,} tensors"
        sender = await half_of(trainer, name, functools.partial(PartedTrainer, parts=cut))
        receiver = await half_of(engine, name, functools.partial(BareEngine, parts=cut))
        rows.append(await Row.connect(name, sender, [receiver]))
    await in_turns(rows, repetitions)
    base = rows[0].median_s()
    return {row.name: {"median_s": row.median_s(), "of_one_tensor": row.median_s() / base} for row in rows}


async def measure_engines(scale: float, repetitions: int) -> dict[str, Any]:
    parts = qwen3_parts(scale)
    trainer = process_of(TrainerSide, parts)
    engines = [process_of(no_side, []) for _ in range(max(ENGINE_COUNTS))]
    merged = [Part(part.name, part.shape, part.name, 0) for part in parts]
    rows, shared_bytes = [], {}
    for count in ENGINE_COUNTS:
        name = f"{count} engines"
        sender = await half_of(trainer, name, functools.partial(PartedTrainer, parts=merged))
        receivers = [await half_of(e, name, functools.partial(BareEngine, parts=merged)) for e in engines[:count]]
        before = await weight_bytes([trainer, *engines])
        rows.append(await Row.connect(name, sender, receivers))
        await rows[-1].refit(0)
        await rows[-1].refit(1)
        shared_bytes[name] = await weight_bytes([trainer, *engines]) - before
    for row in rows:
        row.seconds, row.reports = [], []
    versions = range(2, repetitions + WARMUPS + 2)
    for version in versions:
        first = version % len(rows)
        for row in rows[first:] + rows[:first]:
            await row.refit(version)
    base, base_bytes = rows[0].blocked_s(), shared_bytes[rows[0].name]
    return {
        row.name: {
            "trainer_blocked_s": row.blocked_s(),
            "of_one_engine": row.blocked_s() / base,
            "refit_s": row.median_s(),
            "weight_pss_bytes": shared_bytes[row.name],
            "pss_of_one_engine": shared_bytes[row.name] / base_bytes,
        }
        for row in rows
    }


async def weight_bytes(processes: list[Any]) -> int:
    """Proportional set size of all the processes: a page that n of them map counts 1/n in each."""
    return sum([pss_bytes((await process.run.remote("describe")).result["pid"]) for process in processes])


def pss_bytes(pid: int) -> int:
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure_plan() -> dict[str, Any]:
    """Geometry alone: no actor and no byte."""
    shapes = [(1024, 1024), (2048, 768), (768, 2048), (1024,)]

    def side(num_ranks: int, dimension_of: Callable[[tuple[int, ...]], int]) -> list[Layout]:
        layouts = []
        for rank in range(num_ranks):
            layout = []
            for index in range(PLAN_TENSORS):
                shape = shapes[index % len(shapes)]
                dimension = dimension_of(shape)
                chunk = -(-shape[dimension] // num_ranks)
                start = [0] * len(shape)
                start[dimension] = rank * chunk
                length = tuple(chunk if d == dimension else n for d, n in enumerate(shape))
                shard = Shard(rank, Box(tuple(start), length), (0,) * len(shape))
                layout.append(Placement(f"tensor.{index}", shape, f"tensor.{index}", "bfloat16", (shard,)))
            layouts.append(share(layout))
        return layouts

    source = side(PLAN_TRAIN_RANKS, lambda shape: 0)
    destination = side(PLAN_ENGINE_RANKS, lambda shape: 1 if shape == (768, 2048) else 0)
    start = time.perf_counter()
    merged = merge(source), merge(destination)
    between = time.perf_counter()
    plan = plan_transfer(*merged)
    planned = time.perf_counter()
    copies = sum(1 for _ in plan.copies(3, 2))
    sliced = time.perf_counter()
    return {
        "merge_s": between - start, "plan_s": planned - between, "total_s": planned - start,
        "one_pair_s": sliced - planned, "copies_of_one_pair": copies,
    }  # fmt: skip


async def measure_stall(scale: float, repetitions: int) -> dict[str, Any]:
    """Refits under a vLLM engine that decodes eight long completions."""
    parts = qwen3_parts(scale)
    with tempfile.TemporaryDirectory(prefix="rayfit-bench-") as folder:
        write_config(pathlib.Path(folder), scale)
        make_engine = functools.partial(
            make_vllm_engine, ModelConfig(), RolloutConfig(dtype="bfloat16", max_tokens=4000), folder, 4096, 0
        )
        trainer = process_of(TrainerSide, parts)
        sender = await half_of(trainer, "stall", OurTrainer)
        options = {"num_cpus": 0, "max_concurrency": 4, "enable_tensor_transport": True}
        engine: Any = ray.remote(RolloutWorker).options(**options).remote(0, 1, make_engine)
        row = await Row.connect("stall", sender, [engine], verify="always")
        await row.refit(1)
        sampling = SamplingSpec(n=8, max_tokens=4000)
        await engine.run.remote("submit", [Request("0", list(range(100, 132)), sampling)], 0)
        for version in range(2, repetitions + 2):
            await asyncio.sleep(1.0)
            await row.refit(version)
        probes = [await timed_call(engine) for _ in range(2 * repetitions)]
    stalls = [report.engine_stall_s for report in row.reports[1:]]
    return {
        "stall_median_s": statistics.median(stalls),
        "stall_max_s": max(stalls),
        # A command waits for the rest of a step: on average half of one, at most a whole one.
        "decode_step_s": 2 * statistics.mean(probes),
        "decode_step_at_least_s": max(probes),
    }


async def timed_call(engine: Any) -> float:
    start = time.perf_counter()
    await engine.run.remote("submit", [], 0)
    return time.perf_counter() - start


def write_config(folder: pathlib.Path, scale: float) -> None:
    from transformers import Qwen3Config

    hidden = qwen3_parts(scale)[-1].shape[0]
    Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=151645, dtype="bfloat16", architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "tensors": lambda arguments: asyncio.run(measure_tensors(arguments.scale, arguments.repetitions)),
    "engines": lambda arguments: asyncio.run(measure_engines(arguments.scale, arguments.repetitions)),
    "plan": lambda arguments: {"plan": measure_plan()},
    "stall": lambda arguments: {"stall": asyncio.run(measure_stall(arguments.scale, arguments.repetitions))},
}


def print_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title=title)
    columns = list(next(iter(rows.values())))
    table.add_column("arm")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name, *(f"{row[column]:,.0f}" if row[column] > 1000 else f"{row[column]:.4f}" for column in columns)
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--scale", type=float, default=0.5, help="share of Qwen3-0.6B's hidden size")
    parser.add_argument("--repetitions", type=int, default=9, help="refits of every arm that are measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    results = {}
    for name in arguments.parts or PARTS:
        if name != "plan":
            start_ray(num_bytes=64 << 20)
        try:
            results[name] = PARTS[name](arguments)
        finally:
            ray.shutdown()
        print_table(name, results[name])
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
