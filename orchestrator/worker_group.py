"""SPMD actors of one role: launched together, called together, awaited together.

Invariant: a call returns every rank's result or raises an error that names the ranks at fault; it never waits longer
than its deadline. The group is the only place that talks to actors, and the source of every span of the timeline.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.errors import DeadlineExceeded, WorkerFailed
from workers.worker import Timed, Worker

W = TypeVar("W", bound=Worker)

PEER_GRACE_S = 5.0
"""After one rank has failed, how long the others may take to fail too: they may be stuck in a collective with it."""

Observer = Callable[[str, str, Timed], None]
"""(who, method, timed): told of every finished call."""


class WorkerGroup(Generic[W]):
    """`len(group)` actors called `role/rank`."""

    def __init__(self, role: str, actors: list[Any], placement: PlacementGroup, observe: Observer) -> None:
        self.role = role
        self._actors, self._placement, self._observe = actors, placement, observe
        self._late: dict[int, list[asyncio.Future[Timed]]] = {}

    def __len__(self) -> int:
        return len(self._actors)

    @classmethod
    def launch(
        cls, role: str, worker: type[W], placement: PlacementGroup, options: dict[str, Any], arguments: Sequence[Any],
        observe: Observer,
    ) -> "WorkerGroup[W]":  # fmt: skip
        """Start one actor per bundle, each made as `worker(rank, world_size, *arguments)`. Does not wait for them.

        Args:
            options: Ray's actor options, the same for every rank.
        """
        world_size = placement.bundle_count
        actors = []
        for rank in range(world_size):
            strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank)
            actor_class = ray.remote(worker).options(name=None, scheduling_strategy=strategy, max_restarts=0, **options)
            actors.append(actor_class.remote(rank, world_size, *arguments))
        return cls(role, actors, placement, observe)

    async def call(self, method: str, *arguments: Any, deadline_s: float) -> list[Any]:
        """Call every rank with the same arguments. Returns results by rank.

        Raises:
            WorkerFailed: a rank raised or died.
            DeadlineExceeded: a rank had not answered after `deadline_s`.
        """
        return await self.scatter(method, [arguments] * len(self), deadline_s=deadline_s)

    async def call_rank(self, rank: int, method: str, *arguments: Any, deadline_s: float) -> Any:
        """Call one rank; errors as in `call`."""
        return (await self.scatter_some(method, {rank: arguments}, deadline_s=deadline_s))[rank]

    async def scatter_some(
        self, method: str, per_rank: Mapping[int, Sequence[Any]], *, deadline_s: float
    ) -> dict[int, Any]:
        """Call some ranks, each with arguments of its own. Returns results by rank; errors as in `call`."""
        pending = {rank: self._submit(rank, method, arguments) for rank, arguments in per_rank.items()}
        return await self._wait(pending, method, deadline_s)

    def is_late(self, rank: int) -> bool:
        """Whether a rank still owes the answer to a call whose deadline has passed."""
        self._late[rank] = [future for future in self._late.get(rank, []) if not future.done()]
        return bool(self._late[rank])

    async def scatter(self, method: str, per_rank: Sequence[Sequence[Any]], *, deadline_s: float) -> list[Any]:
        """Call each rank with arguments of its own; errors as in `call`."""
        assert len(per_rank) == len(self), f"{len(per_rank)} argument lists for {len(self)} ranks of {self.role}"
        results = await self.scatter_some(method, dict(enumerate(per_rank)), deadline_s=deadline_s)
        return [results[rank] for rank in range(len(self))]

    def kill(self) -> None:
        """End every actor at once and give its resources back."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)

    def _submit(self, rank: int, method: str, arguments: Sequence[Any]) -> "asyncio.Future[Timed]":
        return asyncio.ensure_future(self._actors[rank].run.remote(method, *arguments))

    async def _wait(
        self, pending: "dict[int, asyncio.Future[Timed]]", method: str, deadline_s: float
    ) -> dict[int, Any]:
        _, late = await asyncio.wait(pending.values(), timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        failed = [rank for rank, future in pending.items() if future.done() and future.exception() is not None]
        if failed:
            # A peer may notice a death before Ray does: wait for all, then blame the dead before those who complain.
            await asyncio.wait(pending.values(), timeout=PEER_GRACE_S)
            errors = {rank: future.exception() for rank, future in pending.items() if future.done()}
            self._remember_late(pending)
            dead = [rank for rank, error in errors.items() if isinstance(error, ray.exceptions.RayActorError)]
            failed = dead or failed
            causes = [f"{self.role}/{rank} failed in {method}: {_cause(errors[rank])}" for rank in failed]
            raise WorkerFailed("; ".join(causes)) from errors[failed[0]]
        if late:
            names = ", ".join(f"{self.role}/{rank}" for rank, future in pending.items() if not future.done())
            self._remember_late(pending)
            raise DeadlineExceeded(f"{names} did not answer {method} within {deadline_s:.0f} s")
        results = {}
        for rank, future in pending.items():
            timed = future.result()
            self._observe(f"{self.role}/{rank}", method, timed)
            results[rank] = timed.result
        return results

    def _remember_late(self, pending: "dict[int, asyncio.Future[Timed]]") -> None:
        for rank, future in pending.items():
            if not future.done():
                future.add_done_callback(_retrieve)
                self._late.setdefault(rank, []).append(future)


def _retrieve(future: "asyncio.Future[Timed]") -> None:
    """Nobody waits for this answer any more; without a look at its error asyncio would complain."""
    if not future.cancelled():
        future.exception()


def _cause(error: BaseException | None) -> str:
    """One line: the innermost exception that Ray carries."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, ray.exceptions.RayActorError):
        # A failed constructor's traceback ends with its exception; any other death is described on the first line.
        return (
            f"its start failed: {lines[-1].strip()}" if "creation task" in lines[0] else f"the process died: {lines[0]}"
        )
    return f"{type(error).__name__}: {lines[0]}"
