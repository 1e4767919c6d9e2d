"""Refits between actors that share one GPU, over every transport that may: NIXL on CUDA memory, CUDA IPC, the object
store. Collectives are left out, as NCCL refuses two ranks on one GPU. Not yet run."""

import os
import pathlib
import signal

import pytest
import torch.distributed

from bench.refit import Bench
from bench.refit_gpu import gpu_arms, gpu_rig
from bench.refit_rivals import Meeting
from bench.refit_sides import qwen3_parts
from configs.schema import TransportConfig
from orchestrator.errors import RefitFailed
from tests.integration.small_refit import Hardware, SmallRefit

DEADLINE_S = 10.0


def shared_by(num_workers: int) -> Hardware:
    """One GPU for so many workers."""
    return Hardware("cuda", 100 // num_workers / 100)


@pytest.mark.parametrize("num_trainers", [1, 2])
@pytest.mark.parametrize("kind", ["nixl", "stream", "object_store"])
async def test_every_version_is_served_by_every_engine(one_gpu_cluster: None, kind: str, num_trainers: int) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S, num_trainers, shared_by(2 + num_trainers)) as refit:
        for version, verify in ((1, "always"), (2, "off"), (3, "always"), (4, "always")):
            refit.sync.config = TransportConfig(type=kind, verify=verify)  # type: ignore[arg-type]
            report = await refit.sync.refit(version)
            assert report.quarantined == {}
            assert report.verified == (verify == "always")
            for engine in (0, 1):
                await refit.assert_serves(engine, version)


async def test_auto_chooses_nixl_on_cuda_and_has_nothing_to_say(one_gpu_cluster: None) -> None:
    async with SmallRefit("auto", 1, DEADLINE_S, 1, shared_by(2)) as refit:
        assert [channel.choice.type for channel in refit.sync._channels] == ["nixl"]
        assert refit.notes == []
        await refit.sync.refit(1)
        await refit.assert_serves(0, 1)


@pytest.mark.parametrize("kind", ["nixl", "stream"])
async def test_an_engine_that_dies_while_it_stages_is_quarantined_and_the_other_goes_on(
    one_gpu_cluster: None, kind: str
) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S, 1, shared_by(3)) as refit:
        await refit.sync.refit(1)
        await refit.fail_at(0, "stage", signal.SIGKILL)
        for version in (2, 3):
            assert list((await refit.sync.refit(version)).quarantined) == [0]
            await refit.assert_serves(1, version)


@pytest.mark.parametrize("kind", ["nixl", "stream"])
async def test_an_engine_that_freezes_before_it_commits_heals_when_it_wakes(one_gpu_cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S, 1, shared_by(3)) as refit:
        await refit.sync.refit(1)
        await refit.fail_at(0, "landed", signal.SIGSTOP)
        assert list((await refit.sync.refit(2)).quarantined) == [0]
        await refit.assert_serves(1, 2)
        os.kill(refit.engine_pids[0], signal.SIGCONT)
        await refit.wait_for_answers(0)
        assert (await refit.sync.refit(3)).quarantined == {}
        for engine in (0, 1):
            await refit.assert_serves(engine, 3)


@pytest.mark.parametrize("kind", ["nixl", "stream"])
async def test_a_flipped_bit_is_found_and_named_and_nobody_serves_it(one_gpu_cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 1, DEADLINE_S, 2, shared_by(3)) as refit:
        await refit.sync.refit(1)
        await refit.trainer.call_rank(1, "corrupt_next", deadline_s=20)
        with pytest.raises(RefitFailed, match=r"version 2 from train rank 1: layer.q_proj.weight has the digest"):
            await refit.sync.refit(2)
        await refit.assert_serves(0, 1)
        assert (await refit.sync.refit(3)).quarantined == {}
        await refit.assert_serves(0, 3)


async def test_every_arm_of_the_bench_brings_the_right_bytes_through_many_buckets(
    one_gpu_cluster: None, tmp_path: pathlib.Path
) -> None:
    """0.11 GB, which the bench compares tensor by tensor after every refit."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parts = qwen3_parts(0.1)
    processes = gpu_rig(1).processes(parts, Meeting(tmp_path, tmp_path, tmp_path, store.port))
    await Bench(parts, gpu_arms(1), processes).run(repetitions=3, warmups=0)
