"""A small trainer and small engines as real actors, for tests of refits that go wrong: weights whose values tell their
version, and workers that signal themselves or others at a chosen moment."""

import asyncio
import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.refit_ours import HoldingEngine
from configs.schema import TransportConfig
from orchestrator.placement import actor_options, place
from orchestrator.weight_sync import WeightSync
from orchestrator.worker_group import WorkerGroup
from transport.auto import Probe, Site
from transport.base import Offers
from transport.layout import Box, Layout, Placement, Shard, share
from transport.packing import Packed, Packer
from workers.rollout import RolloutWorker
from workers.weights import Outlet, Publication, Staged, WeightSender
from workers.worker import Worker

SHAPES = {
    "embed.weight": (40, 16),
    "layer.q_proj.weight": (16, 16),
    "layer.k_proj.weight": (8, 16),
    "layer.v_proj.weight": (8, 16),
    "norm.weight": (16,),
}
PARAMETERS = {"embed.weight": (40, 16), "layer.qkv_proj.weight": (32, 16), "norm.weight": (16,)}
ROWS = {f"layer.{part}_proj.weight": ("layer.qkv_proj.weight", row) for part, row in (("q", 0), ("k", 16), ("v", 24))}


def weights_of(name: str, version: int) -> torch.Tensor:
    """What the trainer holds of a tensor at a version: small integers, exact in bfloat16."""
    shape = SHAPES[name]
    first = sorted(SHAPES).index(name) + version
    return ((torch.arange(torch.Size(shape).numel()) + first) % 97).reshape(shape).float()


class SmallTrainer(Worker):
    """A train rank without a model: it holds its rows of every tensor."""

    def __init__(self, rank: int, world_size: int, device: str = "cpu") -> None:
        self._shards, layout = {}, []
        for name, shape in SHAPES.items():
            rows = shape[0] // world_size
            box = Box((rank * rows, *[0] * (len(shape) - 1)), (rows, *shape[1:]))
            layout.append(Placement(name, shape, name, "float32", (Shard(rank, box, (0,) * len(shape)),)))
            self._shards[name] = torch.zeros(box.shape, device=device)
        self._layout, self._rank = layout, rank
        self._probe = Probe(device)
        self._sender = WeightSender(self._shards, torch.device(device))

    def layout(self) -> Layout:
        return share(self._layout)

    def site(self) -> Site:
        return self._probe.site

    def open_channels(self, outlets: list[Outlet]) -> dict[str, Any]:
        return self._sender.open(outlets)

    def attach(self, offers: dict[str, Offers]) -> None:
        self._sender.attach(offers)

    def corrupt_next(self) -> None:
        """Flip one bit of what is written next, after its digests were taken."""
        write = Packer.write

        def corrupt(packer: Packer, version: int, verify: bool) -> Packed:
            packed = write(packer, version, verify)
            first = packer._region.pieces[1].offset
            packer.flat[first] ^= 1
            packer.flat[first].item()  # waits for it on a GPU: a reader may come at once
            Packer.write = write  # type: ignore[method-assign]
            return packed

        Packer.write = corrupt  # type: ignore[method-assign]

    def publish(self, version: int, verify: bool) -> Publication:
        for name, shard in self._shards.items():
            rows = shard.shape[0]
            shard.copy_(weights_of(name, version)[self._rank * rows : (self._rank + 1) * rows])
        return self._sender.publish(version, verify)


class SmallEngineWorker(RolloutWorker):
    """A RolloutWorker over an engine that only holds parameters, and that can be told to fail at a moment."""

    def __init__(self, rank: int, world_size: int, device: str = "cpu") -> None:
        held = {
            name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device), requires_grad=False)
            for name, shape in PARAMETERS.items()
        }
        super().__init__(rank, world_size, functools.partial(HoldingEngine, held))
        self._faults: dict[str, tuple[int, int]] = {}

    def fail_at(self, moment: str, number: int, pid: int | None = None) -> None:
        """Send signal `number`, to this process or to `pid`, at the next "stage", "landed" or "commit"."""
        self._faults[moment] = (pid or os.getpid(), number)

    def _reach(self, moment: str) -> None:
        if moment in self._faults:
            os.kill(*self._faults.pop(moment))

    def stage(self, version: int, packed: dict[int, Packed]) -> Staged:
        self._reach("stage")
        receiver = self._weights._receiver
        stage: Callable[..., Any] = type(receiver).stage

        def landed(*arguments: Any) -> Any:
            result = stage(receiver, *arguments)
            self._reach("landed")
            return result

        receiver.stage = landed  # type: ignore[method-assign]
        return super().stage(version, packed)

    def commit(self, version: int) -> float:
        self._reach("commit")
        return super().commit(version)

    def served(self) -> dict[str, Any]:
        """What the engine would answer with: every parameter's values."""
        return self._engine.run(
            lambda engine: {n: t.float().cpu().numpy().copy() for n, t in engine.parameters().items()}
        )


@dataclass(frozen=True, slots=True)
class Hardware:
    """What each worker holds its weights on, and its share of a GPU."""

    device: str = "cpu"
    gpus_per_worker: float = 0.0


class SmallRefit:
    """Some train ranks and some engines, connected."""

    def __init__(
        self, kind: str, num_engines: int, deadline_s: float, num_trainers: int = 2, hardware: Hardware | None = None
    ) -> None:
        self.kind, self.num_engines, self.deadline_s = kind, num_engines, deadline_s
        self.num_trainers, self.hardware = num_trainers, hardware or Hardware()

    async def __aenter__(self) -> "SmallRefit":
        gpus, arguments = self.hardware.gpus_per_worker, (self.hardware.device,)
        options = actor_options(gpus, enable_tensor_transport=True)
        self.trainer = WorkerGroup.launch(
            "train", SmallTrainer, await place("train", self.num_trainers, gpus, 60), options, arguments,
            lambda *_: None,
        )  # fmt: skip
        self.engines = WorkerGroup.launch(
            "rollout", SmallEngineWorker, await place("rollout", self.num_engines, gpus, 60),
            options | {"max_concurrency": 4}, arguments, lambda *_: None,
        )  # fmt: skip
        config = TransportConfig(type=self.kind)
        self.notes: list[str] = []
        self.sync = WeightSync(self.trainer, self.engines, config, self.deadline_s, 1, self.notes.append)
        await self.sync.connect(60)
        described = await self.engines.call("describe", deadline_s=20)
        self.engine_pids = [one["pid"] for one in described]
        self.trainer_pids = [one["pid"] for one in await self.trainer.call("describe", deadline_s=20)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for pid in self.engine_pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        self.engines.kill()
        self.trainer.kill()

    async def fail_at(self, engine: int, moment: str, number: signal.Signals, pid: int | None = None) -> None:
        await self.engines.call_rank(engine, "fail_at", moment, int(number), pid, deadline_s=20)

    async def wait_for_answers(self, engine: int) -> None:
        """Until a woken engine has answered every call that was given up."""
        for _ in range(200):
            if not self.engines.is_late(engine):
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"rollout/{engine} still owes an answer")

    async def assert_serves(self, engine: int, version: int) -> None:
        """Every parameter of the engine is that version's, all of it."""
        served = await self.engines.call_rank(engine, "served", deadline_s=20)
        for name in SHAPES:
            storage, row = ROWS.get(name, (name, 0))
            expected = weights_of(name, version)
            found = torch.tensor(served[storage][row : row + expected.shape[0]])
            assert torch.equal(found, expected), f"engine {engine}: {name} is not version {version}"
