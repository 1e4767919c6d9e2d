"""The life of a weight version: publish (every train rank casts its shards), stage and verify (every engine, while it
goes on decoding), commit (between two engine steps).

Invariant: a version commits on an engine whole or not at all. An engine that fails is quarantined: it gets no work
until a later refit has brought it a whole version; the others are not kept waiting. In the steady state a refit is one
call per train rank and two per engine rank, and carries no metadata that grows with the model.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.schema import TransportConfig
from orchestrator.channels import Channel, plan_channels
from orchestrator.errors import RayfitError, RefitFailed
from orchestrator.version_life import VersionLife
from orchestrator.worker_group import WorkerGroup
from transport.layout import merge

if TYPE_CHECKING:
    from workers.rollout import RolloutWorker
    from workers.train import TrainWorker
    from workers.weights import Publication, Staged


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one refit moved, and the seconds of the slowest rank in each phase.

    `num_bytes` is what the engine rank with the most received; `total_s` the wall time from the optimiser step to the
    last commit, of which the trainer was kept for `trainer_blocked_s` and an engine stood still for `engine_stall_s`.
    `digest_s` and `verify_s` are what verification cost where the bytes were written and where they landed.
    """

    version: int
    num_bytes: int
    total_s: float
    pack_s: float
    digest_s: float
    pull_s: float
    verify_s: float
    trainer_blocked_s: float
    engine_stall_s: float
    num_actor_calls: int
    verified: bool
    quarantined: dict[int, str] = field(default_factory=dict)
    """Engine -> why it does not serve this version."""

    def metrics(self) -> dict[str, float]:
        return {
            "time/refit_s": self.total_s,
            "refit/pack_s": self.pack_s,
            "refit/digest_s": self.digest_s,
            "refit/pull_s": self.pull_s,
            "refit/verify_s": self.verify_s,
            "refit/trainer_blocked_s": self.trainer_blocked_s,
            "refit/engine_stall_s": self.engine_stall_s,
            "refit/actor_calls": self.num_actor_calls,
            "refit/bytes": self.num_bytes,
            "refit/gb_per_s": self.num_bytes / self.total_s / 1e9,
            "refit/verified": float(self.verified),
            "refit/quarantined_engines": len(self.quarantined),
        }


