"""How other frameworks bring a trainer's weights into an engine on the same host: what bench/refit.py compares with.

One trainer process and one engine process host every arm, each as a pair of halves. All arms start from the same fp32
shards and end in the same live bf16 parameters; the trainer's packed bf16 buffer is shared too, so that memory stays
bounded. bench/refit.py and bench/refit_gpu.py make both sides and drive the arms.

Rivals get what one would tune in good faith: warm persistent buffers wherever their interface allows one, huge pages,
casting overlapped with sending where they stream, memcpy rather than torch's slower copy, and clean-up (freeing
received buffers, deleting files) outside the timed part.
"""

import asyncio
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import ray
import torch
import torch.distributed
import zmq
from ray.experimental import register_nixl_memory
from safetensors.torch import load_file, save_file

from bench.refit_memory import chunks_of, copy_bytes, filled, private_buffer, unpack, views_in
from transport.nixl import rest_progress_thread
from workers.worker import Worker

if TYPE_CHECKING:
    from bench.refit_sides import EngineSide, TrainerSide

DEADLINE_S = 120.0
GLOO_BUCKET_BYTES = 64 << 20
ZEROMQ_CHUNK_BYTES = 4 << 20
ZEROMQ_NUM_BUFFERS = 3
ZEROMQ_SOCKET_BYTES = 4 << 20


class BenchError(RuntimeError):
    """The bench cannot go on; the message names the arm, and the tensor if one has wrong bytes."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the two halves of an arm find each other; `private`, of mode 0700, holds sockets."""

    private: pathlib.Path
    memory: pathlib.Path
    disk: pathlib.Path
    store_port: int


class Process(Worker):
    """The actor of the trainer or of the engine: a side, which `run` calls by the name "side", and a half per arm."""

    def __init__(self, make_side: Callable[[list[Any]], Any], parts: list[Any]) -> None:
        rest_progress_thread()
        torch.set_num_threads(1)
        self._side = make_side(parts)
        self._halves: dict[str, Any] = {"side": self._side}

    def install(self, arm: str, make_half: Callable[[Any, Meeting], Any], meeting: Meeting) -> None:
        self._halves[arm] = make_half(self._side, meeting)

    def call(self, arm: str, method: str, *arguments: Any) -> Any:
        result = getattr(self._halves[arm], method)(*arguments)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result


class Half:
    """One arm's half in an actor. It is called as an actor is, so it can be one of a WorkerGroup's actors."""

    def __init__(self, actor: Any, arm: str) -> None:
        self._actor, self._arm = actor, arm

    @property
    def run(self) -> "Half":
        return self

    def remote(self, method: str, *arguments: Any) -> Any:
        """Start `method` of the half; the reference gives a workers.worker.Timed."""
        return self._actor.run.remote("call", self._arm, method, *arguments)


@dataclass(frozen=True, slots=True)
class Processes:
    """The two Process actors that host every arm, and where its halves meet."""

    trainer: Any
    engine: Any
    meeting: Meeting


class Arm(Protocol):
    """One way to refit. The harness runs the clock over `refit` alone."""

    name: str

    async def connect(self, processes: Processes) -> None:
        """Make every persistent buffer and connection."""

    async def refit(self, version: int) -> None:
        """From the trainer's fp32 shards to the engine's live parameters."""

    async def retire(self, version: int) -> None:
        """Give back what the refit left."""


class Sender(Protocol):
    """The trainer's half of a rival, made with (TrainerSide, Meeting)."""

    def send(self) -> Any:
        """Cast the shards and hand them over. Returns what the receiver needs to get them: small and serialisable."""


class Receiver(Protocol):
    """The engine's half of a rival, made with (EngineSide, Meeting)."""

    def receive(self, handle: Any) -> None:
        """Bring what was sent into the live parameters; `handle` is None where both halves run at once."""


class Rival:
    """An arm of a sender and a receiver, called one after the other, or at once where they stream."""

    def __init__(
        self, name: str, sender: Callable[..., Sender], receiver: Callable[..., Receiver], at_once: bool = False
    ) -> None:
        self.name = name
        self._makers, self._at_once = (sender, receiver), at_once

    async def connect(self, processes: Processes) -> None:
        actors = (processes.trainer, processes.engine)
        self._sender, self._receiver = (Half(actor, self.name) for actor in actors)
        self._sides = [Half(actor, "side") for actor in actors]
        installs = [
            actor.install.remote(self.name, maker, processes.meeting)
            for actor, maker in zip(actors, self._makers, strict=True)
        ]
        await within_deadline(asyncio.gather(*installs), f"{self.name}: connect")

    async def refit(self, version: int) -> None:
        sent = self._sender.run.remote("send")
        if self._at_once:
            received = self._receiver.run.remote("receive", None)
            await within_deadline(asyncio.gather(sent, received), f"{self.name}: send and receive")
        else:
            timed = await within_deadline(sent, f"{self.name}: send")
            await within_deadline(self._receiver.run.remote("receive", timed.result), f"{self.name}: receive")

    async def retire(self, version: int) -> None:
        for side in reversed(self._sides):
            await within_deadline(side.run.remote("retire"), f"{self.name}: retire")


