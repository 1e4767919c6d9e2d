"""Refits between actors that have a GPU each: NIXL and CUDA IPC across GPUs, NCCL in a group of its own.

Not yet run.
"""

import asyncio
import os
import pathlib
import signal
import time
from typing import Any

import pytest
import torch

from bench.refit import Bench
from bench.refit_gpu import gpu_arms, gpu_rig
from bench.refit_ours import OurEngine, OurTrainer
from bench.refit_rivals import Half, Meeting, Processes
from bench.refit_sides import EngineSide, Part, qwen3_parts
from configs.schema import TransportConfig
from orchestrator.errors import RayfitError
from orchestrator.weight_sync import WeightSync
from orchestrator.worker_group import WorkerGroup
from tests.integration.small_refit import Hardware, SmallRefit
from transport.buckets import Inflow

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

DEADLINE_S = 20.0
ONE_EACH = Hardware("cuda", 1.0)
HALF_EACH = Hardware("cuda", 0.5)


def start_processes(parts: list[Part], folder: pathlib.Path) -> Processes:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return gpu_rig(2).processes(parts, Meeting(folder, folder, folder, store.port))


@pytest.mark.parametrize("kind", ["nixl", "collective", "stream", "auto"])
async def test_an_engine_serves_every_version_of_a_trainer_on_another_gpu(cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 1, DEADLINE_S, 1, ONE_EACH) as refit:
        for version in (1, 2, 3):
            report = await refit.sync.refit(version)
            assert report.verified and report.quarantined == {}
            await refit.assert_serves(0, version)


@pytest.mark.parametrize("kind", ["nixl", "stream"])
async def test_two_train_ranks_and_two_engines_on_two_gpus(cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S, 2, HALF_EACH) as refit:
        for version in (1, 2, 3):
            assert (await refit.sync.refit(version)).quarantined == {}
            for engine in (0, 1):
                await refit.assert_serves(engine, version)


async def test_every_arm_of_the_bench_brings_the_right_bytes_through_many_buckets(
    cluster: None, tmp_path: pathlib.Path
) -> None:
    parts = qwen3_parts(1.0)
    await Bench(parts, gpu_arms(2), start_processes(parts, tmp_path)).run(repetitions=3, warmups=0)


def freezing_engine(side: EngineSide, meeting: Meeting) -> OurEngine:
    """Stops its process in the middle of version 2, with a broadcast under way on both GPUs."""
    load = Inflow.load

    def freeze_and_load(inflow: Inflow, index: int, version: int, seal: bytes | None) -> float:
        if (version, index) == (2, 2):
            os.kill(os.getpid(), signal.SIGSTOP)
        return load(inflow, index, version, seal)

    Inflow.load = freeze_and_load  # type: ignore[assignment, method-assign]
    return OurEngine(side, meeting)


async def test_a_broadcast_that_an_engine_froze_in_is_left_in_time_and_the_next_refit_heals(
    cluster: None, tmp_path: pathlib.Path
) -> None:
    """NCCL by itself would wait for ever, and its watchdog end the trainer's process."""
    parts = qwen3_parts(1.0)
    processes = start_processes(parts, tmp_path)
    groups = []
    for role, actor, make_half in (
        ("train", processes.trainer, OurTrainer),
        ("rollout", processes.engine, freezing_engine),
    ):
        await actor.install.remote("frozen", make_half, processes.meeting)
        groups.append(WorkerGroup[Any](role, [Half(actor, "frozen")], None, lambda *_: None))  # type: ignore[arg-type]
    pids = [(await actor.run.remote("describe")).result["pid"] for actor in (processes.trainer, processes.engine)]
    sync = WeightSync(groups[0], groups[1], TransportConfig(type="collective"), DEADLINE_S, 1, print)
    await sync.connect(DEADLINE_S)
    await sync.refit(1)
    start = time.monotonic()
    with pytest.raises(RayfitError):
        await sync.refit(2)
    assert time.monotonic() - start < DEADLINE_S + 5
    os.kill(pids[1], signal.SIGCONT)
    while groups[1].is_late(0):
        assert time.monotonic() - start < 3 * DEADLINE_S, "the engine still owes an answer"
        await asyncio.sleep(0.1)
    assert (await sync.refit(3)).quarantined == {}
    sides = [Half(actor, "side") for actor in (processes.trainer, processes.engine)]
    expected, actual = [(await side.remote("digests")).result for side in sides]
    assert actual == expected
    assert (await processes.trainer.run.remote("describe")).result["pid"] == pids[0]
