"""Weights by broadcast, bucket by bucket, in process groups of their own: gloo on a CPU, NCCL on CUDA.

Each train rank has one group with the engine ranks of a channel, apart from torch's default group, so it lives beside
FSDP whatever its sizes. Two buffers in turn: bucket k + 1 is cast while bucket k is sent, and received while it is
loaded. Two-sided: a publish lasts until the receivers have the version. Members are called before every version
(transport/roll_call.py): a group that broke because one of them died or froze is replaced, and the others get the
version from a new one within the same refit.

The NCCL path has not been run yet.
"""

import datetime
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from transport.arena import DIGEST_BYTES, RECEIPT_HEADER_BYTES, Region, allocate, image
from transport.base import Copies, Landed, Landing, Link, Offers, Parameters
from transport.buckets import NUM_BUFFERS, Inflow, LandedImages, buffer_bytes, cut
from transport.deadline import OPERATION_SHARE, WHOLE_SHARE, Deadline
from transport.packing import Packed, Packer
from transport.receipt import VerificationError, digest
from transport.roll_call import Answer, Attendance, RollCall, Roster, StoreAddress

MAX_ATTEMPTS = 4
POLL_S = 1e-4
NUM_GLOO_DEVICES = 2
"""Connections between two members, a thread for each: one does not fill the loopback."""
NUM_GLOO_CONNECTS = 5
"""How often gloo tries to connect to a member that is frozen, for its timeout each time."""


class GroupBroken(RuntimeError):  # noqa: N818
    """A member of the group is gone or too slow."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One member's place in a group: rank 0 is the source."""

    group: str
    rank: int
    size: int
    address: str
    """Of this member's network interface."""


