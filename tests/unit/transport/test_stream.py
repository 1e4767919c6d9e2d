import os
import pathlib
import signal
import stat
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import zmq

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
from transport.audience import Audience
from transport.base import Link
from transport.deadline import PATIENCE_SHARE, WHOLE_SHARE
from transport.frames import (
    Filled,
    FrameError,
    Left,
    Loaded,
    Missed,
    Ready,
    encode,
    from_receiver,
    from_source,
    open_socket,
)
from transport.host import Owner
from transport.receipt import VerificationError
from transport.stream import StreamPublisher, StreamReceiver

a_child = pytest.fixture(child)
TIMEOUT_S = 20.0
FREEZE_TIMEOUT_S = 10.0
NUM_BUCKETS = 4
ANSWER_S = 60

Open = Callable[..., Sources]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """`opened(receiver_ranks, timeout_s)`: sources of small buffers, closed after the test."""
    monkeypatch.setattr("transport.stream.buffer_bytes", lambda device: BUFFER_BYTES)
    every: list[Sources] = []

    def open_them(receiver_ranks: list[int], timeout_s: float = TIMEOUT_S) -> Sources:
        every.append(open_sources("stream", receiver_ranks, timeout_s))
        return every[-1]

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is too long a path for a socket
        put_run_folders(monkeypatch, folder)
        yield open_them
        for sources in every:
            sources.close()


def put_run_folders(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path | str) -> None:
    monkeypatch.setattr("transport.run_folder.tempfile", types.SimpleNamespace(gettempdir=lambda: str(folder)))


def publisher_of(sources: Sources, rank: int) -> StreamPublisher:
    publisher = sources.publishers[rank]
    assert isinstance(publisher, StreamPublisher)
    return publisher


@pytest.mark.parametrize("verify", [True, False])
def test_every_receiver_gets_every_version_from_every_source(opened: Open, verify: bool):
    sources = opened([0, 1, 2])
    receivers = [sources.receiver(rank, turns=rank > 0) for rank in range(3)]
    assert [len(publisher_of(sources, rank)._packers) for rank in range(NUM_SOURCES)] == [NUM_BUCKETS] * NUM_SOURCES
    for version in range(1, 5):
        published, staged = sources.publish(version, verify), stage_all(receivers, version)
        assert all((packed.result(ANSWER_S).seal is not None) == verify for packed in published)
        assert all(landed.result(ANSWER_S).pull_s > 0 for landed in staged)
        for receiver in receivers:
            assert has(receiver, version)
            for rank, region in sources.regions.items():
                for view, piece in zip(receiver.views(version)[rank], region.pieces, strict=True):
                    assert view.shape == piece.copy.shape
                    assert view.untyped_storage().data_ptr() == receiver.image(version).untyped_storage().data_ptr()
    assert has(receivers[1], 3), "the other half still holds the version before"
    with pytest.raises(VerificationError, match="version 3 from train rank 0: its region holds version 4"):
        receivers[0].check(3)


@pytest.mark.parametrize(
    ("place", "what"),
    [(17, "embed has the digest [0-9a-f]{32}, published as"), (725, "the receipt of its digests was changed")],
)
def test_a_changed_byte_is_found_and_named_and_the_next_version_heals(opened: Open, place: int, what: str):
    sources = opened([0, 1])
    receivers = [sources.receiver(rank) for rank in range(2)]
    publisher = publisher_of(sources, 1)
    announce = publisher._audience.announce

    def corrupt_and_announce(seal: bytes | None) -> None:
        publisher._buffers[0].flat[place] ^= 0x20
        publisher._audience.announce = announce
        announce(seal)

    publisher._audience.announce = corrupt_and_announce
    published, staged = sources.publish(5), stage_all(receivers, 5)
    for landed in staged:
        with pytest.raises(VerificationError, match=f"version 5 from train rank 1: {what}"):
            landed.result(ANSWER_S)
    start = time.monotonic()
    for packed in published:
        packed.result(ANSWER_S)
    assert time.monotonic() - start < PATIENCE_SHARE * TIMEOUT_S, "the sources were told"
    with pytest.raises(
        VerificationError, match=r"version 5 from train rank [01]: its region holds a version that is being"
    ):
        receivers[0].check(5)
    published, staged = sources.publish(6), stage_all(receivers, 6)
    assert [future.result(ANSWER_S) and True for future in (*published, *staged)] == [True] * 4
    assert all(has(receiver, 6) for receiver in receivers)


