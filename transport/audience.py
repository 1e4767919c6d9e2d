"""A source's receivers: who takes part in the version that is on its way, and what each has loaded of it.

The source waits for all of them, but for none so long that the others would miss their deadline. One that keeps it
waiting, or whose process has ended, is given up: it gets no further bucket of this version, and is trusted with little
patience at the next until it has been heard of. Once a version's first buffer has been written again, nobody can join.
"""

from dataclasses import dataclass

import zmq

from transport.base import Link
from transport.buckets import NUM_BUFFERS
from transport.deadline import WHOLE_SHARE, Deadline, patience_s
from transport.frames import Filled, Left, Loaded, Missed, Ready, encode, from_receiver, open_socket
from transport.host import Owner

LOOK_S = 0.2
"""How often a silent receiver is looked after: does its process run?"""


@dataclass(slots=True)
class Member:
    """A receiver's last Ready, and how many buckets it was told of and has loaded since."""

    identity: bytes
    owner: Owner
    version: int
    ticket: int
    num_told: int = 0
    num_loaded: int = 0


class Audience:
    def __init__(self, endpoint: str, link: Link, source_rank: int) -> None:
        self._link, self._source_rank = link, source_rank
        self._socket = open_socket(zmq.ROUTER)
        self._socket.bind(endpoint)
        self._members: dict[int, Member] = {}
        self._ranks = set(link.receiver_ranks)
        self._trusted = set(link.receiver_ranks)
        self._awaited: set[int] = set()
        self._version = -1
        self._seals: list[bytes | None] = []
        self._deadline = Deadline(0.0)

    def begin(self, version: int) -> None:
        """From now on everybody is awaited whose process has not ended."""
        self._version, self._seals = version, []
        self._deadline = Deadline(self._link.timeout_s * WHOLE_SHARE)
        self._awaited = set(self._ranks)
        self._look_after(self._ranks)
        self._receive(0.0)

    def announce(self, seal: bytes | None) -> None:
        """The next bucket is in its buffer."""
        self._seals.append(seal)
        self._receive(0.0)
        for rank in self._awaited:
            self._tell(rank)

    def wait_until_loaded(self, num_buckets: int) -> None:
        """Return when everybody who is still awaited has loaded that many buckets.

        Raises:
            TimeoutError: the link's deadline has passed; names who had not.
        """
        patience = {trusted: Deadline(patience_s(self._link.timeout_s, trusted)) for trusted in (True, False)}
        while late := {rank for rank in self._awaited if not self._has_loaded(rank, num_buckets)}:
            if self._deadline.left_s() == 0:
                raise TimeoutError(
                    f"rollout ranks {sorted(late)} had not loaded bucket {num_buckets - 1} of version {self._version} "
                    f"from train rank {self._source_rank} within {self._deadline.seconds:.1f} s"
                )
            left_s = {rank: patience[rank in self._trusted].left_s() for rank in late}
            if min(left_s.values()) == 0:
                self._give_up({rank for rank in late if left_s[rank] == 0})
            elif not self._receive(min(LOOK_S, self._deadline.left_s(), *left_s.values())):
                self._look_after(late)

    def close(self) -> None:
        self._socket.close()

    def _has_loaded(self, rank: int, num_buckets: int) -> bool:
        member = self._members.get(rank)
        return member is not None and member.version == self._version and member.num_loaded >= num_buckets

    def _look_after(self, ranks: set[int]) -> None:
        self._give_up({r for r in ranks if r in self._members and not self._members[r].owner.is_alive()})

    def _give_up(self, ranks: set[int]) -> None:
        self._awaited -= ranks
        self._trusted -= ranks

    def _receive(self, timeout_s: float) -> bool:
        """Take every frame that is there, waiting for the first one. Returns whether there was one."""
        any_came = False
        while self._socket.poll(0 if any_came else round(timeout_s * 1e3)):
            any_came = True
            identity, data = self._socket.recv_multipart()
            frame = from_receiver(data)
            if isinstance(frame, Ready):
                self._take_in(identity, frame)
                continue
            rank = next((rank for rank, member in self._members.items() if member.identity == identity), None)
            if rank is not None:
                self._hear(rank, frame)
        return any_came

    def _take_in(self, identity: bytes, frame: Ready) -> None:
        self._ranks.add(frame.rank)
        self._trusted.add(frame.rank)
        self._members[frame.rank] = Member(identity, Owner(frame.pid, frame.started_ticks), frame.version, frame.ticket)
        if frame.version != self._version:
            return
        if len(self._seals) > NUM_BUFFERS:
            self._awaited.discard(frame.rank)
            self._socket.send_multipart([identity, encode(Missed(frame.ticket))])
        else:
            self._awaited.add(frame.rank)
            self._tell(frame.rank)

    def _hear(self, rank: int, frame: Loaded | Left) -> None:
        self._trusted.add(rank)
        member = self._members[rank]
        if frame.ticket != member.ticket or member.version != self._version:
            return
        if isinstance(frame, Left):
            self._awaited.discard(rank)
        elif rank not in self._awaited:
            self._socket.send_multipart([member.identity, encode(Missed(frame.ticket))])
        elif frame.bucket < member.num_told:
            member.num_loaded = max(member.num_loaded, frame.bucket + 1)

    def _tell(self, rank: int) -> None:
        """Send what the rank was not yet told of."""
        member = self._members.get(rank)
        if member is None or member.version != self._version:
            return
        for bucket in range(member.num_told, len(self._seals)):
            frame = encode(Filled(member.ticket, bucket, self._seals[bucket]))
            self._socket.send_multipart([member.identity, frame])
        member.num_told = len(self._seals)
