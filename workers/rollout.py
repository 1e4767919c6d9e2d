"""A rollout worker: an inference engine in a Ray actor, with one thread that owns it.

The engine thread makes the engine and steps it while it has requests; every other method posts a command that the
thread runs between two steps, and waits for its result. `stage` is the exception: it brings a version here on
the caller's thread while the engine goes on decoding.

Who waits: `collect` until enough requests have finished, `commit` and `submit` for at most one engine step. Who frees
them: the engine thread; if it dies, every present and later caller gets its exception. An engine may have several
ranks, each an actor of ours that gets the same calls; workers/lockstep.py keeps them in step.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import ModelConfig, RolloutConfig
from transport.auto import Reach, Site, reach
from transport.base import Offers
from transport.names import EngineParameter
from transport.packing import Packed
from transport.receipt import VerificationError
from workers.engine import Engine, SamplingSpec
from workers.lockstep import (
    Agenda,
    Command,
    Finished,
    LockstepAgenda,
    Posted,
    RankGroup,
    Ranks,
    RanksDisagree,
    join_ranks,
    launcher_environment,
)
from workers.mesh import open_rendezvous
from workers.weights import Inlet, Staged, WeightReceiver
from workers.worker import Worker


@dataclass(frozen=True, slots=True)
class Request:
    """`sampling.n` completions of one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec


@dataclass(frozen=True, slots=True)
class EngineRank:
    """What an orchestrator must know of an engine rank to plan its refits."""

    parameters: dict[str, EngineParameter]
    packed: dict[str, list[str]]
    reach: Reach


def make_vllm_engine(
    model: ModelConfig, config: RolloutConfig, folder: str, max_model_len: int, seed: int, load_format: str = "dummy",
    peer_timeout_s: float = 300.0,
) -> Engine:  # fmt: skip
    """A VllmEngine, imported here because importing vllm takes seconds and only the engine's process needs it."""
    from workers.engine_vllm import VllmEngine

    return VllmEngine(model, config, folder, max_model_len, seed, load_format, peer_timeout_s)


class EngineFailed(RuntimeError):  # noqa: N818
    """The engine raised and is gone. Carries text only: an engine's exceptions need not survive pickling."""


