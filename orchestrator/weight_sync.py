"""The life of a weight version: publish (every train rank packs its shards), stage (every engine pulls and verifies),
commit (between two engine steps).

Invariant: no arena is written while an engine pulls from it, because `refit` stages everywhere before it returns and is
never run twice at once; a version commits on every engine or the refit raises.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import TransportConfig
from orchestrator.worker_group import WorkerGroup
from transport.layout import merge
from transport.names import engine_layout
from transport.plan import plan_transfer

if TYPE_CHECKING:
    from transport.base import Transport
    from workers.rollout import RolloutWorker
    from workers.train import TrainWorker


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one refit moved, and the seconds of the slowest rank in each phase.

    `num_bytes` is what one engine received; `total_s` the wall time from the optimiser step to the last commit.
    """

    version: int
    num_bytes: int
    total_s: float
    pack_s: float
    pull_s: float
    verify_s: float
    commit_s: float
    verified: bool

    def metrics(self) -> dict[str, float]:
        return {
            "time/refit_s": self.total_s,
            "refit/pack_s": self.pack_s,
            "refit/pull_s": self.pull_s,
            "refit/verify_s": self.verify_s,
            "refit/commit_s": self.commit_s,
            "refit/bytes": self.num_bytes,
            "refit/gb_per_s": self.num_bytes / self.total_s / 1e9,
            "refit/verified": float(self.verified),
        }


class WeightSync:
    """Connects a trainer with its engines once, then refits them."""

    def __init__(
        self, trainer: "WorkerGroup[TrainWorker]", rollout: "WorkerGroup[RolloutWorker]", config: TransportConfig,
        deadline_s: float,
    ) -> None:  # fmt: skip
        self._trainer, self._rollout = trainer, rollout
        self._config, self._deadline_s = config, deadline_s
        self._lock = asyncio.Lock()

    async def connect(self, deadline_s: float) -> None:
        """Plan the transfer from both layouts and make every buffer; engines may still be starting.

        Raises:
            PlanError: some engine parameter has no source in the trainer, or the reverse.
        """
        source = merge(await self._trainer.call("layout", deadline_s=deadline_s))
        parameters = await self._rollout.call("parameters", deadline_s=deadline_s)
        destination = [
            engine_layout(shapes, packed, source.shapes, rank) for rank, (shapes, packed) in enumerate(parameters)
        ]
        from transport.arena import slots_for  # torch: not wanted in the driver, which imports this module

        slots = slots_for(source, destination[0])
        plans = [plan_transfer(source, layout) for layout in destination]
        transport = make_transport(self._config)
        await asyncio.gather(
            self._trainer.scatter("connect", [(own, transport) for own in slots], deadline_s=deadline_s),
            self._rollout.scatter("connect", [(slots, plan, transport) for plan in plans], deadline_s=deadline_s),
        )

    async def refit(self, version: int) -> RefitReport:
        """Bring every engine to the trainer's present weights, as `version`.

        Raises:
            WorkerFailed: a rank failed, or (VerificationError) its bytes differ from those that were published.
            DeadlineExceeded: a phase took longer than the deadline.
        """
        async with self._lock:
            start = time.perf_counter()
            verify = self._config.verify == "always"
            published = await self._trainer.call("publish", version, verify, deadline_s=self._deadline_s)
            handles, digests = [p.handle for p in published], [p.digest for p in published]
            staged = await self._rollout.call("stage", version, handles, digests, deadline_s=self._deadline_s)
            committed = await self._rollout.call("commit", version, deadline_s=self._deadline_s)
            return RefitReport(
                version=version,
                num_bytes=max(s.num_bytes for s in staged),
                total_s=time.perf_counter() - start,
                pack_s=max(p.pack_s for p in published),
                pull_s=max(s.pull_s for s in staged),
                verify_s=max(p.digest_s for p in published) + max(s.verify_s for s in staged),
                commit_s=max(committed),
                verified=verify,
            )


def make_transport(config: TransportConfig) -> "Transport":
    """The transport that the configuration names, its libraries imported only here."""
    from transport.nixl import NixlTransport
    from transport.object_store import ObjectStoreTransport

    match config.type:
        case "nixl":
            return NixlTransport()
        case "object_store":
            return ObjectStoreTransport()
