"""What a transport is: a Publisher in every train worker and a Receiver in every engine rank, for one channel.

A channel is one distinct destination: all engine ranks that want the same elements of every tensor share it, and the
train ranks pack once for all of them. Its life:

    arrange (orchestrator)  ->  publisher() on every source  ->  their offers
    ->  attach() on every source and receiver() on every engine rank
    ->  publish(version) and stage(version), again and again

A one-sided transport (`one_sided` true) is published first and staged afterwards, by whoever likes, as often as they
like. With any other, publish and stage of a version run at the same time and wait for each other. Versions alternate
between two halves: version v + 1 never touches what readers of v see. Who may write or read when is WeightSync's to
order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from transport.arena import Region, allocate, image_offsets, image_views
from transport.packing import Packed
from transport.plan import Copy

Parameters = Mapping[str, tuple[tuple[int, ...], str]]
"""Engine parameter -> (shape, dtype), in the engine's order."""
Copies = Mapping[int, list[Copy]]
"""Train rank -> what it sends on a channel, in plan order."""
Offers = Mapping[int, Any]
"""Train rank -> what its publisher offers to its peers: small and serialisable."""


@dataclass(frozen=True, slots=True)
class Link:
    """The identity of a channel's two ends: `name` is unique in the run, and fit for a file name.

    Train ranks are at one end, rollout ranks at the other; `receiver_rank` is the one of these that the link was given
    to, -1 at a source.
    """

    name: str
    source_ranks: tuple[int, ...]
    receiver_ranks: tuple[int, ...]
    timeout_s: float
    receiver_rank: int = -1


@dataclass(frozen=True, slots=True)
class Landed:
    """Seconds that a receiver spent on waiting for bytes and moving them, and on taking their digests."""

    pull_s: float
    verify_s: float


class Publisher(Protocol):
    def offer(self) -> Any:
        """What the channel's other ends need to reach this one."""

    def attach(self, offers: Offers) -> None:
        """Called once on every source of the channel, when all have made their offers."""

    def publish(self, version: int, verify: bool) -> Packed:
        """Write this rank's pieces as `version`. Two-sided transports wait here until receivers have them.

        Raises:
            TimeoutError: receivers did not take the pieces in time.
        """

    def close(self) -> None: ...


class Receiver(Protocol):
    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        """Bring `version` here and compare digests, where a train rank announced a seal, while the engine goes on.

        `packed` has what each train rank announced; with a two-sided transport it is empty, as the ranks announce
        themselves to the receiver.

        Raises:
            VerificationError: what landed is not what was published.
            TimeoutError: it did not arrive in time.
        """

    def check(self, version: int) -> None:
        """Raises VerificationError unless what was staged still is `version`; called right before it is served."""

    def image(self, version: int) -> torch.Tensor | None:
        """The buffer that holds every parameter whole, for an engine that turns to it; None where there is no such."""

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        """Train rank -> its pieces of the staged version in plan order, for an engine that copies."""

    def close(self) -> None: ...


class Transport(Protocol):
    """A factory of both ends; a small picklable object."""

    one_sided: bool

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        """Where each train rank's pieces lie. Called once, in the orchestrator."""

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> Publisher: ...

    def receiver(self, link: Link, regions: dict[int, Region], landing: "Landing", offers: Offers) -> Receiver: ...


class Landing:
    """An engine rank's own memory for versions that arrive: images of its parameters, made when they are first used.

    Two of them if the engine turns its parameters to an image, since it serves from the other one; else one, which is
    copied from.
    """

    def __init__(self, parameters: Parameters, device: torch.device, turns: bool) -> None:
        self.parameters, self.device = parameters, device
        self.num_halves = 2 if turns else 1
        self._flats: dict[int, torch.Tensor] = {}

    def flat(self, version: int, num_bytes: int = 0) -> torch.Tensor:
        """The image that `version` is written to, `num_bytes` long where there is something behind the parameters."""
        half = version % self.num_halves
        if half not in self._flats:
            _, end = image_offsets(self.parameters)
            self._flats[half] = allocate(max(end, num_bytes), self.device)
        return self._flats[half]

    def parameters_in(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        return image_views(flat, self.parameters)
