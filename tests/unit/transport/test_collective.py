import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.unit.transport.children import Child, child
from tests.unit.transport.small_channel import (
    BUFFER_BYTES,
    NUM_SOURCES,
    Sources,
    connect,
    has,
    open_sources,
    signal_itself,
    stage,
    stage_all,
)
from transport.base import Link, Receiver
from transport.collective import CollectivePublisher, CollectiveReceiver
from transport.deadline import PATIENCE_SHARE, WHOLE_SHARE, Deadline
from transport.packing import Packed
from transport.receipt import VerificationError
from transport.roll_call import MAX_MESSAGE_BYTES, Answer, Attendance, RollCall, StoreAddress

a_child = pytest.fixture(child)
TIMEOUT_S = 20.0
FREEZE_TIMEOUT_S = 10.0
NUM_BUCKETS = 4
ANSWER_S = 60

Open = Callable[..., Sources]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """`opened(receiver_ranks, timeout_s)`: sources of small buffers, closed after the test."""
    monkeypatch.setattr("transport.collective.buffer_bytes", lambda device: BUFFER_BYTES)
    every: list[Sources] = []

    def open_them(receiver_ranks: list[int], timeout_s: float = TIMEOUT_S) -> Sources:
        every.append(open_sources("collective", receiver_ranks, timeout_s))
        return every[-1]

    yield open_them
    for sources in every:
        sources.close()


def publisher_of(sources: Sources, rank: int) -> CollectivePublisher:
    publisher = sources.publishers[rank]
    assert isinstance(publisher, CollectivePublisher)
    return publisher


def groups(sources: Sources) -> list[str]:
    """The name of every train rank's group."""
    found = [publisher_of(sources, rank)._group for rank in range(NUM_SOURCES)]
    return [group.seat.group if group is not None else "" for group in found]


def refit(sources: Sources, receivers: list[Receiver], version: int, verify: bool = True) -> list[Packed]:
    """Publish and stage one version, and see that it is there. Returns what the train ranks announced."""
    published, staged = sources.publish(version, verify), stage_all(receivers, version)
    for landed in staged:
        landed.result(ANSWER_S)
    assert all(has(receiver, version) for receiver in receivers)
    return [packed.result(ANSWER_S) for packed in published]


@pytest.mark.parametrize("verify", [True, False])
def test_every_receiver_gets_every_version_from_every_source(opened: Open, verify: bool):
    sources = opened([5, 2, 9])
    receivers = [sources.receiver(rank, turns=rank > 2) for rank in (5, 2, 9)]
    assert [len(publisher_of(sources, rank)._packers) for rank in range(NUM_SOURCES)] == [NUM_BUCKETS] * NUM_SOURCES
    for version in range(1, 5):
        for packed in refit(sources, receivers, version, verify):
            assert (packed.seal is not None) == verify
        assert groups(sources) == ["1/0/group"] * 2, "one group serves every version"
    assert has(receivers[0], 3), "the other half still holds the version before"
    with pytest.raises(VerificationError, match="version 3 from train rank 0: its region holds version 4"):
        receivers[1].check(3)
    for view, piece in zip(receivers[0].views(4)[1], sources.regions[1].pieces, strict=True):
        assert view.shape == piece.copy.shape
        assert view.untyped_storage().data_ptr() == receivers[0].image(4).untyped_storage().data_ptr()


def test_it_lives_beside_the_default_group(opened: Open):
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=datetime.timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        default = dist.group.WORLD
        sources = opened([0])
        refit(sources, [sources.receiver(0)], 1)
        assert dist.group.WORLD is default
        assert dist.get_world_size() == 1
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("place", "what"),
    [(17, "embed has the digest [0-9a-f]{32}, published as"), (725, "embed has the digest [0-9a-f]{32}, published as")],
)
def test_a_changed_byte_is_found_and_named_and_the_next_version_heals(opened: Open, place: int, what: str):
    """Byte 17 is in a tensor's part; 725 in the receipt behind it, where a digest is."""
    sources = opened([0, 1])
    receivers = [sources.receiver(rank) for rank in range(2)]
    first = publisher_of(sources, 1)._packers[0]
    write = first.write

    def write_and_corrupt(version: int, verify: bool) -> Packed:
        packed = write(version, verify)
        first.flat[place] ^= 0x20
        return packed

    first.write = write_and_corrupt
    published, staged = sources.publish(5), stage_all(receivers, 5)
    for landed in staged:
        with pytest.raises(VerificationError, match=f"version 5 from train rank 1: {what}"):
            landed.result(ANSWER_S)
    start = time.monotonic()
    for packed in published:
        packed.result(ANSWER_S)
    assert time.monotonic() - start < PATIENCE_SHARE * TIMEOUT_S, "the sources were told"
    with pytest.raises(
        VerificationError, match="version 5 from train rank 1: its region holds a version that is being"
    ):
        receivers[0].check(5)
    first.write = write
    refit(sources, receivers, 6)
    assert groups(sources) == ["5/0/group"] * 2, "the group stayed in step"