class EngineThread:
    """Owns the engine: creates, steps and closes it on its own thread.

    Args:
        join: for an engine that has several ranks, meets the others; waits for them on the engine's thread.
    """

    def __init__(self, make_engine: Callable[[], Engine], join: Callable[[], RankGroup] | None = None) -> None:
        self._posted: Posted = queue.SimpleQueue()
        self._agenda = Agenda(self._posted)
        self._finished: list[Finished] = []
        self._changed = threading.Condition()
        self._error: EngineFailed | None = None
        self._thread = threading.Thread(target=self._main, args=(make_engine, join), name="engine", daemon=True)
        self._thread.start()

    def run(self, command: Callable[[Engine], Any], key: str | None = None) -> Any:
        """Run `command(engine)` between two steps and return its result.

        Args:
            key: the command's name on every rank of the engine: all run it before the same step, so all must be given
                it. None: it changes nothing that the ranks have in common.
        """
        posted = Command(command, key)
        self._posted.put(posted)
        self._check()
        return posted.future.result()

    def unanimous(self, check: Callable[[], None]) -> None:
        """Within a command that has a key: raises VerificationError on every rank if `check()` does on one."""
        self._agenda.unanimous(check)

    def take_finished(self, num: int, timeout_s: float) -> list[Finished]:
        """Wait until `num` requests have finished and return all that have."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self._finished) >= num or self._error is not None, timeout_s)
            self._check()
            if not done:
                raise TimeoutError(f"{len(self._finished)} of {num} requests finished within {timeout_s:.0f} s")
            taken, self._finished = self._finished, []
            return taken

    def close(self) -> None:
        self._posted.put(None)
        self._thread.join(timeout=10)

    def _main(self, make_engine: Callable[[], Engine], join: Callable[[], RankGroup] | None) -> None:
        try:
            if join is not None:
                self._agenda = LockstepAgenda(self._posted, join())
            engine = make_engine()
            while self._run_commands(engine):
                if engine.has_unfinished_requests():
                    self._agenda.hold(engine.step())
            engine.close()
            self._end(EngineFailed("the engine has been closed"))
        except BaseException as error:
            self._end(EngineFailed(f"{type(error).__name__}: {error}"))
            raise

    def _run_commands(self, engine: Engine) -> bool:
        """Run what is next, and hand out what has finished. False: close."""
        self._agenda.prepare(engine.has_unfinished_requests())
        finished = self._agenda.release()
        if finished:
            with self._changed:
                self._finished += finished
                self._changed.notify_all()
        while self._agenda.ready:
            command = self._agenda.ready.popleft()
            if command is None:
                return False
            if command.future.set_running_or_notify_cancel():
                try:
                    command.future.set_result(command.run(engine))
                except VerificationError as error:  # refused before anything was changed
                    command.future.set_exception(error)
                except BaseException as error:
                    command.future.set_exception(EngineFailed(f"{type(error).__name__}: {error}"))
                    raise
        return True

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _end(self, error: "EngineFailed") -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        for command in self._agenda.abandon():
            command.future.set_exception(error)


class RolloutWorker(Worker):
    """One engine rank and its end of the refit.

    Args:
        ranks: how many ranks an engine has; rank r of the group is rank r % size of engine r // size. With several, an
            engine is made at `start`, when the ranks know where to meet.
    """

    def __init__(
        self, rank: int, world_size: int, make_engine: Callable[[], Engine], ranks: Ranks | None = None
    ) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self._make_engine, self._ranks = make_engine, ranks
        self._store: dist.TCPStore | None = None
        if ranks is None or ranks.size == 1:
            self._engine = EngineThread(make_engine)

    def rendezvous(self) -> str:
        """Called on the first rank of an engine that has several: the address that each of them passes to `start`."""
        assert self._ranks is not None
        self._store, address = open_rendezvous(self._ranks.size, self._ranks.launch_s)
        return address

    def start(self, address: str) -> None:
        """Make this rank's part of an engine that has several. Returns before it is ready."""
        ranks = self._ranks
        assert ranks is not None
        rank = self.rank % ranks.size
        os.environ |= launcher_environment(address, rank, ranks)
        self._engine = EngineThread(self._make_engine, functools.partial(join_ranks, self._store, address, rank, ranks))

    def describe_weights(self, sites: list[Site]) -> EngineRank:
        """What this engine rank serves, and how far it reaches into the train ranks' memory."""

        def look(engine: Engine) -> EngineRank:
            parameters = engine.describe_parameters()
            device = next(iter(engine.parameters().values())).device.type
            return EngineRank(parameters, dict(engine.packed_modules_mapping), reach(sites, device))

        return self._engine.run(look)

    def connect(self, inlet: Inlet, offers: Offers) -> None:
        """Reach the train ranks of this rank's channel and make the buffers that every refit reuses."""
        self._weights = self._engine.run(lambda engine: WeightReceiver(inlet, offers, engine))

    def stage(self, version: int, packed: dict[int, Packed]) -> Staged:
        """Bring `version` here and verify it, while the engine goes on; errors as in WeightReceiver.stage."""
        return self._weights.stage(version, packed)

    def commit(self, version: int) -> float:
        """Between two engine steps, make the staged version the one that is served, on every rank of the engine or on
        none. Returns the engine's stall in s."""

        def swap(engine: Engine) -> float:
            start = time.perf_counter()
            self._engine.unanimous(lambda: self._weights.check(version))
            try:
                self._weights.commit(engine, version)
            except VerificationError as error:  # the other ranks have committed: this one must not go on
                raise RanksDisagree(f"rank {self.rank} could not commit what it had checked: {error}") from error
            return time.perf_counter() - start

        return self._engine.run(swap, key=f"commit version {version}")

    def submit(self, requests: list[Request], seed: int) -> None:
        """Start a whole batch of requests; what an idle engine samples for them is a function of the seed."""

        def add(engine: Engine) -> None:
            engine.seed(seed)
            for request in requests:
                engine.add_request(request.request_id, request.prompt_token_ids, request.sampling)

        first = f" from {requests[0].request_id} on" if requests else ""
        self._engine.run(add, key=f"add {len(requests)} requests{first} with seed {seed}")

    def collect(self, num: int, timeout_s: float) -> list[Finished]:
        """Wait until `num` requests have finished; returns (request_id, completions) of all that have."""
        return self._engine.take_finished(num, timeout_s)

    def generate(self, requests: list[Request], seed: int, timeout_s: float, answer: bool = True) -> list[Finished]:
        """Submit a whole batch and collect all of it: one actor call for a synchronous step.

        Args:
            answer: false returns nothing, for ranks of an engine whose first one returns the same completions.
        """
        self.submit(requests, seed)
        finished = self.collect(len(requests), timeout_s)
        return finished if answer else []

    def close(self) -> None:
        self._engine.close()
