"""Who is there for a broadcast: a source and its receivers agree on the members of a group before every version.

Through the source's own TCP store, in attempts. In each, every receiver answers, and the source posts the roster of
those that still want the version and the group that they meet in; who has it already answers so, and is done:

    attempt 0   answers: 3 wants, 4 wants, 5 wants     roster: group "7/0" of 3, 4 and 5     (5 dies: it breaks)
    attempt 1   answers: 3 wants, 4 has it             roster: group "7/1" of 3
    attempt 2   answers: 3 has it                      the version is published

A receiver that does not answer is given up, and waited for with little patience until it answers again.
"""

import contextlib
import datetime
import socket
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
import ray
import torch.distributed as dist
from msgspec import Meta

from transport.base import Link
from transport.deadline import Deadline, patience_s
from transport.host import Owner, host_identity

MAX_MESSAGE_BYTES = 1 << 16
LOOK_S = 0.2
"""How often a silent receiver of this host is looked after: does its process run?"""
SHORTEST_WAIT_S = 0.01

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, Meta(max_length=128)]
M = TypeVar("M")


class Attendant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A receiver's, once: the process that it is."""

    host: Name
    pid: Number
    started_ticks: Number


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A receiver's, in each attempt: has it the version, and which group is it in ("": none)?"""

    has_version: bool
    group: Name


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source's: rollout ranks that meet in `group`, the source being its rank 0 and they 1, 2, ... in order."""

    group: Name
    ranks: list[Number]
    verify: bool


@dataclass(frozen=True, slots=True)
class StoreAddress:
    host: str
    port: int


class RollCall:
    """The source's end; serves the store."""

    def __init__(self, link: Link, source_rank: int) -> None:
        self._link, self._source_rank = link, source_rank
        host = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
        # Torch's own listener would take connections on every interface.
        listener = socket.create_server((host, 0))
        self.address = StoreAddress(host, listener.getsockname()[1])
        timeout = datetime.timedelta(seconds=link.timeout_s)
        self.store = dist.TCPStore(
            host, self.address.port, is_master=True, wait_for_workers=False, timeout=timeout,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        self._trusted = set(link.receiver_ranks)
        self._awaited: set[int] = set()
        self._owners: dict[int, Owner] = {}
        self._posted: list[str] = []

    def begin(self) -> None:
        """Before a version's first attempt: all are awaited that live, what was said of the last version is removed."""
        for key in self._posted:
            self.store.delete_key(key)
        self._posted = []
        self._owners = {}
        for rank in self._link.receiver_ranks:
            if self.store.check([_attendant(rank)]):
                attendant = _decode(self.store.get(_attendant(rank)), Attendant)
                if attendant.host == host_identity():  # elsewhere, its process id means nothing here
                    self._owners[rank] = Owner(attendant.pid, attendant.started_ticks)
        self._awaited = {rank for rank in self._link.receiver_ranks if not self._has_ended(rank)}

    def answers(self, version: int, attempt: int) -> dict[int, Answer]:
        """What every receiver says, by rank in order; those that say nothing are given up for this version."""
        patience = {trusted: Deadline(patience_s(self._link.timeout_s, trusted)) for trusted in (True, False)}
        found: dict[int, Answer] = {}
        while missing := {rank: _answer(version, attempt, rank) for rank in sorted(self._awaited - found.keys())}:
            left_s = {rank: patience[rank in self._trusted].left_s() for rank in missing}
            with contextlib.suppress(dist.DistStoreError):  # not all have answered
                self.store.wait(list(missing.values()), _seconds(min(LOOK_S, *left_s.values())))
            for rank, key in missing.items():
                if self.store.check([key]):
                    found[rank] = _decode(self.store.get(key), Answer)
                    self._trusted.add(rank)
                elif left_s[rank] == 0 or self._has_ended(rank):
                    self._awaited.discard(rank)
                    self._trusted.discard(rank)
        self._posted += [_answer(version, attempt, rank) for rank in found]
        return dict(sorted(found.items()))

    def post(self, version: int, attempt: int, roster: Roster) -> None:
        self._posted.append(_roster(version, attempt))
        self.store.set(self._posted[-1], _encode(roster))

    def _has_ended(self, rank: int) -> bool:
        return rank in self._owners and not self._owners[rank].is_alive()


class Attendance:
    """A receiver's end of one source's roll call."""

    def __init__(self, link: Link, source_rank: int, address: StoreAddress) -> None:
        self._rank, self._source_rank = link.receiver_rank, source_rank
        timeout = datetime.timedelta(seconds=link.timeout_s)
        self.store = dist.TCPStore(address.host, address.port, is_master=False, timeout=timeout)
        process = Owner.this_process()
        self.store.set(_attendant(self._rank), _encode(Attendant(host_identity(), process.pid, process.started_ticks)))

    def answer(self, version: int, attempt: int, answer: Answer) -> None:
        self.store.set(_answer(version, attempt, self._rank), _encode(answer))

    def roster(self, version: int, attempt: int, deadline: Deadline) -> Roster:
        """Wait for the source's; the errors of a source that is late or gone name it."""
        key = _roster(version, attempt)
        try:
            self.store.wait([key], _seconds(deadline.left_s()))
            return _decode(self.store.get(key), Roster)
        except dist.DistStoreError as error:
            raise TimeoutError(
                f"version {version}: train rank {self._source_rank} called nobody within {deadline.seconds:.1f} s"
            ) from error
        except dist.DistNetworkError as error:
            raise ConnectionError(
                f"version {version}: train rank {self._source_rank} cannot be reached any more: {error}"
            ) from error


def _attendant(rank: int) -> str:
    return f"attendant/{rank}"


def _answer(version: int, attempt: int, rank: int) -> str:
    return f"{version}/{attempt}/answer/{rank}"


def _roster(version: int, attempt: int) -> str:
    return f"{version}/{attempt}/roster"


def _seconds(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(seconds, SHORTEST_WAIT_S))


def _encode(message: Attendant | Answer | Roster) -> str:
    return msgspec.json.encode(message).decode()


def _decode(data: bytes, kind: type[M]) -> M:
    """Raises ValueError for anything but a message of that kind."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    return msgspec.json.decode(data, type=kind)
