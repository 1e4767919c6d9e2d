"""What the two ends of a stream say to each other: short msgpack frames of fixed types, never the weights themselves.

    receiver                              source
    Ready(version=7, ticket=41, ...) ->
                                     <-   Filled(ticket=41, bucket=0, seal=b"...")
    Loaded(ticket=41, bucket=0)      ->
                                          ...
    Left(ticket=41)                  ->                             instead of Loaded, when its stage has failed
                                     <-   Missed(ticket=41)         instead of Filled, when it came too late

A ticket is one attempt of one receiver to stage one version, so a frame that comes late never counts for another.
"""

from typing import Annotated, TypeVar

import msgspec
import zmq
from msgspec import Meta

MAX_FRAME_BYTES = 512

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seal = Annotated[bytes, Meta(min_length=16, max_length=16)]


class FrameError(ValueError):
    """A frame is too long, or none of those that may come."""


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Rollout rank `rank`, process (pid, started_ticks), stages `version` from now on."""

    version: Number
    ticket: Number
    rank: Number
    pid: Number
    started_ticks: Number


class Loaded(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The bucket's buffer may be written again."""

    ticket: Number
    bucket: Number


class Left(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The receiver has given the version up, and lives."""

    ticket: Number


class Filled(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The bucket is in its buffer; `seal` is that of its receipt, None where nobody verifies."""

    ticket: Number
    bucket: Number
    seal: Seal | None


class Missed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The source went on without this receiver."""

    ticket: Number


FromReceiver = Ready | Loaded | Left
FromSource = Filled | Missed

F = TypeVar("F")

_ENCODER = msgspec.msgpack.Encoder()
_OF_RECEIVERS: msgspec.msgpack.Decoder[FromReceiver] = msgspec.msgpack.Decoder(FromReceiver)
_OF_SOURCES: msgspec.msgpack.Decoder[FromSource] = msgspec.msgpack.Decoder(FromSource)


def encode(frame: FromReceiver | FromSource) -> bytes:
    return _ENCODER.encode(frame)


def from_receiver(data: bytes) -> FromReceiver:
    """Raises FrameError for anything that a receiver does not say."""
    return _decode(_OF_RECEIVERS, data)


def from_source(data: bytes) -> FromSource:
    """Raises FrameError for anything that a source does not say."""
    return _decode(_OF_SOURCES, data)


def _decode(decoder: "msgspec.msgpack.Decoder[F]", data: bytes) -> F:
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes, at most {MAX_FRAME_BYTES} are allowed")
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:  # of which ValidationError is one
        raise FrameError(f"not a frame of this stream: {error}") from error


def open_socket(kind: int) -> "zmq.Socket[bytes]":
    """A socket that refuses longer frames before it reads them, and keeps no process from ending."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    return socket
