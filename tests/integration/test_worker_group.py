"""A call returns every rank's result, or an error that names the ranks at fault, within its deadline."""

import os
import signal
import time
from collections.abc import AsyncIterator

import pytest

from configs.load import ConfigurationError
from orchestrator.errors import DeadlineExceeded, PlacementFailed, WorkerFailed
from orchestrator.placement import actor_options, choose_device, place
from orchestrator.worker_group import WorkerGroup
from workers.worker import Timed, Worker


class Probe(Worker):
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank

    def add(self, number: int) -> int:
        return self.rank + number

    def raise_on(self, rank: int) -> None:
        if self.rank == rank:
            raise ValueError("the third row is bad\nand a second line")

    def sleep_on(self, rank: int, seconds: float) -> None:
        if self.rank == rank:
            time.sleep(seconds)

    def die_on(self, rank: int) -> None:
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)


class BornDead(Probe):
    def __init__(self, rank: int, world_size: int) -> None:
        raise FileNotFoundError("no such tokenizer")


spans: list[tuple[str, str, Timed]] = []


@pytest.fixture
async def group(cluster: None) -> AsyncIterator[WorkerGroup[Probe]]:
    placement = await place("probe", 3, 0.0, 30)
    launched = WorkerGroup.launch("probe", Probe, placement, actor_options(0.0), (), lambda *span: spans.append(span))
    yield launched
    launched.kill()


async def test_results_come_in_order_of_rank_and_every_call_leaves_a_span(group: WorkerGroup[Probe]) -> None:
    spans.clear()
    assert await group.call("add", 10, deadline_s=30) == [10, 11, 12]
    assert await group.scatter("add", [(3,), (2,), (1,)], deadline_s=30) == [3, 3, 3]
    assert await group.call_rank(2, "add", 5, deadline_s=30) == 7
    assert [(who, name) for who, name, _ in spans[:3]] == [("probe/0", "add"), ("probe/1", "add"), ("probe/2", "add")]
    assert all(timed.end_s >= timed.start_s > 0 for _, _, timed in spans)


async def test_an_exception_on_any_rank_surfaces_with_the_ranks_name(group: WorkerGroup[Probe]) -> None:
    with pytest.raises(WorkerFailed, match=r"^probe/1 failed in raise_on: ValueError: the third row is bad$"):
        await group.call("raise_on", 1, deadline_s=30)
    assert await group.call("add", 0, deadline_s=30) == [0, 1, 2]


async def test_a_late_rank_is_named_with_what_it_was_asked_and_for_how_long(group: WorkerGroup[Probe]) -> None:
    await group.call("add", 0, deadline_s=30)
    with pytest.raises(DeadlineExceeded, match=r"^probe/2 did not answer sleep_on within 1 s$"):
        await group.call("sleep_on", 2, 20.0, deadline_s=1)


async def test_a_killed_rank_is_named(group: WorkerGroup[Probe]) -> None:
    with pytest.raises(WorkerFailed, match=r"^probe/0 failed in die_on: the process died"):
        await group.call("die_on", 0, deadline_s=30)


async def test_a_constructor_that_fails_is_named_with_its_error(cluster: None) -> None:
    placement = await place("born", 1, 0.0, 30)
    launched = WorkerGroup.launch("born", BornDead, placement, actor_options(0.0), (), lambda *span: None)
    with pytest.raises(
        WorkerFailed, match=r"^born/0 failed in add: its start failed: FileNotFoundError: no such tokenizer$"
    ):
        await launched.call("add", 1, deadline_s=30)
    launched.kill()


async def test_what_does_not_fit_the_cluster_is_refused_at_the_deadline(cluster: None) -> None:
    with pytest.raises(PlacementFailed, match=r"train: 500 bundles of .* were not free within 1 s"):
        await place("train", 500, 0.0, 1)
    with pytest.raises(ConfigurationError, match=r"cluster.device=cuda: 4 GPUs are needed, the cluster has 0"):
        choose_device("cuda", 4)
    assert choose_device("auto", 4) == "cpu"