def rival_arms() -> list[Arm]:
    """Every rival, not yet connected."""
    return [
        Rival("rival_object_store", ObjectStoreSender, ObjectStoreReceiver),
        Rival("rival_rdt_per_tensor", partial(RdtSender, packed=False), RdtReceiver),
        Rival("rival_rdt_packed_fresh", partial(RdtSender, packed=True), RdtReceiver),
        broadcast_rival("rival_gloo_broadcast", gloo_group, GLOO_BUCKET_BYTES),
        Rival("rival_zeromq", ZeroMqSender, ZeroMqReceiver, at_once=True),
        Rival("rival_safetensors_disk", partial(FileSender, in_memory=False), FileReceiver),
        Rival("rival_safetensors_memory", partial(FileSender, in_memory=True), FileReceiver),
    ]


def broadcast_rival(name: str, make_group: "MakeGroup", bucket_bytes: int) -> Rival:
    chosen: dict[str, Any] = {"make_group": make_group, "bucket_bytes": bucket_bytes}
    return Rival(name, partial(BroadcastSender, **chosen), partial(BroadcastReceiver, **chosen), at_once=True)


async def within_deadline(awaitable: Any, what: str) -> Any:
    """The awaitable's result.

    Raises:
        BenchError: it was not done in time.
    """
    try:
        return await asyncio.wait_for(awaitable, DEADLINE_S)
    except TimeoutError as error:
        raise BenchError(f"{what} was not done after {DEADLINE_S:.0f} s") from error


class ObjectStoreSender:
    """One packed NumPy array through Ray's object store: a copy into it, and one out of the zero-copy view."""

    def __init__(self, side: "TrainerSide", meeting: Meeting) -> None:
        self._side = side

    def send(self) -> Any:
        self._side.pack()
        return [ray.put(self._side.flat.cpu().numpy())]


class ObjectStoreReceiver:
    def __init__(self, side: "EngineSide", meeting: Meeting) -> None:
        self._live = side.live

    def receive(self, handle: Any) -> None:
        flat = torch.from_numpy(ray.get(handle[0], timeout=DEADLINE_S))
        unpack(flat.to(self._live[0].device), self._live)


class RdtSender:
    """Ray Direct Transport over NIXL, a tensor per parameter or all of them packed. The source is registered once."""

    def __init__(self, side: "TrainerSide", meeting: Meeting, packed: bool) -> None:
        self._side = side
        self._tensors = [side.flat] if packed else side.packed
        register_nixl_memory(side.flat)

    def send(self) -> Any:
        self._side.pack()
        return [ray.put(self._tensors, _tensor_transport="nixl")]


class RdtReceiver:
    """Receives into the fresh buffers that RDT allocates and registers when it is given no target."""

    def __init__(self, side: "EngineSide", meeting: Meeting) -> None:
        self._side = side

    def receive(self, handle: Any) -> None:
        received = ray.get(handle[0], timeout=DEADLINE_S)
        if len(received) == 1:
            unpack(received[0], self._side.live)
        else:
            copy_bytes(self._side.live, received)
        self._side.leftovers = received


MakeGroup = Callable[[Meeting, int], Any]
"""(meeting, rank) -> a process group of the trainer, its rank 0, and the engine."""


class BroadcastSender:
    """Broadcast in buckets, in a group of its own; the next bucket is cast while the last one travels."""

    def __init__(self, side: "TrainerSide", meeting: Meeting, make_group: MakeGroup, bucket_bytes: int) -> None:
        self._group = make_group(meeting, 0)
        self._chunks = chunks_of(side.shards, bucket_bytes)
        self._buckets = [private_buffer(bucket_bytes, side.flat.device) for _ in range(2)]
        self._views = [views_in(self._buckets[i % 2], chunk) for i, chunk in enumerate(self._chunks)]

    def send(self) -> None:
        works: list[Any] = []
        for i, (chunk, views) in enumerate(zip(self._chunks, self._views, strict=True)):
            if i >= 2:
                works[i - 2].wait()
            torch._foreach_copy_(views, chunk)
            works.append(self._group.broadcast(filled(self._buckets[i % 2], views), 0))
        for work in works[-2:]:
            work.wait()


