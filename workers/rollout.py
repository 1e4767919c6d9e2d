"""A rollout worker: an inference engine in a Ray actor, with one thread that owns it.

The engine thread makes the engine and steps it while it has requests; every other method posts a command that the
thread runs between two steps, and waits for its result. `stage` is the exception: it fills the receive arenas on the
caller's thread while the engine goes on decoding.

Who waits: `collect` until enough requests have finished, `commit` and `submit` for at most one engine step. Who frees
them: the engine thread; if it dies, every present and later caller gets its exception.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from configs.schema import ModelConfig, RolloutConfig
from transport.arena import Arena, Slot
from transport.plan import Copy
from transport.receipt import verify
from transport.types import Completion
from workers.engine import Engine, SamplingSpec
from workers.worker import Worker


@dataclass(frozen=True, slots=True)
class Request:
    """`sampling.n` completions of one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec


@dataclass(frozen=True, slots=True)
class Staged:
    """Seconds that one engine spent on the phases of staging, and the bytes it received."""

    pull_s: float
    verify_s: float
    num_bytes: int


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
    """One engine and its receive arenas."""

    def __init__(self, rank: int, world_size: int, make_engine: Callable[[], Engine]) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self._engine = EngineThread(make_engine)
        self._staged_version: int | None = None

    def parameters(self) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, list[str]]]:
        """Shape and dtype of every engine parameter, and the engine's `packed_modules_mapping`."""

        def describe(engine: Engine) -> Any:
            shapes = {
                name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in engine.parameters().items()
            }
            return shapes, dict(engine.packed_modules_mapping)

        return self._engine.run(describe)

    def connect(self, slots: list[list[Slot]], copies: list[Copy], transport: Any) -> None:
        """Make a receive arena per train rank, and the views that a commit copies between, all once."""
        parameters = self._engine.run(lambda engine: engine.parameters())
        device = next(iter(parameters.values())).device
        self._arenas = [Arena(rank_slots, device) for rank_slots in slots]
        self._receiver = transport.receiver(self._arenas)
        self._destinations, self._sources = [], []
        for copy in copies:
            source = self._arenas[copy.source_rank].views[copy.source_storage]
            destination = parameters[copy.destination_storage]
            self._sources.append(_view(source, copy.source_start, copy.shape))
            self._destinations.append(_view(destination, copy.destination_start, copy.shape))

    def stage(self, version: int, handles: list[Any], digests: list[str | None]) -> Staged:
        """Pull `version` into the receive arenas and check it, while the engine goes on.

        Raises:
            VerificationError: bytes from one rank are not those it published; the version cannot be committed.
        """
        self._staged_version = None
        pull_s = verify_s = 0.0
        for rank, (handle, expected) in enumerate(zip(handles, digests, strict=True)):
            start = time.perf_counter()
            self._receiver.pull(rank, handle)
            pulled = time.perf_counter()
            if expected is not None:
                verify(self._arenas[rank], expected, rank, version)
            pull_s, verify_s = pull_s + pulled - start, verify_s + time.perf_counter() - pulled
        self._staged_version = version
        return Staged(pull_s, verify_s, sum(arena.num_bytes for arena in self._arenas))

    def commit(self, version: int) -> float:
        """Between two engine steps, make the staged version the one that is served. Returns the engine's stall in s."""
        if self._staged_version != version:
            raise RuntimeError(f"commit of version {version}, but {self._staged_version} is staged")

        def write(engine: Engine) -> float:
            start = time.perf_counter()
            torch._foreach_copy_(self._destinations, self._sources)
            engine.weights_written(version)
            return time.perf_counter() - start

        return self._engine.run(write)

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


def _view(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    for dimension, (begin, length) in enumerate(zip(start, shape, strict=True)):
        tensor = tensor.narrow(dimension, begin, length)
    return tensor
