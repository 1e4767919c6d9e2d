"""From two layouts to the two ends of every channel: the part of a refit that is worked out once, at launch.

Engine ranks that hold the same parts of the same tensors, and that the same transport reaches, share a channel: the
train ranks cast and write once for all of them. Pure geometry; no actor is called here.
"""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from configs.schema import TransportConfig
from transport.layout import Layout, merge, share
from transport.names import EngineParameter, check_complete, engine_layout
from transport.plan import Copy, Plan, plan_transfer

if TYPE_CHECKING:
    from transport.auto import Choice, Site
    from transport.base import Transport
    from workers.rollout import EngineRank
    from workers.weights import Inlet, Outlet


@dataclass(frozen=True, slots=True)
class Channel:
    """One distinct destination: which engine ranks it reaches and what each train rank sends there."""

    name: str
    choice: "Choice"
    engine_ranks: list[int]
    outlets: "dict[int, Outlet]"
    inlet: "Inlet"

    @property
    def one_sided(self) -> bool:
        return self.inlet.transport.one_sided

    def inlet_of(self, engine_rank: int) -> "Inlet":
        """The inlet, as it is given to one of the channel's engine ranks."""
        return replace(self.inlet, link=replace(self.inlet.link, receiver_rank=engine_rank))


def plan_channels(
    source: Layout, sites: "list[Site]", ranks: "list[EngineRank]", config: TransportConfig, timeout_s: float
) -> list[Channel]:
    """The channels between train ranks that hold `source` and these engine ranks.

    Raises:
        PlanError: an engine parameter has no source in the trainer, or the reverse.
        ValueError: `transport.type` cannot reach an engine rank.
    """
    from transport.auto import choose

    groups: list[tuple[Choice, EngineRank, list[int]]] = []
    for number, rank in enumerate(ranks):
        choice = choose(config.type, sites, rank.reach)
        for known, like, members in groups:
            if known == choice and _same_parameters(like.parameters, rank.parameters):
                members.append(number)
                break
        else:
            groups.append((choice, rank, [number]))
    shapes = {placement.tensor: placement.shape for placement in source}
    wanted = [engine_layout(rank.parameters, rank.packed, shapes, index) for index, (_, rank, _) in enumerate(groups)]
    destination = merge(share(layout) for layout in wanted)
    check_complete(destination)
    plan = plan_transfer(share(source), destination)
    run_name = secrets.token_hex(4)
    hosts = Hosts([site.host for site in sites], [rank.reach.host for rank in ranks])
    return [
        _channel(Ends(f"{run_name}-{index}", choice, members, timeout_s), rank, _copies(plan, index), hosts)
        for index, (choice, rank, members) in enumerate(groups)
    ]


@dataclass(frozen=True, slots=True)
class Hosts:
    """The host of every train rank and of every engine rank."""

    train: list[str]
    engine: list[str]

    def neighbours(self, own: list[str], others: list[str], rank: int, one_sided: bool) -> int:
        """Processes that move weights on a rank's host while it does: of both sides if both are at work."""
        return own.count(own[rank]) + (0 if one_sided else others.count(own[rank]))


@dataclass(frozen=True, slots=True)
class Ends:
    """A channel before anything is laid out."""

    name: str
    choice: "Choice"
    engine_ranks: list[int]
    timeout_s: float


def _channel(ends: Ends, rank: "EngineRank", copies: dict[int, list[Copy]], hosts: Hosts) -> Channel:
    from transport.base import Link
    from workers.weights import Inlet, Outlet

    transport = make_transport(ends.choice.type)
    parameters = {name: (parameter.shape, parameter.dtype) for name, parameter in rank.parameters.items()}
    regions = transport.arrange(parameters, copies)
    link = Link(ends.name, tuple(sorted(regions)), tuple(ends.engine_ranks), ends.timeout_s)
    outlets = {}
    for source, region in regions.items():
        neighbours = hosts.neighbours(hosts.train, hosts.engine, source, transport.one_sided)
        outlets[source] = Outlet(link, transport, region, neighbours)
    neighbours = hosts.neighbours(hosts.engine, hosts.train, ends.engine_ranks[0], transport.one_sided)
    return Channel(ends.name, ends.choice, ends.engine_ranks, outlets, Inlet(link, transport, regions, neighbours))


def _copies(plan: Plan, destination: int) -> dict[int, list[Copy]]:
    sources = sorted(source for source, to in plan.pairs() if to == destination)
    return {source: list(plan.copies(source, destination)) for source in sources}


def _same_parameters(one: dict[str, EngineParameter], other: dict[str, EngineParameter]) -> bool:
    return list(one.items()) == list(other.items())


def make_transport(kind: str) -> "Transport":
    """The transport of one type, its libraries imported only here."""
    from transport.collective import CollectiveTransport
    from transport.nixl import NixlTransport
    from transport.object_store import ObjectStoreTransport
    from transport.shared_memory import SharedMemoryTransport
    from transport.stream import StreamTransport

    match kind:
        case "shared_memory":
            return SharedMemoryTransport()
        case "nixl":
            return NixlTransport()
        case "collective":
            return CollectiveTransport()
        case "stream":
            return StreamTransport()
        case "object_store":
            return ObjectStoreTransport()
    raise AssertionError(kind)