class Group:
    """Broadcasts from its rank 0. Every operation ends within `timeout_s`, or raises GroupBroken."""

    def __init__(self, seat: Seat, store: dist.Store, timeout_s: float, device: torch.device) -> None:
        self.seat = seat
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._ends_by_itself = device.type != "cuda"  # gloo does, NCCL does not
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0
        prefixed = dist.PrefixStore(seat.group, store)
        make: Any = self._nccl if device.type == "cuda" else self._gloo
        try:
            self._group: Any = make(prefixed, seat)
        except RuntimeError as error:
            raise GroupBroken(f"group {seat.group} did not meet: {error}") from error

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Starts it. Returns what `wait` takes."""
        try:
            return self._group.broadcast([tensor], self._options)
        except RuntimeError as error:
            raise GroupBroken(f"group {self.seat.group}: {error}") from error

    def wait(self, work: Any) -> None:
        try:
            if not self._ends_by_itself:
                self._wait_until_completed(work)
            work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"group {self.seat.group}: {error}") from error

    def _wait_until_completed(self, work: Any) -> None:
        """NCCL's own wait with a timeout marks the work as failed, for which its watchdog ends the process."""
        deadline = Deadline(self._timeout.total_seconds())
        while not work.is_completed():
            if deadline.left_s() == 0:
                raise GroupBroken(f"group {self.seat.group}: a member was not there after {deadline.seconds:.1f} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Ends what is under way."""
        self._group.abort()
        self._group = None

    def _gloo(self, store: dist.Store, seat: Seat) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=seat.address) for _ in range(NUM_GLOO_DEVICES)]
        options._threads, options._timeout = NUM_GLOO_DEVICES, self._timeout / NUM_GLOO_CONNECTS
        self._options.timeout = self._timeout
        return gloo(store, seat.rank, seat.size, options)

    def _nccl(self, store: dist.Store, seat: Seat) -> Any:
        """Not yet run. A watchdog of NCCL ends the process on its timeout, and on any error of NCCL's own unless
        TORCH_NCCL_ASYNC_ERROR_HANDLING is 0: `wait` comes before the first, orchestrator/driver.py sets the second."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout * 10
        return dist.ProcessGroupNCCL(store, seat.rank, seat.size, options)


@dataclass(frozen=True, slots=True)
class CollectiveOffer:
    """Where a source calls its receivers, and the length of its buffers."""

    store: StoreAddress
    num_bytes: int


class CollectiveTransport:
    one_sided = False

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        return image(parameters, copies)

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> "CollectivePublisher":
        return CollectivePublisher(link, region, sources, device)

    def receiver(
        self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers
    ) -> "CollectiveReceiver":
        return CollectiveReceiver(link, regions, landing, offers)


class CollectivePublisher:
    def __init__(self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._link, self._source_rank, self._device = link, region.source_rank, device
        self._num_bytes = buffer_bytes(device)
        self._buckets = cut(region, self._num_bytes)
        flats = [allocate(self._num_bytes, device) for _ in range(NUM_BUFFERS)]
        self._packers = [
            Packer(bucket.region, flats[index % NUM_BUFFERS], sources) for index, bucket in enumerate(self._buckets)
        ]
        self._roll_call = RollCall(link, region.source_rank)
        self._name, self._members = "", list[int]()
        self._group: Group | None = None

    def offer(self) -> CollectiveOffer:
        return CollectiveOffer(self._roll_call.address, self._num_bytes)

    def attach(self, offers: Offers) -> None: ...

    def publish(self, version: int, verify: bool) -> Packed:
        """Returns when every receiver has the version, except those that were given up: they fail by themselves.

        Raises:
            TimeoutError: groups broke again and again; names their members.
        """
        deadline = Deadline(self._link.timeout_s * WHOLE_SHARE)
        packed = Packed(None, 0.0, 0.0)
        wanting: list[int] = []
        broken = ""  # not the error: its frames would keep the group's connections open
        self._roll_call.begin()
        for attempt in range(MAX_ATTEMPTS):
            answers = self._roll_call.answers(version, attempt)
            wanting = [rank for rank, answer in answers.items() if not answer.has_version]
            if not wanting:
                return packed
            if deadline.left_s() == 0:
                break
            if wanting != self._members or {answers[rank].group for rank in wanting} != {self._name}:
                self._part()
                self._name, self._members = f"{version}/{attempt}/group", wanting
            self._roll_call.post(version, attempt, Roster(self._name, wanting, verify))
            try:
                packed = self._broadcast(self._meet(), version, verify)
            except GroupBroken as error:
                broken = str(error)
                self._part()
            except BaseException:
                self._part()  # it is out of step
                raise
        raise TimeoutError(
            f"version {version}: train rank {self._source_rank} did not get it to rollout ranks {wanting} within "
            f"{MAX_ATTEMPTS} attempts and {deadline.seconds:.1f} s; {broken}"
        )

    def close(self) -> None:
        self._part()

    def _broadcast(self, group: Group, version: int, verify: bool) -> Packed:
        works: list[Any] = []
        seals = b""
        pack_s = digest_s = 0.0
        for index, (bucket, packer) in enumerate(zip(self._buckets, self._packers, strict=True)):
            if index >= NUM_BUFFERS:
                group.wait(works[index - NUM_BUFFERS])
            packed = packer.write(version, verify)
            works.append(group.broadcast(packer.flat[: bucket.region.num_bytes]))
            seals += packed.seal or b""
            pack_s, digest_s = pack_s + packed.pack_s, digest_s + packed.digest_s
        for work in works[-NUM_BUFFERS:]:
            group.wait(work)
        return Packed(digest(seals) if verify else None, pack_s, digest_s)

    def _meet(self) -> Group:
        if self._group is None:
            seat = Seat(self._name, 0, 1 + len(self._members), self._roll_call.address.host)
            self._group = Group(seat, self._roll_call.store, self._link.timeout_s * OPERATION_SHARE, self._device)
        return self._group

    def _part(self) -> None:
        self._members = []
        if self._group is not None:
            self._group.close()
            self._group = None


class CollectiveReceiver:
    def __init__(self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers) -> None:
        self._landed = LandedImages(regions, landing)
        self._link = link
        self._sources = [_Source(link, region, offers[rank], self._landed) for rank, region in regions.items()]

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        start, deadline = time.perf_counter(), Deadline(self._link.timeout_s * WHOLE_SHARE)
        half = self._landed.half(version)
        with ThreadPoolExecutor(len(self._sources), thread_name_prefix="stage") as threads:
            arrivals = [threads.submit(source.bring, version, half, deadline) for source in self._sources]
        verify_s = max(arrival.result() for arrival in arrivals)
        return Landed(time.perf_counter() - start - verify_s, verify_s)

    def check(self, version: int) -> None:
        self._landed.check(version)

    def image(self, version: int) -> torch.Tensor:
        return self._landed.image(version)

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return self._landed.views(version)

    def close(self) -> None:
        for source in self._sources:
            source.part()


class _Source:
    """A receiver's side of one train rank: its roll call, their group, and its buckets' way into each landing image."""

    def __init__(self, link: Link, region: Region, offer: CollectiveOffer, landed: LandedImages) -> None:
        self._link, self._source_rank, self._device = link, region.source_rank, landed.flats[0].device
        self._buckets = cut(region, offer.num_bytes)
        self._flats = [allocate(offer.num_bytes, self._device) for _ in range(NUM_BUFFERS)]
        self._inflows = [Inflow(region, self._buckets, self._flats, flat) for flat in landed.flats]
        self._address = address_towards(offer.store)
        self._attendance = Attendance(link, region.source_rank, offer.store)
        self._group: Group | None = None

    def bring(self, version: int, half: int, deadline: Deadline) -> float:
        """Receive the version into one half of the landing. Returns the seconds that digests took.

        Raises:
            VerificationError: it is not what was published.
            TimeoutError: the source went on without this engine, or groups broke again and again.
        """
        inflow = self._inflows[half]
        broken = ""
        for attempt in range(MAX_ATTEMPTS):
            name = self._group.seat.group if self._group is not None else ""
            self._attendance.answer(version, attempt, Answer(has_version=False, group=name))
            roster = self._attendance.roster(version, attempt, deadline)
            if self._link.receiver_rank not in roster.ranks:
                raise TimeoutError(f"version {version}: train rank {self._source_rank} went on without this engine")
            try:
                verify_s, wrong = self._receive(self._meet(roster), inflow, version, roster.verify)
            except GroupBroken as error:
                broken = str(error)
                self.part()
                continue
            except BaseException:
                self.part()  # it is out of step
                raise
            self._attendance.answer(version, attempt + 1, Answer(has_version=True, group=roster.group))
            if wrong is not None:
                raise wrong
            return verify_s
        raise TimeoutError(
            f"version {version}: train rank {self._source_rank} did not get it here within {MAX_ATTEMPTS} attempts; "
            f"{broken}"
        )

    def _receive(
        self, group: Group, inflow: Inflow, version: int, verify: bool
    ) -> tuple[float, VerificationError | None]:
        """Take every bucket, to stay in step with the group, but load none after one that was wrong."""
        inflow.begin()
        regions = [bucket.region for bucket in self._buckets]
        works = [self._expect(group, index) for index in range(min(NUM_BUFFERS, len(regions)))]
        verify_s = 0.0
        wrong: VerificationError | None = None
        for index, region in enumerate(regions):
            group.wait(works[index])
            if wrong is None:
                try:
                    seal = seal_in(self._flats[index % NUM_BUFFERS], region) if verify else None
                    verify_s += inflow.load(index, version, seal)
                except VerificationError as error:
                    wrong = error
            if index + NUM_BUFFERS < len(regions):
                works.append(self._expect(group, index + NUM_BUFFERS))
        return verify_s, wrong

    def _expect(self, group: Group, index: int) -> Any:
        return group.broadcast(self._flats[index % NUM_BUFFERS][: self._buckets[index].region.num_bytes])

    def _meet(self, roster: Roster) -> Group:
        if self._group is None or self._group.seat.group != roster.group:
            self.part()
            rank = 1 + roster.ranks.index(self._link.receiver_rank)
            seat = Seat(roster.group, rank, 1 + len(roster.ranks), self._address)
            self._group = Group(seat, self._attendance.store, self._link.timeout_s * OPERATION_SHARE, self._device)
        return self._group

    def part(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def address_towards(store: StoreAddress) -> str:
    """This host's address on the network that the source is on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((store.host, store.port))  # sends nothing
        return str(probe.getsockname()[0])


def seal_in(flat: torch.Tensor, region: Region) -> bytes:
    """The seal of the receipt as it came: nothing goes beside a broadcast, receipt and pieces vouch for each other."""
    receipt_bytes = RECEIPT_HEADER_BYTES + len(region.pieces) * DIGEST_BYTES
    return digest(flat[region.receipt_offset : region.receipt_offset + receipt_bytes].cpu().numpy().data)
