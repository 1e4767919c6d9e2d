from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.unit.workers.local_transport import HoldingEngine, LocalReceiver, LocalTransport
from transport.base import Link, Parameters
from transport.layout import Box, Placement, Shard
from transport.packing import Packed
from transport.plan import plan_transfer
from transport.receipt import VerificationError
from workers.weights import Inlet, Outlet, WeightReceiver, WeightSender, make_landing

CPU = torch.device("cpu")
PARAMETERS: Parameters = {"qk": ((6, 2), "bfloat16"), "norm": ((3,), "float32")}
BOTH_KINDS = pytest.mark.parametrize("turns", [True, False], ids=["turns", "copies"])


@dataclass
class Refit:
    """Two train ranks that hold half the rows of q and k each, rank 0 all of norm; and one engine rank."""

    turns: bool
    lands: bool

    def __post_init__(self) -> None:
        rows = {"q": (4, 0), "k": (2, 4)}
        held, wanted = [], []
        for name, (num, row) in rows.items():
            shards = tuple(Shard(rank, Box((rank * num // 2, 0), (num // 2, 2)), (0, 0)) for rank in (0, 1))
            held.append(Placement(name, (num, 2), name, "float32", shards))
            place = (Shard(0, Box((0, 0), (num, 2)), (row, 0)),)
            wanted.append(Placement(name, (num, 2), "qk", "bfloat16", place))
        whole = (Shard(0, Box((0,), (3,)), (0,)),)
        held.append(Placement("norm", (3,), "norm", "float32", whole))
        wanted.append(Placement("norm", (3,), "norm", "float32", whole))
        plan = plan_transfer(held, wanted)
        transport, link = LocalTransport(self.lands), Link("test-0", (0, 1), (0,), 20)
        self.regions = transport.arrange(PARAMETERS, {rank: list(plan.copies(rank, 0)) for rank in (0, 1)})
        self.shards = [
            {"q": torch.zeros(2, 2), "k": torch.zeros(1, 2), "norm": torch.zeros(3)},
            {"q": torch.zeros(2, 2), "k": torch.zeros(1, 2)},
        ]
        self.senders = [WeightSender(shards, CPU) for shards in self.shards]
        opened = [
            sender.open([Outlet(link, transport, region, 1)])
            for sender, region in zip(self.senders, self.regions.values(), strict=True)
        ]
        offers = {"test-0": {rank: offer["test-0"] for rank, offer in enumerate(opened)}}
        for sender in self.senders:
            sender.attach(offers | {"another channel": {}})
        self.engine = HoldingEngine(PARAMETERS, self.turns)
        self.receiver = WeightReceiver(Inlet(link, transport, self.regions, 1), offers["test-0"], self.engine)
        self.transport_end: Any = self.receiver._receiver
        self.last: dict[int, Packed] = {}

    def publish(self, version: int, verify: bool = True) -> dict[int, Packed]:
        """Train rank r publishes 10 x version + r everywhere."""
        packed = {}
        for rank, (shards, sender) in enumerate(zip(self.shards, self.senders, strict=True)):
            for shard in shards.values():
                shard.fill_(10 * version + rank)
            packed[rank] = sender.publish(version, verify).packed["test-0"]
        self.last = packed
        return packed

    def stage(self, version: int, verify: bool = True) -> Any:
        return self.receiver.stage(version, self.publish(version, verify))

    def commit(self, version: int) -> float:
        return self.receiver.commit(self.engine, version)

    def serves(self, version: int) -> bool:
        """Whether the engine serves that version, whole; 0: what it was made with."""
        ranks = [10.0 * version, 10.0 * version + 1] if version else [0.0]
        return self.engine.serves() == {"qk": ranks, "norm": ranks[:1]} and self.engine.weight_version == version


@pytest.fixture(params=[(True, False), (False, False), (True, True), (False, True)],
                ids=["turns", "copies", "turns-lands", "copies-lands"])  # fmt: skip
def refit(request: pytest.FixtureRequest) -> Refit:
    turns, lands = request.param
    return Refit(turns, lands)


def test_a_staged_version_is_served_from_its_commit_on_and_not_before(refit: Refit):
    for version in (1, 2, 3, 4):
        refit.stage(version)
        assert refit.serves(version - 1)
        refit.commit(version)
        assert refit.serves(version)


def test_rows_of_two_train_ranks_land_in_the_fused_parameter_each_in_its_place(refit: Refit):
    refit.stage(1)
    refit.commit(1)
    # q of rank 0, q of rank 1, k of rank 0, k of rank 1.
    assert refit.engine.parameters()["qk"].tolist() == [[v, v] for v in (10, 10, 11, 11, 10, 11)]


def test_staging_tells_its_seconds_and_the_bytes_of_the_weights_alone(refit: Refit):
    staged = refit.stage(1)
    assert (staged.pull_s, staged.verify_s) == (0.25, 0.5)
    assert staged.num_bytes == 6 * 2 * 2 + 3 * 4


def test_an_engine_that_turns_serves_from_the_buffer_and_one_that_copies_keeps_its_addresses():
    for turns in (True, False):
        refit = Refit(turns, lands=False)
        before = {name: tensor.data_ptr() for name, tensor in refit.engine.parameters().items()}
        flats = refit.transport_end._shared
        for version in (1, 2, 3):
            refit.stage(version)
            refit.commit(version)
            pointers = {name: tensor.data_ptr() for name, tensor in refit.engine.parameters().items()}
            first = flats[version % 2].data_ptr()
            # qk has 24 bytes and norm begins at the next multiple of 64.
            assert pointers == ({"qk": first, "norm": first + 64} if turns else before)


def test_an_engine_that_turns_copies_where_the_transport_has_no_image():
    refit = Refit(turns=True, lands=True)
    before = refit.engine.parameters()["qk"].data_ptr()
    refit.stage(1)
    refit.commit(1)
    assert refit.engine.parameters()["qk"].data_ptr() == before


def test_another_version_than_the_one_that_was_staged_last_is_refused_and_changes_nothing(refit: Refit):
    refit.stage(1)
    refit.stage(2)
    for version in (1, 3):
        with pytest.raises(VerificationError, match=f"^commit of version {version}, but 2 is staged$"):
            refit.commit(version)
        assert refit.serves(0)
    refit.commit(2)
    assert refit.serves(2)


def test_a_version_is_committed_only_once(refit: Refit):
    refit.stage(1)
    refit.commit(1)
    with pytest.raises(VerificationError, match=r"^commit of version 1, but None is staged$"):
        refit.commit(1)


def test_bytes_that_changed_on_the_way_are_refused_and_cannot_be_committed(refit: Refit):
    packed = refit.publish(1)
    flats = refit.senders[1]._publishers["test-0"].flats  # type: ignore[attr-defined]
    flats[1][refit.regions[1].pieces[1].offset] ^= 1
    with pytest.raises(VerificationError, match=r"^version 1 from train rank 1: k has the digest"):
        refit.receiver.stage(1, packed)
    with pytest.raises(VerificationError, match=r"^commit of version 1, but None is staged$"):
        refit.commit(1)
    assert refit.serves(0)


def test_a_failed_stage_takes_back_the_version_that_was_staged_before_it(refit: Refit):
    refit.stage(1)
    old = refit.last
    refit.publish(2)
    with pytest.raises(VerificationError):
        refit.receiver.stage(2, old)  # with the seals of version 1
    with pytest.raises(VerificationError, match="but None is staged"):
        refit.commit(1)


def test_without_seals_only_the_version_is_compared(refit: Refit):
    packed = refit.publish(1, verify=False)
    assert [one.seal for one in packed.values()] == [None, None]
    refit.receiver.stage(1, packed)
    with pytest.raises(VerificationError, match=r"its region holds version 1$"):
        refit.receiver.stage(3, packed)  # the same half
    refit.receiver.stage(1, packed)
    refit.commit(1)
    assert refit.serves(1)


@BOTH_KINDS
def test_a_version_that_was_overwritten_after_it_was_staged_is_not_committed(turns: bool):
    refit = Refit(turns, lands=False)
    refit.stage(1)
    refit.publish(3)  # in the same half
    with pytest.raises(VerificationError, match=r"^version 1 from train rank 0: its region holds version 3$"):
        refit.commit(1)
    assert refit.serves(0)


@BOTH_KINDS
def test_a_version_that_landed_is_committed_whatever_happens_to_the_trainers_half(turns: bool):
    refit = Refit(turns, lands=True)
    refit.stage(1)
    refit.publish(3)
    refit.commit(1)
    assert refit.serves(1)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def hold_up(refit: Refit) -> LocalReceiver:
    """The next stage calls wait, until `go_on` is set."""
    end: LocalReceiver = refit.transport_end
    end.entered.clear()
    end.go_on.clear()
    return end


def test_what_a_call_that_was_given_up_has_staged_is_not_what_the_next_one_commits(
    refit: Refit, thread: ThreadPoolExecutor
):
    end = hold_up(refit)
    packed = refit.publish(1)
    late = thread.submit(refit.receiver.stage, 1, packed)
    end.entered.wait(20)
    with pytest.raises(VerificationError, match="but None is staged"):
        refit.commit(1)  # it is still on its way
    end.go_on.set()
    late.result(20)
    with pytest.raises(VerificationError, match=r"^commit of version 2, but 1 is staged$"):
        refit.commit(2)
    refit.stage(2)
    refit.commit(2)
    assert refit.serves(2)


def test_a_stage_waits_for_the_one_that_was_given_up_and_is_what_counts(refit: Refit, thread: ThreadPoolExecutor):
    end = hold_up(refit)
    late = thread.submit(refit.receiver.stage, 1, refit.publish(1))
    end.entered.wait(20)
    end.entered.clear()
    newer = thread.submit(refit.receiver.stage, 2, refit.publish(2))
    assert not end.entered.wait(0.1)  # never two of them in one memory
    end.go_on.set()
    late.result(20)
    newer.result(20)
    with pytest.raises(VerificationError, match=r"^commit of version 1, but 2 is staged$"):
        refit.commit(1)
    refit.commit(2)
    assert refit.serves(2)


def test_a_stage_that_failed_lets_the_next_one_in(refit: Refit):
    with pytest.raises(VerificationError):
        refit.receiver.stage(1, refit.last)  # nothing has been published
    refit.stage(1)
    refit.commit(1)
    assert refit.serves(1)


def test_a_landing_is_double_only_for_an_engine_that_turns():
    for turns in (True, False):
        landing = make_landing(HoldingEngine(PARAMETERS, turns))
        assert landing.parameters == PARAMETERS
        flats = [landing.flat(version) for version in range(4)]
        assert len({flat.data_ptr() for flat in flats}) == (2 if turns else 1)
        assert flats[0].data_ptr() == flats[2].data_ptr()
        assert landing.parameters_in(flats[0])["qk"].shape == (6, 2)


def test_a_landing_has_room_for_what_lies_behind_the_parameters():
    landing = make_landing(HoldingEngine(PARAMETERS, turns=True))
    assert landing.flat(0, num_bytes=10_000).numel() == 12_288  # three pages
    assert landing.flat(2).numel() == 12_288
    assert landing.flat(1).numel() == 4096


def test_a_sender_publishes_on_every_channel_and_tells_how_long_it_was_kept():
    refit = Refit(turns=True, lands=True)
    sender = refit.senders[0]
    other = Link("test-1", (0,), (1,), 20)
    opened = sender.open([Outlet(other, LocalTransport(lands=True), refit.regions[0], 1)])
    sender.attach({"test-1": {0: opened["test-1"]}})
    publication = sender.publish(5, verify=True)
    assert publication.packed.keys() == {"test-0", "test-1"}
    assert publication.blocked_s >= sum(one.pack_s for one in publication.packed.values()) > 0
    assert publication.packed["test-0"].seal == publication.packed["test-1"].seal is not None


def test_both_ends_close_what_they_opened():
    refit = Refit(turns=True, lands=False)
    publisher: Any = refit.senders[0]._publishers["test-0"]
    refit.senders[0].close()
    refit.senders[0].close()
    refit.receiver.close()
    assert publisher.is_closed
    assert refit.transport_end.is_closed
