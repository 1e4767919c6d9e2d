"""A rollout worker: an inference engine in a Ray actor, with one thread that owns it.

The engine thread makes the engine and steps it while it has requests; every other method posts a command that the
thread runs between two steps, and waits for its result. `stage` is the exception: it brings a version here on
the caller's thread while the engine goes on decoding.

Who waits: `collect` until enough requests have finished, `commit` and `submit` for at most one engine step. Who frees
them: the engine thread; if it dies, every present and later caller gets its exception.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from configs.schema import ModelConfig, RolloutConfig
from transport.auto import Reach, Site, reach
from transport.base import Offers
from transport.names import EngineParameter
from transport.packing import Packed
from transport.receipt import VerificationError
from transport.types import Completion
from workers.engine import Engine, SamplingSpec
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
    model: ModelConfig, config: RolloutConfig, folder: str, max_model_len: int, seed: int, load_format: str = "dummy"
) -> Engine:
    """A VllmEngine, imported here because importing vllm takes seconds and only the engine's process needs it."""
    from workers.engine_vllm import VllmEngine

    return VllmEngine(model, config, folder, max_model_len, seed, load_format)


class EngineFailed(RuntimeError):  # noqa: N818
    """The engine raised and is gone. Carries text only: an engine's exceptions need not survive pickling."""


class EngineThread:
    """Owns the engine: creates, steps and closes it on its own thread."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._finished: list[tuple[str, list[Completion]]] = []
        self._changed = threading.Condition()
        self._error: EngineFailed | None = None
        self._thread = threading.Thread(target=self._main, args=(make_engine,), name="engine", daemon=True)
        self._thread.start()

    def run(self, command: Callable[[Engine], Any]) -> Any:
        """Run `command(engine)` between two steps and return its result."""
        future: Future[Any] = Future()
        self._commands.put((command, future))
        self._check()
        return future.result()

    def take_finished(self, num: int, timeout_s: float) -> list[tuple[str, list[Completion]]]:
        """Wait until `num` requests have finished and return all that have."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self._finished) >= num or self._error is not None, timeout_s)
            self._check()
            if not done:
                raise TimeoutError(f"{len(self._finished)} of {num} requests finished within {timeout_s:.0f} s")
            taken, self._finished = self._finished, []
            return taken

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join(timeout=10)

    def _main(self, make_engine: Callable[[], Engine]) -> None:
        try:
            engine = make_engine()
            while self._run_commands(engine):
                if engine.has_unfinished_requests():
                    finished = engine.step()
                    if finished:
                        with self._changed:
                            self._finished += finished
                            self._changed.notify_all()
            engine.close()
            self._end(EngineFailed("the engine has been closed"))
        except BaseException as error:
            self._end(EngineFailed(f"{type(error).__name__}: {error}"))
            raise

    def _run_commands(self, engine: Engine) -> bool:
        """Run what was posted; wait for a command if there is nothing to decode. False: close."""
        while True:
            try:
                item = self._commands.get(block=not engine.has_unfinished_requests())
            except queue.Empty:
                return True
            if item is None:
                return False
            command, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command(engine))
                except VerificationError as error:  # refused before anything was changed
                    future.set_exception(error)
                except Exception as error:
                    future.set_exception(EngineFailed(f"{type(error).__name__}: {error}"))
                    raise

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _end(self, error: "EngineFailed") -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        while not self._commands.empty():
            item = self._commands.get()
            if item is not None:
                item[1].set_exception(error)


class RolloutWorker(Worker):
    """One engine rank and its end of the refit."""

    def __init__(self, rank: int, world_size: int, make_engine: Callable[[], Engine]) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self._engine = EngineThread(make_engine)

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
        """Between two engine steps, make the staged version the one that is served. Returns the engine's stall in s."""
        return self._engine.run(lambda engine: self._weights.commit(engine, version))

    def submit(self, requests: list[Request], seed: int) -> None:
        """Start a whole batch of requests; what an idle engine samples for them is a function of the seed."""

        def add(engine: Engine) -> None:
            engine.seed(seed)
            for request in requests:
                engine.add_request(request.request_id, request.prompt_token_ids, request.sampling)

        self._engine.run(add)

    def collect(self, num: int, timeout_s: float) -> list[tuple[str, list[Completion]]]:
        """Wait until `num` requests have finished; returns (request_id, completions) of all that have."""
        return self._engine.take_finished(num, timeout_s)

    def generate(self, requests: list[Request], seed: int, timeout_s: float) -> list[tuple[str, list[Completion]]]:
        """Submit a whole batch and collect all of it: one actor call for a synchronous step."""
        self.submit(requests, seed)
        return self.collect(len(requests), timeout_s)

    def close(self) -> None:
        self._engine.close()