@pytest.mark.parametrize("bucket", [0, 1, 2, 3])
def test_a_receiver_that_dies_keeps_nobody_waiting(opened: Open, a_child: Child, bucket: int):
    sources = opened([0, 1])
    survivor = sources.receiver(0)
    a_child.call(connect, "stream", replace(sources.link, receiver_rank=1), sources.regions, sources.offers)
    a_child.call(signal_itself, signal.SIGKILL, 2, bucket)
    with ThreadPoolExecutor() as threads:
        for version in (1, 2, 3):
            start = time.monotonic()
            doomed = threads.submit(a_child.call, stage, version) if version < 3 else None
            published, staged = sources.publish(version), stage_all([survivor], version)
            for future in (*published, *staged):
                future.result(ANSWER_S)
            assert has(survivor, version)
            assert time.monotonic() - start < PATIENCE_SHARE * TIMEOUT_S
            if version == 1:
                assert doomed.result(ANSWER_S) == "staged"
            elif version == 2:
                with pytest.raises(EOFError):
                    doomed.result(ANSWER_S)


def test_a_receiver_that_freezes_is_given_up_in_time_for_the_others_and_heals_when_it_wakes(
    opened: Open, a_child: Child
):
    sources = opened([0, 1], FREEZE_TIMEOUT_S)
    steady = sources.receiver(0)
    pid = a_child.call(connect, "stream", replace(sources.link, receiver_rank=1), sources.regions, sources.offers)
    a_child.call(signal_itself, signal.SIGSTOP, 1, 1)
    with ThreadPoolExecutor() as threads:
        frozen = threads.submit(a_child.call, stage, 1)
        published, staged = sources.publish(1), stage_all([steady], 1)
        for future in (*published, *staged):
            future.result(TIMEOUT_S * WHOLE_SHARE)
        assert has(steady, 1)
        start = time.monotonic()
        published, staged = sources.publish(2), stage_all([steady], 2)
        for future in (*published, *staged):
            future.result(ANSWER_S)
        assert has(steady, 2)
        assert time.monotonic() - start < PATIENCE_SHARE * FREEZE_TIMEOUT_S, "it is not waited for twice"
        os.kill(pid, signal.SIGCONT)
        assert frozen.result(ANSWER_S).startswith(("TimeoutError: version 1", "VerificationError: version 1"))
        woken = threads.submit(a_child.call, stage, 3)
        published, staged = sources.publish(3), stage_all([steady], 3)
        for future in (*published, *staged):
            future.result(ANSWER_S)
        assert woken.result(ANSWER_S) == "staged"
        assert has(steady, 3)


def test_a_receiver_that_missed_a_version_gets_the_next_one(opened: Open):
    sources = opened([0, 1], FREEZE_TIMEOUT_S)
    receivers = [sources.receiver(rank) for rank in range(2)]
    for version, takers in ((1, receivers), (2, receivers[:1]), (3, receivers)):
        published, staged = sources.publish(version), stage_all(takers, version)
        for future in (*published, *staged):
            future.result(ANSWER_S)
        assert all(has(receiver, version) for receiver in takers)


def test_a_stage_of_what_nobody_publishes_ends_in_time_and_names_the_train_ranks(opened: Open):
    sources = opened([0], timeout_s=1.0)
    receiver = sources.receiver(0)
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        receiver.stage(1, {})
    assert str(caught.value) == ("version 1: not here within 0.9 s: train rank 0 (0 of 4 buckets), 1 (0 of 4 buckets)")
    assert 0.9 <= time.monotonic() - start < 3
    published, staged = sources.publish(2), stage_all([receiver], 2)
    for future in (*published, *staged):
        future.result(ANSWER_S)
    assert has(receiver, 2)


def test_a_train_rank_whose_process_has_ended_is_named_at_once(opened: Open):
    sources = opened([0])
    gone = replace(sources.offers[1], owner=Owner(sources.offers[1].owner.pid, 1))
    sources.offers = {0: sources.offers[0], 1: gone}
    receiver = sources.receiver(0)
    published = sources.publish(1)[0]
    with pytest.raises(ConnectionError, match="version 1: the process of train rank 1 has ended"):
        publisher_of(sources, 1).close()
        receiver.stage(1, {})
    published.result(ANSWER_S)


