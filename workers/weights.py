"""The two ends of a refit inside the workers: what a train rank publishes from and what an engine rank serves from.

Both are prepared once, when they are connected; a refit is then a few calls on prebuilt views.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from transport.arena import Region
from transport.base import Landing, Link, Offers, Publisher, Receiver, Transport
from transport.packing import FusedCopy, Packed, narrow
from transport.receipt import VerificationError
from transport.team import set_team_size
from workers.engine import Engine


@dataclass(frozen=True, slots=True)
class Outlet:
    """A train rank's end of one channel: its link, its transport, what it sends there, and how many processes of its
    host work at the same time."""

    link: Link
    transport: Transport
    region: Region
    num_neighbours: int


@dataclass(frozen=True, slots=True)
class Publication:
    """One weight version as a train rank announces it: by channel, and the seconds the trainer was kept."""

    packed: dict[str, Packed]
    blocked_s: float


@dataclass(frozen=True, slots=True)
class Inlet:
    """An engine rank's end of its channel, and how many processes of its host work at the same time."""

    link: Link
    transport: Transport
    regions: dict[int, Region]
    num_neighbours: int


@dataclass(frozen=True, slots=True)
class Staged:
    """Seconds that one engine rank spent on the phases of staging, and the bytes of weights it got."""

    pull_s: float
    verify_s: float
    num_bytes: int


class WeightSender:
    """Publishes one train rank's shards on every channel.

    Args:
        sources: local shard of each tensor, the same memory for the life of the worker.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._sources, self._device = sources, device
        self._publishers: dict[str, Publisher] = {}

    def open(self, outlets: list[Outlet]) -> dict[str, Any]:
        """Make this rank's buffers. Returns what it offers, by channel."""
        set_team_size(max((outlet.num_neighbours for outlet in outlets), default=1))
        for outlet in outlets:
            self._publishers[outlet.link.name] = outlet.transport.publisher(
                outlet.link, outlet.region, self._sources, self._device
            )
        return {outlet.link.name: self._publishers[outlet.link.name].offer() for outlet in outlets}

    def attach(self, offers: Mapping[str, Offers]) -> None:
        """Reach the other train ranks, by channel."""
        for name, of_channel in offers.items():
            if name in self._publishers:
                self._publishers[name].attach(of_channel)

    def publish(self, version: int, verify: bool) -> Publication:
        """Write this rank's pieces of `version` on every channel."""
        start = time.perf_counter()
        packed = {name: publisher.publish(version, verify) for name, publisher in self._publishers.items()}
        return Publication(packed, time.perf_counter() - start)

    def close(self) -> None:
        for publisher in self._publishers.values():
            publisher.close()
        self._publishers = {}


class WeightReceiver:
    """Stages versions beside the engine and turns or copies its parameters to one of them.

    `stage` runs on a caller's thread, `commit` on the engine's; a version is committed only if it was the last one that
    was staged, whole, and only once.
    """

    def __init__(self, inlet: Inlet, offers: Offers, engine: Engine, landing: Landing | None = None) -> None:
        set_team_size(inlet.num_neighbours)
        self._regions, self._turns = inlet.regions, engine.turns
        self._landing = landing or make_landing(engine)
        self._receiver: Receiver = inlet.transport.receiver(inlet.link, inlet.regions, self._landing, offers)
        self._images: dict[int, dict[str, torch.Tensor]] = {}
        self._copies: dict[int, FusedCopy] = {}
        self._staging = threading.Lock()
        self._staged_version: int | None = None
        self._num_bytes = sum(region.payload_bytes for region in inlet.regions.values())

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Staged:
        """Bring `version` here and verify it.

        Raises:
            VerificationError: it is not what was published; it cannot be committed.
        """
        with self._staging:  # a call that was given up may still be running
            self._staged_version = None
            landed = self._receiver.stage(version, packed)
            self._staged_version = version
        return Staged(landed.pull_s, landed.verify_s, self._num_bytes)

    def check(self, version: int) -> None:
        """Raises VerificationError unless `version` is what was staged last, whole, and still is what it was."""
        if self._staged_version != version:
            raise VerificationError(f"commit of version {version}, but {self._staged_version} is staged")
        self._receiver.check(version)

    def commit(self, engine: Engine, version: int) -> float:
        """Make the staged version the one that is served. Returns the engine's stall in seconds.

        Raises:
            VerificationError: another version has taken its place since it was staged; nothing was changed.
        """
        start = time.perf_counter()
        self.check(version)
        flat = self._receiver.image(version) if self._turns else None
        if flat is not None:
            if flat.data_ptr() not in self._images:
                self._images[flat.data_ptr()] = self._landing.parameters_in(flat)
            engine.turn(self._images[flat.data_ptr()])
        else:
            self._copy_of(self._receiver.views(version), engine).run(verify=False)
        engine.weights_written(version)
        self._staged_version = None
        return time.perf_counter() - start

    def _copy_of(self, views: dict[int, list[torch.Tensor]], engine: Engine) -> FusedCopy:
        """The commit of an engine that copies, prepared once per buffer that a version may lie in."""
        sources = [view for rank in self._regions for view in views[rank]]
        key = sources[0].data_ptr()
        if key not in self._copies:
            parameters = engine.parameters()
            copies = [piece.copy for region in self._regions.values() for piece in region.pieces]
            destinations = [narrow(parameters[c.destination_storage], c.destination_start, c.shape) for c in copies]
            self._copies[key] = FusedCopy(list(zip(destinations, sources, strict=True)))
        return self._copies[key]

    def close(self) -> None:
        self._receiver.close()


def make_landing(engine: Engine) -> Landing:
    """Room for versions that arrive at this engine rank."""
    parameters = engine.parameters()
    described = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in parameters.items()}
    return Landing(described, next(iter(parameters.values())).device, engine.turns)