def test_an_end_that_fails_otherwise_leaves_its_groups_and_the_others_get_the_version(
    opened: Open, monkeypatch: pytest.MonkeyPatch
):
    sources = opened([0, 1], FREEZE_TIMEOUT_S)
    receivers = [sources.receiver(rank) for rank in range(2)]
    refit(sources, receivers, 1)
    failing = receivers[1]
    assert isinstance(failing, CollectiveReceiver)

    def fail(*arguments: object) -> float:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        for source in failing._sources:
            patch.setattr(source._inflows[0], "load", fail)
        published, staged = sources.publish(2), stage_all(receivers, 2)
        with pytest.raises(MemoryError):
            staged[1].result(ANSWER_S)
        for future in (*published, staged[0]):
            future.result(ANSWER_S)
    assert [source._group for source in failing._sources] == [None, None]
    assert has(receivers[0], 2)
    refit(sources, receivers, 3)
    with monkeypatch.context() as patch:
        patch.setattr(publisher_of(sources, 1)._packers[1], "write", fail)
        published, _ = sources.publish(4), stage_all(receivers, 4)
        with pytest.raises(MemoryError):
            published[1].result(ANSWER_S)
    assert publisher_of(sources, 1)._group is None


@pytest.mark.parametrize("bucket", [0, 3])
def test_when_a_receiver_dies_the_others_get_the_version_from_a_new_group(opened: Open, a_child: Child, bucket: int):
    sources = opened([0, 1, 2])
    survivors = [sources.receiver(rank) for rank in (0, 2)]
    a_child.call(connect, "collective", replace(sources.link, receiver_rank=1), sources.regions, sources.offers)
    a_child.call(signal_itself, signal.SIGKILL, 2, bucket)
    with ThreadPoolExecutor() as threads:
        doomed = threads.submit(a_child.call, stage, 1)
        refit(sources, survivors, 1)
        assert doomed.result(ANSWER_S) == "staged"
        start = time.monotonic()
        doomed = threads.submit(a_child.call, stage, 2)
        refit(sources, survivors, 2)
        with pytest.raises(EOFError):
            doomed.result(ANSWER_S)
        assert time.monotonic() - start < PATIENCE_SHARE * TIMEOUT_S, "its process is gone, so it is not waited for"
        start = time.monotonic()
        refit(sources, survivors, 3)
        assert time.monotonic() - start < PATIENCE_SHARE * TIMEOUT_S
        assert {publisher_of(sources, rank)._group.seat.size for rank in range(NUM_SOURCES)} == {3}


def test_a_receiver_that_freezes_is_given_up_in_time_for_the_others_and_heals_when_it_wakes(
    opened: Open, a_child: Child
):
    sources = opened([0, 1], FREEZE_TIMEOUT_S)
    steady = sources.receiver(0)
    pid = a_child.call(connect, "collective", replace(sources.link, receiver_rank=1), sources.regions, sources.offers)
    a_child.call(signal_itself, signal.SIGSTOP, 1, 0)
    with ThreadPoolExecutor() as threads:
        frozen = threads.submit(a_child.call, stage, 1)
        start = time.monotonic()
        refit(sources, [steady], 1)
        assert time.monotonic() - start < FREEZE_TIMEOUT_S * WHOLE_SHARE
        start = time.monotonic()
        refit(sources, [steady], 2)
        assert time.monotonic() - start < PATIENCE_SHARE * FREEZE_TIMEOUT_S, "little patience a second time"
        os.kill(pid, signal.SIGCONT)
        assert frozen.result(ANSWER_S).startswith("TimeoutError: version 1")
        woken = threads.submit(a_child.call, stage, 3)
        refit(sources, [steady], 3)
        assert woken.result(ANSWER_S) == "staged"
    assert {publisher_of(sources, rank)._group.seat.size for rank in range(NUM_SOURCES)} == {3}


