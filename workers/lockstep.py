"""The ranks of one engine, in step: each runs the same commands before the same decode step.

An engine that is cut over several actors (tensor parallelism) computes every step together. If one rank added a request
or turned to new weights a step before another, their collectives would no longer meet, or one step would mix weights.
So rank 0 decides: between two steps it tells the others, in its own order, which of the commands that have reached it
are next; each rank waits until the same command has reached itself, then all run them, then all decode.

What ranks say to each other is one small message a step, over a gloo group of their own. With it goes a digest of what
each rank has sampled, so completions are handed out only once all ranks agree on them.

Who waits: an idle rank for its own next command, which every rank gets; a busy one for the others' messages. Each wait
but the idle one has a deadline that names the rank that is late. A rank that dies closes its connections, and the
others find out at once.
"""

import datetime
import queue
import struct
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash

from transport.receipt import VerificationError
from transport.types import Completion

if TYPE_CHECKING:
    from workers.engine import Engine

MESSAGE_BYTES = 1024
TEXT_BYTES = MESSAGE_BYTES - 32
"""Room for text beside a length and a digest."""
Finished = tuple[str, list[Completion]]
"""A request's id and its completions."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks an engine has, and how long they wait for each other: to start, and between two steps."""

    size: int
    launch_s: float
    step_s: float


class RanksDisagree(RuntimeError):  # noqa: N818
    """Ranks of one engine have sampled different completions: they no longer hold one model."""


@dataclass(slots=True)
class Command:
    """`run(engine)` between two steps. `key` is the same on every rank of the engine; None: this rank's own matter."""

    run: "Callable[[Engine], Any]"
    key: str | None = None
    future: "Future[Any]" = field(default_factory=Future)


Posted = queue.SimpleQueue[Command | None]
"""Commands in the order they came; None: close."""


class Agenda:
    """What one rank does between two steps, for an engine that has no other rank."""

    def __init__(self, posted: Posted) -> None:
        self._posted = posted
        self._held: list[Finished] = []
        self.ready: deque[Command | None] = deque()
        """What is next, in order; whoever runs a command takes it out first."""

    def prepare(self, busy: bool) -> None:
        """Make ready what is next; if there is nothing else to do, wait for it."""
        self._drain(wait=not busy and not self._held)

    def hold(self, finished: list[Finished]) -> None:
        """Keep completions until every rank agrees on them."""
        self._held += finished

    def release(self) -> list[Finished]:
        """Those that every rank has agreed on."""
        released, self._held = self._held, []
        return released

    def unanimous(self, check: Callable[[], None]) -> None:
        """Raises VerificationError on every rank if `check()` does on one; all ranks call it in the same command."""
        check()

    def abandon(self) -> list[Command]:
        """Say goodbye to the other ranks. Returns the commands that nobody will run."""
        while not self._posted.empty():
            self._file(self._posted.get())
        return [command for command in self.ready if command is not None]

    def _drain(self, wait: bool) -> None:
        if wait:
            self._file(self._posted.get())
        while not self._posted.empty():
            self._file(self._posted.get())

    def _file(self, command: Command | None) -> None:
        self.ready.append(command)


class LockstepAgenda(Agenda):
    """The same for a rank of an engine that has others."""

    def __init__(self, posted: Posted, group: "RankGroup") -> None:
        super().__init__(posted)
        self._group = group
        self._arrived: list[Command] = []
        """Commands that all ranks must agree on before they are ready."""
        self._released: list[Finished] = []
        self._digest = xxhash.xxh3_64()

    def prepare(self, busy: bool) -> None:
        self._drain(wait=False)
        while not (busy or self._held or self._arrived or self.ready):
            self._drain(wait=True)
        if busy or self._held or self._arrived:
            self._agree()

    def hold(self, finished: list[Finished]) -> None:
        for request_id, completions in finished:
            self._digest.update(request_id.encode())
            for one in completions:
                spans = [number for span in one.spans for number in span]
                numbers = [len(one.tokens), *one.tokens, one.weight_version, *spans]
                self._digest.update(struct.pack(f"{len(numbers)}q", *numbers))
                self._digest.update(struct.pack(f"{len(one.logprobs)}d", *one.logprobs))
        super().hold(finished)

    def release(self) -> list[Finished]:
        released, self._released = self._released, []
        return released

    def unanimous(self, check: Callable[[], None]) -> None:
        refusal = ""
        try:
            check()
        except VerificationError as error:
            refusal = str(error)
        for rank, answer in enumerate(self._group.exchange(refusal.encode()[:TEXT_BYTES], "the check of a commit")):
            if answer:
                raise VerificationError(f"engine rank {rank}: {answer.decode(errors='ignore')}")

    def abandon(self) -> list[Command]:
        self._group.close()
        return super().abandon() + self._arrived

    def _file(self, command: Command | None) -> None:
        if command is None or command.key is None:
            self.ready.append(command)
        else:
            self._arrived.append(command)

    def _agree(self) -> None:
        """Tell or learn what is next, and compare what was sampled."""
        keys = _as_many_as_fit([str(command.key) for command in self._arrived])
        digest = self._digest.digest()
        answers = self._group.exchange(digest + "\n".join(keys).encode(), ", ".join(keys) or "the next step")
        for rank, answer in enumerate(answers):
            if answer[: len(digest)] != digest:
                raise RanksDisagree(f"engine rank {rank} sampled other completions than rank {self._group.rank}")
        self._released, self._held = self._released + self._held, []
        deadline_s = time.monotonic() + self._group.ranks.step_s
        for key in answers[0][len(digest) :].decode().splitlines():
            self._await(key, deadline_s)

    def _await(self, key: str, deadline_s: float) -> None:
        """Make the command of this key ready, once it is here."""
        while not any(command.key == key for command in self._arrived):
            try:
                self._file(self._posted.get(timeout=max(deadline_s - time.monotonic(), 0)))
            except queue.Empty:
                raise TimeoutError(
                    f"engine rank 0 was told to {key}, rank {self._group.rank} was not, within "
                    f"{self._group.ranks.step_s:.0f} s"
                ) from None
        index = next(i for i, command in enumerate(self._arrived) if command.key == key)
        self.ready.append(self._arrived.pop(index))