def test_sockets_are_in_a_folder_of_their_own_that_goes_with_the_publisher(opened: Open):
    sources = opened([0])
    endpoint = pathlib.Path(sources.offers[1].endpoint.removeprefix("ipc://"))
    assert endpoint.is_socket()
    assert endpoint.parent.name.startswith("test-0-rank1.")
    assert stat.S_IMODE(endpoint.parent.stat().st_mode) == 0o700
    sources.close()
    assert not endpoint.parent.exists()


def test_a_path_that_is_too_long_for_a_socket_is_refused_with_the_fix(
    opened: Open, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    put_run_folders(monkeypatch, deep)
    with pytest.raises(ValueError, match="too long a path for a socket: set TMPDIR to a shorter folder"):
        opened([0])
    assert [entry for base in deep.iterdir() for entry in base.iterdir()] == []


class RawReceiver:
    """A receiver as its source sees it: frames."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self._rank, self._owner = rank, Owner.this_process()
        self.socket = open_socket(zmq.DEALER)
        self.socket.connect(endpoint)

    def ready(self, version: int, ticket: int) -> None:
        self.say(Ready(version, ticket, self._rank, self._owner.pid, self._owner.started_ticks))

    def say(self, frame: Ready | Loaded | Left) -> None:
        self.socket.send(encode(frame))

    def hear(self, timeout_s: float = 5.0) -> Filled | Missed | None:
        return from_source(self.socket.recv()) if self.socket.poll(round(timeout_s * 1e3)) else None


def test_a_publish_lasts_until_the_last_bucket_has_been_loaded(opened: Open):
    sources = opened([8])
    raw = RawReceiver(sources.offers[0].endpoint, 8)
    with ThreadPoolExecutor(1) as threads:
        published = threads.submit(publisher_of(sources, 0).publish, 1, False)
        raw.ready(1, 10)
        for bucket in range(NUM_BUCKETS):
            assert raw.hear() == Filled(10, bucket, None)
            with pytest.raises(TimeoutError):
                published.result(0.1)
            raw.say(Loaded(10, bucket))
        published.result(ANSWER_S)
    raw.socket.close()


def test_a_receiver_that_came_too_late_learns_it_at_once(opened: Open, tmp_path: pathlib.Path):
    sources = opened([0])
    source = open_socket(zmq.ROUTER)
    source.bind(f"ipc://{tmp_path}/socket")
    sources.offers = {**sources.offers, 1: replace(sources.offers[1], endpoint=f"ipc://{tmp_path}/socket")}
    with ThreadPoolExecutor(1) as threads:
        staged = threads.submit(sources.receiver(0).stage, 1, {})
        identity, data = source.recv_multipart()
        ready = from_receiver(data)
        assert isinstance(ready, Ready)
        source.send_multipart([identity, encode(Missed(ready.ticket - 1))])  # of a stage before
        with pytest.raises(TimeoutError):
            staged.result(0.2)
        assert not staged.done()
        source.send_multipart([identity, encode(Missed(ready.ticket))])
        with pytest.raises(TimeoutError, match="version 1: train rank 1 went on without this engine"):
            staged.result(TIMEOUT_S / 2)
        assert from_receiver(source.recv_multipart()[1]) == Left(ready.ticket)
    source.close()


@pytest.fixture
def audience(tmp_path: pathlib.Path) -> Iterator[Audience]:
    one = Audience(f"ipc://{tmp_path}/socket", Link("test-0", (4,), (8, 9), 2.0), 4)
    yield one
    one.close()


@pytest.fixture
def raw(tmp_path: pathlib.Path) -> Iterator[list[RawReceiver]]:
    receivers = [RawReceiver(f"ipc://{tmp_path}/socket", rank) for rank in (8, 9)]
    yield receivers
    for receiver in receivers:
        receiver.socket.close()


def test_late_news_of_an_old_version_count_for_nothing(audience: Audience, raw: list[RawReceiver]):
    audience.begin(1)
    for receiver, ticket in zip(raw, (10, 20), strict=True):
        receiver.ready(1, ticket)
    audience.announce(None)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(audience.wait_until_loaded, 1)
        assert [receiver.hear() for receiver in raw] == [Filled(10, 0, None), Filled(20, 0, None)]
        raw[0].say(Loaded(10, 0))
        raw[1].say(Loaded(19, 0))  # of another stage
        raw[1].say(Left(19))
        raw[1].say(Loaded(20, 1))  # a bucket that was not announced
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        raw[1].say(Loaded(20, 0))
        waiting.result(5)


def test_a_receiver_may_come_as_long_as_no_buffer_was_reused_and_is_told_when_it_is_too_late(
    audience: Audience, raw: list[RawReceiver]
):
    audience.begin(1)
    audience.announce(b"0" * 16)
    audience.announce(b"1" * 16)
    raw[0].ready(1, 10)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(audience.wait_until_loaded, 1)
        assert [raw[0].hear(), raw[0].hear()] == [Filled(10, 0, b"0" * 16), Filled(10, 1, b"1" * 16)]
        raw[0].say(Loaded(10, 0))
        waiting.result(5)  # rank 9 was given up after 0.5 s
    audience.announce(b"2" * 16)
    assert raw[0].hear() == Filled(10, 2, b"2" * 16)
    raw[1].ready(1, 20)
    raw[0].say(Loaded(10, 2))
    audience.wait_until_loaded(3)
    while raw[1].socket.poll(0) == 0:
        audience._receive(0.1)
    assert raw[1].hear() == Missed(20)
    audience.begin(2)
    assert audience._awaited == {8, 9}, "it is there, and expected for the next version"


def test_a_receiver_that_stages_another_version_keeps_nobody_waiting(audience: Audience, raw: list[RawReceiver]):
    audience.begin(2)
    raw[0].ready(2, 10)
    audience.announce(None)
    raw[0].say(Loaded(10, 0))
    raw[1].ready(1, 20)
    audience.wait_until_loaded(1)
    raw[1].ready(3, 21)
    assert audience._receive(5.0)
    assert audience._awaited == {8}
    assert raw[1].hear(0.1) is None


def test_a_receiver_that_was_given_up_gets_no_further_bucket(audience: Audience, raw: list[RawReceiver]):
    audience.begin(1)
    for receiver, ticket in zip(raw, (10, 20), strict=True):
        receiver.ready(1, ticket)
        assert audience._receive(5.0)
    audience.announce(None)
    audience.announce(None)
    assert [raw[1].hear(), raw[1].hear()] == [Filled(20, 0, None), Filled(20, 1, None)]
    raw[0].say(Loaded(10, 0))
    audience.wait_until_loaded(1)
    audience.announce(None)
    raw[1].say(Loaded(20, 0))
    raw[0].say(Loaded(10, 2))
    audience.wait_until_loaded(3)
    while raw[1].socket.poll(0) == 0:
        audience._receive(0.1)
    assert raw[1].hear() == Missed(20)
    assert raw[1].hear(0.1) is None


def test_a_source_whose_receivers_are_slow_gives_up_at_its_deadline_and_names_them(
    audience: Audience, raw: list[RawReceiver]
):
    audience.begin(7)
    for receiver, ticket in zip(raw, (10, 20), strict=True):
        receiver.ready(7, ticket)
    with pytest.raises(TimeoutError) as caught, ThreadPoolExecutor(1) as threads:
        for bucket in range(20):
            audience.announce(None)
            raw[0].say(Loaded(10, bucket))
            threads.submit(lambda bucket=bucket: (time.sleep(0.3), raw[1].say(Loaded(20, bucket))))
            audience.wait_until_loaded(bucket + 1)
    assert str(caught.value).startswith("rollout ranks [9] had not loaded bucket ")
    assert str(caught.value).endswith(" of version 7 from train rank 4 within 1.8 s")


def test_a_frame_that_is_none_is_refused_loudly(audience: Audience, raw: list[RawReceiver]):
    audience.begin(1)
    raw[0].socket.send(b"\x93\x01\x02\x03")
    with pytest.raises(FrameError, match="not a frame of this stream"):
        audience._receive(5.0)


def test_a_receiver_refuses_weights_that_its_buffers_do_not_hold(opened: Open):
    """Rank 1 never writes its buffers, but says so."""
    sources = opened([0], timeout_s=4.0)
    receiver = sources.receiver(0)
    assert isinstance(receiver, StreamReceiver)
    for packer in publisher_of(sources, 1)._packers:
        packer.write = lambda version, verify: sources_packed
    sources_packed = publisher_of(sources, 0)._packers[0].write(1, False)
    sources.publish(1, verify=False)
    with pytest.raises(VerificationError, match="version 1 from train rank 1: its region holds version 0"):
        receiver.stage(1, {})
    assert isinstance(receiver.image(1), torch.Tensor)