def test_a_receiver_that_missed_a_version_gets_the_next_one_in_a_group_of_all(opened: Open):
    sources = opened([0, 1], FREEZE_TIMEOUT_S)
    receivers = [sources.receiver(rank) for rank in range(2)]
    for version, takers in ((1, receivers), (2, receivers[:1]), (3, receivers), (4, receivers)):
        refit(sources, takers, version)
    assert groups(sources) == ["3/0/group"] * 2


def test_a_stage_of_what_nobody_publishes_ends_in_time_and_names_the_train_rank(opened: Open):
    sources = opened([0], timeout_s=2.0)
    receiver = sources.receiver(0)
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        receiver.stage(1, {})
    assert str(caught.value) == "version 1: train rank 0 called nobody within 1.8 s"
    assert 1.8 <= time.monotonic() - start < 4
    refit(sources, [receiver], 2)


def test_a_train_rank_that_dies_is_named_at_once(a_child: Child):
    link = Link("test-0", (6,), (0,), TIMEOUT_S)
    engine = Attendance(replace(link, receiver_rank=0), 6, a_child.call(call_the_roll, link))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(engine.roster, 1, 0, Deadline(TIMEOUT_S))
        time.sleep(0.2)
        start = time.monotonic()
        a_child.kill()
        with pytest.raises(ConnectionError, match="version 1: train rank 6 cannot be reached any more"):
            waiting.result(ANSWER_S)
        assert time.monotonic() - start < TIMEOUT_S / 2


def call_the_roll(state: dict[str, Any], link: Link) -> StoreAddress:
    state["roll_call"] = RollCall(link, 6)
    return state["roll_call"].address


def test_a_source_whose_group_never_meets_gives_up_and_names_the_engines(opened: Open):
    """Both engines answer every call, but never join a group."""
    sources = opened([3, 4], timeout_s=1.0)
    offer, publisher = sources.offers[0], publisher_of(sources, 0)
    with ThreadPoolExecutor(1) as threads:
        for rank in (3, 4):
            engine = Attendance(replace(sources.link, receiver_rank=rank), 0, offer.store)
            for attempt in range(9):
                engine.answer(1, attempt, Answer(False, ""))
        with pytest.raises(TimeoutError, match=r"train rank 0 did not get it to rollout ranks \[3, 4\] within"):
            threads.submit(publisher.publish, 1, True).result(ANSWER_S)


def test_a_receiver_that_came_too_late_learns_it_at_once(opened: Open):
    sources = opened([0, 1], FREEZE_TIMEOUT_S)
    receivers = [sources.receiver(rank) for rank in range(2)]
    refit(sources, receivers[:1], 1)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"version 1: train rank [01] went on without this engine"):
        receivers[1].stage(1, {})
    assert time.monotonic() - start < FREEZE_TIMEOUT_S / 2
    refit(sources, receivers, 2)


def test_answers_of_an_old_version_and_of_an_old_attempt_count_for_nothing():
    link = Link("test-0", (6,), (0,), 2.0)
    roll_call = RollCall(link, 6)
    engine = Attendance(replace(link, receiver_rank=0), 6, roll_call.address)
    engine.answer(1, 0, Answer(True, ""))
    engine.answer(2, 1, Answer(True, ""))
    roll_call.begin()
    assert roll_call.answers(2, 0) == {}
    roll_call.begin()
    engine.answer(3, 0, Answer(False, "1/0/group"))
    assert [answer.group for answer in roll_call.answers(3, 0).values()] == ["1/0/group"]
    roll_call.begin()
    assert not roll_call.store.check(["3/0/answer/0"]), "what was said is removed"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("x" * (MAX_MESSAGE_BYTES + 1), "a message of 65537 bytes, at most 65536 are allowed"),
        ('{"has_version": 1, "group": ""}', "Expected `bool`, got `int`"),
        ('{"has_version": true}', "missing required field"),
        ('{"has_version": true, "group": "", "x": 1}', "unknown field"),
        ('{"has_version": true, "group": ""', "truncated"),
    ],
)
def test_a_message_that_is_none_is_refused(message: str, error: str):
    roll_call = RollCall(Link("test-0", (6,), (0,), 2.0), 6)
    roll_call.begin()
    roll_call.store.set("1/0/answer/0", message)
    with pytest.raises(ValueError, match=error):
        roll_call.answers(1, 0)


def test_the_store_listens_on_one_address_alone():
    roll_call = RollCall(Link("test-0", (6,), (0,), 2.0), 6)
    listening: list[Any] = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening if c.laddr.port == roll_call.address.port] == ["127.0.0.1"]
