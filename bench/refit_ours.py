"""Our arms of bench/refit.py: the real WeightSync over the real transports, between the bench's two processes.

The trainer's half is a WeightSender over the bench's shards, the engine's a RolloutWorker over an engine that holds the
bench's parameters and never decodes. Transports that need memory of their own in the engine share one Landing.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from bench.refit_rivals import DEADLINE_S, Arm, Half, Meeting, Processes, within_deadline
from configs.schema import TransportConfig
from orchestrator.weight_sync import RefitReport, WeightSync
from orchestrator.worker_group import WorkerGroup
from transport.arena import ALIGNMENT_BYTES, receipt_bytes
from transport.auto import Probe, Site
from transport.base import Landing, Offers
from transport.layout import Box, Layout, Placement, Shard, share
from transport.names import EngineParameter
from workers.engine import SamplingSpec
from workers.rollout import EngineThread, RolloutWorker
from workers.weights import Inlet, Outlet, Publication, WeightReceiver, WeightSender

if TYPE_CHECKING:
    from bench.refit_sides import EngineSide, Part, TrainerSide

Kind = Literal["shared_memory", "nixl", "stream", "collective", "object_store"]
TYPES: tuple[Kind, ...] = ("shared_memory", "nixl", "stream", "collective", "object_store")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def layout_of(parts: "Sequence[Part]") -> Layout:
    """One train rank holds everything."""
    placements = []
    for part in parts:
        shard = Shard(0, Box((0,) * len(part.shape), part.shape), (0,) * len(part.shape))
        placements.append(Placement(part.name, part.shape, part.name, "float32", (shard,)))
    return share(placements)


class OurTrainer:
    """What WeightSync calls of a train worker."""

    def __init__(self, side: "TrainerSide", meeting: Meeting) -> None:
        self._layout = layout_of(side.parts)
        device = side.shards[0].device
        self._probe = Probe(device.type)
        sources = {part.name: shard for part, shard in zip(side.parts, side.shards, strict=True)}
        self._sender = WeightSender(sources, device)

    def layout(self) -> Layout:
        return self._layout

    def site(self) -> Site:
        return self._probe.site

    def open_channels(self, outlets: list[Outlet]) -> dict[str, Any]:
        return self._sender.open(outlets)

    def attach(self, offers: dict[str, Offers]) -> None:
        self._sender.attach(offers)

    def publish(self, version: int, verify: bool) -> Publication:
        return self._sender.publish(version, verify)


class HoldingEngine:
    """An Engine that holds parameters and has nothing to decode. It turns where vLLM does, on a CPU."""

    packed_modules_mapping: Mapping[str, list[str]] = PACKED

    def __init__(self, held: dict[str, torch.nn.Parameter]) -> None:
        self._held = held
        self.turns = all(parameter.device.type == "cpu" for parameter in held.values())

    def add_request(self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec) -> None: ...

    def has_unfinished_requests(self) -> bool:
        return False

    def step(self) -> list[Any]:
        return []

    def seed(self, seed: int) -> None: ...

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: parameter.data for name, parameter in self._held.items()}

    def describe_parameters(self) -> dict[str, EngineParameter]:
        return {name: EngineParameter(tuple(t.shape), "bfloat16") for name, t in self.parameters().items()}

    def turn(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._held.items():
            parameter.data = parameters[name]

    def weights_written(self, weight_version: int) -> None: ...

    def close(self) -> None: ...


class OurEngine(RolloutWorker):
    """A RolloutWorker whose landing memory is the bench's, shared by all arms: only one of them refits at a time."""

    def __init__(self, side: "EngineSide", meeting: Meeting) -> None:
        self.rank, self._side = 0, side
        self._engine = EngineThread(lambda: HoldingEngine(side.parameters))

    def connect(self, inlet: Inlet, offers: Offers) -> None:
        landing = landing_of(self._side)
        self._weights = self._engine.run(lambda engine: WeightReceiver(inlet, offers, engine, landing))


def landing_of(side: "EngineSide") -> Landing:
    """The side's landing, made when it is first used, with room for the receipts of every part."""
    if side.landing is None:
        parameters = {name: (tuple(p.shape), "bfloat16") for name, p in side.parameters.items()}
        side.landing = Landing(parameters, side.device, turns=side.device.type == "cpu")
        num_bytes = sum(p.nbytes + ALIGNMENT_BYTES for p in side.parameters.values()) + receipt_bytes(len(side.parts))
        for half in range(side.landing.num_halves):
            side.landing.flat(half, num_bytes)
    return side.landing


class Refits:
    """A connected WeightSync over one transport, which the verified and the unverified arm share."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self._version = kind, 0
        self._sync: WeightSync | None = None

    async def connect(self, processes: Processes) -> None:
        if self._sync is not None:
            return
        halves = []
        for role, actor, make_half in (
            ("train", processes.trainer, OurTrainer),
            ("rollout", processes.engine, OurEngine),
        ):
            installed = actor.install.remote(self.kind, make_half, processes.meeting)
            await within_deadline(installed, f"{self.kind}: connect")
            halves.append(WorkerGroup[Any](role, [Half(actor, self.kind)], None, lambda *_: None))
        config = TransportConfig(type=self.kind, verify="off")
        self._sync = WeightSync(halves[0], halves[1], config, DEADLINE_S, 1, print)
        await self._sync.connect(DEADLINE_S)

    async def refit(self, verify: Literal["always", "off"]) -> RefitReport:
        assert self._sync is not None, "connect comes before refit"
        self._version += 1
        self._sync.config = TransportConfig(type=self.kind, verify=verify)
        return await self._sync.refit(self._version)


class OurArm:
    """A transport, with or without verification. Keeps the last refit's report."""

    def __init__(self, refits: Refits, verified: bool) -> None:
        self.name = refits.kind + ("_verified" if verified else "")
        self._refits = refits
        self._verify: Literal["always", "off"] = "always" if verified else "off"
        self.report: RefitReport | None = None

    async def connect(self, processes: Processes) -> None:
        await self._refits.connect(processes)

    async def refit(self, version: int) -> None:
        self.report = await self._refits.refit(self._verify)

    async def retire(self, version: int) -> None:
        await asyncio.sleep(0)


def our_arms(types: Sequence[Kind] = TYPES) -> list[Arm]:
    """Each transport, unverified and verified, not yet connected."""
    refits = [Refits(kind) for kind in types]
    return [OurArm(each, verified) for each in refits for verified in (False, True)]
