"""Refits that go wrong, on real processes: who fails is quarantined by name within the deadline, the others serve the
new version, nobody serves a mixture, and the next refit heals."""

import os
import signal
import time

import pytest

from orchestrator.errors import RefitFailed, WorkerFailed
from tests.integration.small_refit import SmallRefit

TRANSPORTS = ["shared_memory", "nixl", "stream", "collective"]
DEADLINE_S = 3.0


MOMENTS = ["stage", "landed", "commit"]
"""As it begins to stage, between the bytes' arrival and verification's end, between verify and commit."""


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_an_engine_that_dies_at_any_moment_is_quarantined_and_the_others_go_on(cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 4, DEADLINE_S) as refit:
        assert (await refit.sync.refit(1)).quarantined == {}
        for engine, moment in enumerate(MOMENTS):
            await refit.fail_at(engine, moment, signal.SIGKILL)
            start = time.monotonic()
            report = await refit.sync.refit(engine + 2)
            assert time.monotonic() - start < DEADLINE_S
            assert list(report.quarantined) == list(range(engine + 1))
            assert f"rollout/{engine}" in report.quarantined[engine]
            for other in range(engine + 1, 4):
                await refit.assert_serves(other, engine + 2)
        assert list((await refit.sync.refit(5)).quarantined) == [0, 1, 2]
        await refit.assert_serves(3, 5)


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_a_frozen_engine_is_named_at_the_deadline_and_heals_when_it_wakes(cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S) as refit:
        version = 1
        await refit.sync.refit(version)
        for moment in MOMENTS:
            await refit.fail_at(0, moment, signal.SIGSTOP)
            start = time.monotonic()
            report = await refit.sync.refit(version := version + 1)
            assert time.monotonic() - start < DEADLINE_S + 2
            assert "rollout/0 did not answer" in report.quarantined[0]
            await refit.assert_serves(1, version)
            start = time.monotonic()
            report = await refit.sync.refit(version := version + 1)  # still frozen: nobody waits for it again
            assert time.monotonic() - start < DEADLINE_S
            assert list(report.quarantined) == [0]
            await refit.assert_serves(1, version)
            os.kill(refit.engine_pids[0], signal.SIGCONT)
            await refit.wait_for_answers(0)
            report = await refit.sync.refit(version := version + 1)
            assert report.quarantined == {}
            for engine in (0, 1):
                await refit.assert_serves(engine, version)


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_a_flipped_bit_is_found_and_named_and_nobody_serves_it(cluster: None, kind: str) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S) as refit:
        await refit.sync.refit(1)
        await refit.trainer.call_rank(1, "corrupt_next", deadline_s=20)
        with pytest.raises(RefitFailed, match=r"version 2 from train rank 1: layer.q_proj.weight has the digest"):
            await refit.sync.refit(2)
        assert refit.sync.life.serving() == []
        for engine in (0, 1):
            await refit.assert_serves(engine, 1)  # whole, though it gets no work
        assert (await refit.sync.refit(3)).quarantined == {}
        for engine in (0, 1):
            await refit.assert_serves(engine, 3)


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_a_trainer_that_dies_between_publish_and_the_last_stage_ends_the_refit_by_name(
    cluster: None, kind: str
) -> None:
    async with SmallRefit(kind, 2, DEADLINE_S) as refit:
        await refit.sync.refit(1)
        await refit.fail_at(0, "stage", signal.SIGKILL, refit.trainer_pids[0])
        start = time.monotonic()
        with pytest.raises((WorkerFailed, RefitFailed), match="train"):
            for version in (2, 3):  # shared memory outlives its owner: version 2 is whole, and 3 cannot be published
                await refit.sync.refit(version)
        assert time.monotonic() - start < 3 * DEADLINE_S
        for engine in refit.sync.life.serving():
            await refit.assert_serves(engine, 2)


async def test_a_frozen_trainer_is_named_at_the_deadline(cluster: None) -> None:
    from orchestrator.errors import DeadlineExceeded

    async with SmallRefit("shared_memory", 1, DEADLINE_S) as refit:
        await refit.sync.refit(1)
        os.kill(refit.trainer_pids[1], signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match="train/1 did not answer publish within 3 s"):
            await refit.sync.refit(2)
        os.kill(refit.trainer_pids[1], signal.SIGCONT)
        await refit.assert_serves(0, 1)