class BroadcastReceiver:
    """Copies a bucket into the parameters while the next one arrives."""

    def __init__(self, side: "EngineSide", meeting: Meeting, make_group: MakeGroup, bucket_bytes: int) -> None:
        self._group = make_group(meeting, 1)
        self._chunks = chunks_of(side.live, bucket_bytes)
        self._buckets = [private_buffer(bucket_bytes, side.live[0].device) for _ in range(2)]
        self._views = [views_in(self._buckets[i % 2], chunk) for i, chunk in enumerate(self._chunks)]

    def receive(self, handle: Any) -> None:
        works = [self._post(0)]
        for i, (chunk, views) in enumerate(zip(self._chunks, self._views, strict=True)):
            if i + 1 < len(self._chunks):
                works.append(self._post(i + 1))
            works[i].wait()
            copy_bytes(chunk, views)

    def _post(self, i: int) -> Any:
        return self._group.broadcast(filled(self._buckets[i % 2], self._views[i]), 0)


def gloo_group(meeting: Meeting, rank: int) -> Any:
    """A group of trainer and engine that is not the default one. Blocks until both have come."""
    timeout = timedelta(seconds=DEADLINE_S)
    store = torch.distributed.TCPStore("127.0.0.1", meeting.store_port, is_master=False, timeout=timeout)
    prefixed = torch.distributed.PrefixStore("rival_gloo_broadcast", store)
    return torch.distributed.ProcessGroupGloo(prefixed, rank, 2, timeout)


class ZeroMqSender:
    """Packed chunks over an ipc socket without a copy on this side; a buffer is cast into again once ZeroMQ lets go."""

    def __init__(self, side: "TrainerSide", meeting: Meeting) -> None:
        self._socket = zeromq_socket()
        self._socket.bind(f"ipc://{meeting.private / 'rival_zeromq'}")
        self._chunks = chunks_of(side.shards, ZEROMQ_CHUNK_BYTES)
        self._buffers = [private_buffer(ZEROMQ_CHUNK_BYTES) for _ in range(ZEROMQ_NUM_BUFFERS)]
        self._views = [views_in(self._buffers[i % ZEROMQ_NUM_BUFFERS], chunk) for i, chunk in enumerate(self._chunks)]

    def send(self) -> None:
        trackers: list[zmq.MessageTracker] = []
        for i, (chunk, views) in enumerate(zip(self._chunks, self._views, strict=True)):
            if i >= ZEROMQ_NUM_BUFFERS:
                trackers[i - ZEROMQ_NUM_BUFFERS].wait(DEADLINE_S)
            torch._foreach_copy_(views, chunk)
            payload = filled(self._buffers[i % ZEROMQ_NUM_BUFFERS], views).numpy().data
            trackers.append(self._socket.send(payload, copy=False, track=True))
        self._socket.recv()


class ZeroMqReceiver:
    """Copies every chunk out of the frame in which it came, then acknowledges them all."""

    def __init__(self, side: "EngineSide", meeting: Meeting) -> None:
        self._socket = zeromq_socket()
        self._socket.connect(f"ipc://{meeting.private / 'rival_zeromq'}")
        self._chunks = chunks_of(side.live, ZEROMQ_CHUNK_BYTES)

    def receive(self, handle: Any) -> None:
        for chunk in self._chunks:
            frame = self._socket.recv(copy=False)
            unpack(torch.frombuffer(frame.buffer, dtype=torch.uint8), chunk)
        self._socket.send(b"ack")


def zeromq_socket() -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    for option in (zmq.SNDTIMEO, zmq.RCVTIMEO):
        socket.setsockopt(option, int(DEADLINE_S * 1000))
    for option in (zmq.SNDBUF, zmq.RCVBUF):
        socket.setsockopt(option, ZEROMQ_SOCKET_BYTES)
    return socket


class FileSender:
    """A safetensors file, written without fsync: on a disk the page cache still holds it when it is read."""

    def __init__(self, side: "TrainerSide", meeting: Meeting, in_memory: bool) -> None:
        self._side = side
        self._path = (meeting.memory if in_memory else meeting.disk) / "model.safetensors"

    def send(self) -> str:
        self._side.pack()
        save_file({part.name: t for part, t in zip(self._side.parts, self._side.packed, strict=True)}, self._path)
        return str(self._path)


class FileReceiver:
    """Maps the file and copies from it; the file has no name any more when that is done."""

    def __init__(self, side: "EngineSide", meeting: Meeting) -> None:
        self._side = side

    def receive(self, handle: Any) -> None:
        loaded = load_file(handle)
        pathlib.Path(handle).unlink()
        copy_bytes(self._side.live, [loaded[part.name] for part in self._side.parts])
        self._side.leftovers = list(loaded.values())