class WeightSync:
    """Connects a trainer with its engines once, then refits them.

    Args:
        ranks_per_engine: engine e is the rollout ranks from `e * ranks_per_engine` on.
        note: told once of what a person should know, such as a transport that could not be used.
    """

    def __init__(
        self, trainer: "WorkerGroup[TrainWorker]", rollout: "WorkerGroup[RolloutWorker]", config: TransportConfig,
        deadline_s: float, ranks_per_engine: int, note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._trainer, self._rollout = trainer, rollout
        self.config, self._deadline_s, self._note = config, deadline_s, note
        self._ranks_per_engine = ranks_per_engine
        self._channels: list[Channel] = []
        self._verified: set[int] = set()
        self._lock = asyncio.Lock()
        self.life = VersionLife()

    async def connect(self, deadline_s: float) -> None:
        """Plan the transfer from both layouts and make every buffer; engines may still be starting.

        Raises:
            PlanError: some engine parameter has no source in the trainer, or the reverse.
            ValueError: `transport.type` cannot reach an engine.
        """
        layouts, sites = await asyncio.gather(
            self._trainer.call("layout", deadline_s=deadline_s), self._trainer.call("site", deadline_s=deadline_s)
        )
        ranks = await self._rollout.call("describe_weights", sites, deadline_s=deadline_s)
        self._channels = plan_channels(merge(layouts), sites, ranks, self.config, self._deadline_s)
        for reason in {channel.choice.reason: channel for channel in self._channels if channel.choice.reason}.values():
            self._note(f"transport {reason.choice.type}: {reason.choice.reason}")
        self.life.meets = not self._is_one_sided
        await self._open(deadline_s)
        for engine in range(len(self._rollout) // self._ranks_per_engine):
            self.life.join(engine)

    async def _open(self, deadline_s: float) -> None:
        outlets = [
            [channel.outlets[rank] for channel in self._channels if rank in channel.outlets]
            for rank in range(len(self._trainer))
        ]
        opened: list[dict[str, Any]] = await self._trainer.scatter(
            "open_channels", [(own,) for own in outlets], deadline_s=deadline_s
        )
        offers = {
            channel.name: {rank: opened[rank][channel.name] for rank in channel.outlets} for channel in self._channels
        }
        channels = [self._channel_of(rank) for rank in range(len(self._rollout))]
        inlets = [(channel.inlet_of(rank), offers[channel.name]) for rank, channel in enumerate(channels)]
        await asyncio.gather(
            self._trainer.call("attach", offers, deadline_s=deadline_s),
            self._rollout.scatter("connect", inlets, deadline_s=deadline_s),
        )

    async def refit(self, version: int) -> RefitReport:
        """Bring every engine to the trainer's present weights, as `version`.

        Raises:
            WorkerFailed: a train rank failed.
            DeadlineExceeded: a train rank took longer than the deadline.
            RefitFailed: no engine serves the version; names each one's tensor, rank and version, or error.
        """
        async with self._lock:
            start = time.perf_counter()
            engines = [engine for engine in self.life.engines if self._answers(engine)]
            verify = self.config.verify == "always" or (
                self.config.verify == "first" and not self._verified.issuperset(engines)
            )
            self.life.begin_publish(version)
            publish = asyncio.ensure_future(self._trainer.call("publish", version, verify, deadline_s=self._deadline_s))
            if self._is_one_sided:
                await publish
                self.life.published(version)
            outcomes = await asyncio.gather(*(self._refit_engine(engine, version, publish) for engine in engines))
            published: list[Publication] = await publish
            self._verified |= set(self.life.serving()) if verify else set()
            if not self.life.serving():
                # Where every engine failed, a train rank may be the cause: it is blamed instead if it is dead.
                await self._trainer.call("describe", deadline_s=self._deadline_s)
                reasons = "; ".join(self.life.quarantined().values())
                raise RefitFailed(f"no engine serves version {version}: {reasons}")
            return self._report(version, verify, time.perf_counter() - start, published, [o for o in outcomes if o])

    async def _refit_engine(
        self, engine: int, version: int, publish: "asyncio.Future[list[Publication]]"
    ) -> "tuple[list[Staged], list[float]] | None":
        """Stage and commit on one engine's ranks; quarantines it on any failure and returns None."""
        ranks = range(engine * self._ranks_per_engine, (engine + 1) * self._ranks_per_engine)
        try:
            self.life.begin_stage(engine, version)
            staged = await self._rollout.scatter_some(
                "stage", {rank: (version, self._packed(rank, publish)) for rank in ranks}, deadline_s=self._deadline_s
            )
            self.life.staged(engine, version)
            if not self._is_one_sided:
                await publish
                self.life.published(version)
            committed = await self._rollout.scatter_some(
                "commit", dict.fromkeys(ranks, (version,)), deadline_s=self._deadline_s
            )
            self.life.committed(engine, version)
            return list(staged.values()), list(committed.values())
        except RayfitError as error:
            self.life.fail(engine, str(error))
            return None

    def _answers(self, engine: int) -> bool:
        """Whether an engine owes no answer to a call that was given up: a frozen one is left alone until it wakes."""
        ranks = range(engine * self._ranks_per_engine, (engine + 1) * self._ranks_per_engine)
        if not any(self._rollout.is_late(rank) for rank in ranks):
            return True
        self.life.fail(engine, self.life.engines[engine].reason or "it owes the answer to a call that was given up")
        return False

    def _packed(self, rank: int, publish: "asyncio.Future[list[Publication]]") -> dict[int, Any]:
        """What the train ranks announced on an engine rank's channel."""
        if not publish.done():
            return {}
        channel = self._channel_of(rank)
        return {source: publish.result()[source].packed[channel.name] for source in channel.outlets}

    def _channel_of(self, rank: int) -> Channel:
        return next(channel for channel in self._channels if rank in channel.engine_ranks)

    @property
    def _is_one_sided(self) -> bool:
        return all(channel.one_sided for channel in self._channels)

    def _report(
        self, version: int, verify: bool, total_s: float, published: "list[Publication]",
        outcomes: "list[tuple[list[Staged], list[float]]]",
    ) -> RefitReport:  # fmt: skip
        packed = [list(publication.packed.values()) for publication in published]
        staged = [one for ranks, _ in outcomes for one in ranks]
        return RefitReport(
            version=version,
            num_bytes=max(one.num_bytes for one in staged),
            total_s=total_s,
            pack_s=max(sum(one.pack_s for one in own) for own in packed),
            digest_s=max(sum(one.digest_s for one in own) for own in packed),
            pull_s=max(one.pull_s for one in staged),
            verify_s=max(one.verify_s for one in staged),
            trainer_blocked_s=max(publication.blocked_s for publication in published),
            engine_stall_s=max(stall_s for _, stalls in outcomes for stall_s in stalls),
            num_actor_calls=len(self._trainer) + 2 * len(staged),
            verified=verify,
            quarantined=self.life.quarantined(),
        )