def _as_many_as_fit(keys: list[str]) -> list[str]:
    """The first keys whose lines fit a message, beside a digest."""
    room, taken = TEXT_BYTES, []
    for key in keys:
        room -= len(key.encode()) + 1
        if room < 0:
            break
        taken.append(key)
    assert taken or not keys, f"a command's key is longer than a message: {keys[0]}"
    return taken


class RankGroup:
    """The ranks of one engine, connected by gloo, apart from the engine's own groups.

    Args:
        store: rank 0's own rendezvous store, or a connection to it.

    Raises:
        TimeoutError: a rank did not come within `ranks.launch_s`.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: Ranks) -> None:
        self.rank, self.ranks = rank, ranks
        timeout = datetime.timedelta(seconds=ranks.launch_s)
        prefix = dist.PrefixStore("lockstep", store)
        self._peers = [peer for peer in range(ranks.size) if peer != rank]
        self._mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        self._theirs = {peer: torch.zeros(MESSAGE_BYTES, dtype=torch.uint8) for peer in self._peers}
        self._gloo: Any = dist.ProcessGroupGloo(prefix, rank, ranks.size, timeout)

    def exchange(self, message: bytes, purpose: str) -> list[bytes]:
        """Every rank's message, by rank; all ranks call it the same number of times.

        Args:
            purpose: what for, in the words of an error.

        Raises:
            TimeoutError: a rank did not come within `ranks.step_s`.
            ConnectionError: a rank is gone.
        """
        assert self._gloo is not None, "the group has been closed"
        self._write(message)
        sent = {peer: self._post(self._gloo.send, self._mine, peer, purpose) for peer in self._peers}
        received = {peer: self._post(self._gloo.recv, self._theirs[peer], peer, purpose) for peer in self._peers}
        answers = {self.rank: message}
        for peer, work in received.items():
            self._wait(work, peer, purpose)
            answers[peer] = self._read(peer)
        for peer, work in sent.items():
            self._wait(work, peer, purpose)
        return [answers[rank] for rank in range(self.ranks.size)]

    def close(self) -> None:
        self._gloo = None  # the last reference: its connections close

    def _write(self, message: bytes) -> None:
        packed = struct.pack("I", len(message)) + message
        assert len(packed) <= MESSAGE_BYTES, f"a message of {len(message)} bytes"
        self._mine[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def _read(self, peer: int) -> bytes:
        packed = self._theirs[peer].numpy().tobytes()
        (length,) = struct.unpack_from("I", packed)
        return packed[4 : 4 + length]

    def _post(self, call: Callable[..., Any], buffer: torch.Tensor, peer: int, purpose: str) -> Any:
        try:
            return call([buffer], peer, 0)
        except RuntimeError as error:  # its connection was closed before
            raise ConnectionError(f"engine rank {peer} is gone, waited for at {purpose}") from error

    def _wait(self, work: dist.Work, peer: int, purpose: str) -> None:
        start = time.monotonic()
        try:
            work.wait(datetime.timedelta(seconds=self.ranks.step_s))
        except RuntimeError as error:
            late = time.monotonic() - start >= self.ranks.step_s
            if late:
                raise TimeoutError(
                    f"engine rank {peer} did not come to {purpose} within {self.ranks.step_s:.0f} s"
                ) from error
            raise ConnectionError(f"engine rank {peer} is gone, waited for at {purpose}") from error


def join_ranks(store: dist.TCPStore | None, address: str, rank: int, ranks: Ranks) -> RankGroup:
    """Meet the other ranks of the engine at the store that rank 0 serves on `address`."""
    if store is None:
        host, _, port = address.rpartition(":")
        timeout = datetime.timedelta(seconds=ranks.launch_s)
        store = dist.TCPStore(host, int(port), ranks.size, is_master=False, timeout=timeout)
    return RankGroup(store, rank, ranks)


def launcher_environment(address: str, rank: int, ranks: Ranks) -> dict[str, str]:
    """What an engine reads that others launch, as torchrun sets it. Its ranks meet at the store that serves already, so
    there is no port to lose between picking and using it; and each sees only its own device."""
    host, _, port = address.rpartition(":")
    meeting = {"MASTER_ADDR": host, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    local = {"GLOO_SOCKET_IFNAME": "lo"} if host.startswith("127.") else {}
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks.size)} | meeting | local
