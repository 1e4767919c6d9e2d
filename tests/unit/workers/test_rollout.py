import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from transport.arena import Arena, Slot
from transport.plan import Copy
from transport.receipt import VerificationError, digest
from transport.types import Completion
from workers.engine import SamplingSpec
from workers.rollout import EngineFailed, EngineThread, Request, RolloutWorker

TWO_TOKENS = SamplingSpec(n=1, max_tokens=2)
FOREVER = SamplingSpec(n=1, max_tokens=1_000_000)


class CountingEngine:
    """Each completion counts up from its prompt's last token, a token a step, under the version then served."""

    packed_modules_mapping: Mapping[str, list[str]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.threads = {threading.get_ident()}
        self.weight_version = 0
        self.is_stepping = False
        self.weights = {"w": torch.zeros(4), "b": torch.zeros(2, dtype=torch.bfloat16)}
        self._running: dict[str, tuple[list[int], SamplingSpec]] = {}

    def add_request(self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec) -> None:
        self._running[request_id] = ([prompt_token_ids[-1]], sampling)

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def step(self) -> list[tuple[str, list[Completion]]]:
        self.threads.add(threading.get_ident())
        self.is_stepping = True
        time.sleep(0.001)
        self.is_stepping = False
        finished = []
        for request_id, (tokens, sampling) in list(self._running.items()):
            tokens.append(tokens[-1] + 1)
            if len(tokens) > sampling.max_tokens:
                del self._running[request_id]
                completion = Completion(tokens[1:], [0.0] * sampling.max_tokens, "length", self.weight_version)
                finished.append((request_id, [completion] * sampling.n))
        return finished

    def seed(self, seed: int) -> None:
        self.log.append(("seed", seed))

    def parameters(self) -> Mapping[str, torch.Tensor]:
        return self.weights

    def weights_written(self, weight_version: int) -> None:
        assert not self.is_stepping
        self.weight_version = weight_version

    def close(self) -> None:
        self.log.append("close")


class FailingEngine(CountingEngine):
    def step(self) -> list[tuple[str, list[Completion]]]:
        raise ValueError("the cache is full")


def add(request_id: str, prompt: list[int], sampling: SamplingSpec) -> Callable[[CountingEngine], None]:
    return lambda engine: engine.add_request(request_id, prompt, sampling)


def start(call: Callable[[], Any]) -> "Future[Any]":
    """Call on a thread that cannot keep the tests from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except RuntimeError as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result; TimeoutError if it hangs."""
    return start(call).result(timeout=seconds)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


@pytest.fixture
def owner() -> Iterator[EngineThread]:
    thread = EngineThread(CountingEngine)
    yield thread
    thread.close()


def test_finished_requests_are_taken_once(owner: EngineThread):
    owner.run(add("a", [7, 3], TWO_TOKENS))
    assert owner.take_finished(1, timeout_s=10) == [("a", [Completion([4, 5], [0.0, 0.0], "length", 0)])]
    assert owner.take_finished(0, timeout_s=10) == []


def test_take_finished_waits_for_as_many_as_it_was_asked_for(owner: EngineThread):
    owner.run(add("short", [3], TWO_TOKENS))
    owner.run(add("long", [3], SamplingSpec(n=2, max_tokens=20)))
    taken = owner.take_finished(2, timeout_s=10)
    assert [(request_id, len(completions)) for request_id, completions in taken] == [("short", 1), ("long", 2)]


def test_a_late_request_is_an_error_that_says_how_many_had_finished_and_how_long_was_waited(owner: EngineThread):
    owner.run(add("a", [3], TWO_TOKENS))
    owner.run(add("b", [3], FOREVER))
    with pytest.raises(TimeoutError, match=r"^1 of 2 requests finished within 1 s$"):
        owner.take_finished(2, timeout_s=1)
    # What had finished is still there.
    assert [request_id for request_id, _ in owner.take_finished(1, timeout_s=1)] == ["a"]


def test_everything_happens_on_one_thread_and_commands_run_between_two_steps(owner: EngineThread):
    owner.run(add("a", [3], FOREVER))
    for _ in range(50):
        is_stepping, thread = owner.run(lambda engine: (engine.is_stepping, threading.get_ident()))
        assert not is_stepping
        assert owner.run(lambda engine: engine.threads) == {thread}
    assert thread != threading.get_ident()


def test_commands_run_in_the_order_they_were_posted_and_return_their_results(owner: EngineThread):
    order: list[int] = []
    assert [owner.run(lambda engine, number=number: (order.append(number), number)[1]) for number in range(5)] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert order == [0, 1, 2, 3, 4]


def test_an_idle_engine_runs_commands(owner: EngineThread):
    assert owner.run(lambda engine: engine.weight_version) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_in_a_step_fails_the_waiting_and_every_later_caller():
    owner = EngineThread(FailingEngine)
    owner.run(add("a", [3], TWO_TOKENS))
    with pytest.raises(EngineFailed, match=r"^ValueError: the cache is full$"):
        owner.take_finished(1, timeout_s=10)
    for call in (lambda: owner.take_finished(0, timeout_s=1), lambda: owner.run(lambda engine: None)):
        with pytest.raises(EngineFailed, match="the cache is full"):
            within(5, call)
    owner.close()
    assert not engine_threads()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_cannot_be_made_fails_the_first_caller():
    def make() -> Any:
        raise OSError("no such model")

    owner = EngineThread(make)
    with pytest.raises(EngineFailed, match=r"^OSError: no such model$"):
        within(5, lambda: owner.run(lambda engine: engine.parameters()))
    owner.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_command_that_raises_fails_its_caller_and_ends_the_engine():
    owner = EngineThread(CountingEngine)
    with pytest.raises(EngineFailed, match=r"^KeyError: 'gone'$"):
        owner.run(lambda engine: engine.weights["gone"])
    with pytest.raises(EngineFailed, match="gone"):
        within(5, lambda: owner.run(lambda engine: None))
    owner.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_reaches_a_caller_whose_command_was_waiting_behind_it():
    owner = EngineThread(CountingEngine)
    entered, go_on = threading.Event(), threading.Event()

    def fail(engine: CountingEngine) -> None:
        entered.set()
        go_on.wait(5)
        raise ValueError("first")

    first = start(lambda: owner.run(fail))
    entered.wait(5)
    second = start(lambda: owner.run(lambda engine: None))
    time.sleep(0.05)
    go_on.set()
    for future in (first, second):
        with pytest.raises(EngineFailed, match="ValueError: first"):
            future.result(timeout=5)
    owner.close()


def test_close_ends_the_engine_on_its_own_thread_and_joins_it():
    owner = EngineThread(CountingEngine)
    engine = owner.run(lambda engine: engine)
    owner.run(add("a", [3], FOREVER))
    owner.close()
    assert engine.log == ["close"]
    assert not engine_threads()


def test_a_command_after_close_is_refused_and_does_not_hang():
    owner = EngineThread(CountingEngine)
    owner.close()
    with pytest.raises(EngineFailed):
        within(1, lambda: owner.run(lambda engine: None))


class CopyingReceiver:
    """A transport whose handle is the arena that was published."""

    def __init__(self, arenas: list[Arena]) -> None:
        self._arenas = arenas

    def pull(self, rank: int, handle: Arena) -> None:
        self._arenas[rank].flat.copy_(handle.flat)

    def close(self) -> None: ...


class CopyingTransport:
    def publisher(self, arena: Arena) -> Any:
        raise NotImplementedError

    def receiver(self, arenas: list[Arena]) -> CopyingReceiver:
        return CopyingReceiver(arenas)


SLOTS = [[Slot("w", (3,), "float32", 0)], [Slot("w", (1,), "float32", 0), Slot("b", (2,), "bfloat16", 64)]]
COPIES = [
    Copy(0, "w", (0,), 0, "w", (0,), (3,)),
    Copy(1, "w", (0,), 0, "w", (3,), (1,)),
    Copy(1, "b", (0,), 0, "b", (0,), (2,)),
]


@pytest.fixture
def worker() -> Iterator[RolloutWorker]:
    worker = RolloutWorker(0, 1, CountingEngine)
    worker.connect(SLOTS, COPIES, CopyingTransport())
    yield worker
    worker.close()


def published(value: float) -> tuple[list[Arena], list[str]]:
    arenas = [Arena(slots, torch.device("cpu")) for slots in SLOTS]
    for arena in arenas:
        for view in arena.views.values():
            view.fill_(value)
    return arenas, [digest(arena) for arena in arenas]


def weights(worker: RolloutWorker) -> list[list[float]]:
    return worker._engine.run(lambda engine: [tensor.tolist() for tensor in engine.weights.values()])


def generate(worker: RolloutWorker) -> list[Completion]:
    ((_, completions),) = worker.generate([Request("a", [3], TWO_TOKENS)], seed=5, timeout_s=10)
    return completions


def test_a_worker_describes_its_engine(worker: RolloutWorker):
    shapes, packed = worker.parameters()
    assert shapes == {"w": ((4,), "float32"), "b": ((2,), "bfloat16")}
    assert packed == {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_a_staged_version_is_served_from_its_commit_on_and_not_before(worker: RolloutWorker):
    arenas, digests = published(2.0)
    staged = worker.stage(1, arenas, digests)
    assert staged.num_bytes == 3 * 4 + 4 + 2 * 2
    assert weights(worker) == [[0.0] * 4, [0.0] * 2]
    assert generate(worker)[0].weight_version == 0
    worker.commit(1)
    assert weights(worker) == [[2.0] * 4, [2.0] * 2]
    assert generate(worker)[0].weight_version == 1


def test_staging_needs_no_engine_step(worker: RolloutWorker):
    entered, go_on = threading.Event(), threading.Event()
    arenas, digests = published(2.0)
    stuck = start(lambda: worker._engine.run(lambda engine: (entered.set(), go_on.wait(10))))
    entered.wait(5)
    within(5, lambda: worker.stage(1, arenas, digests))
    go_on.set()
    stuck.result(timeout=5)


def test_bytes_that_changed_on_the_way_are_refused_and_cannot_be_committed(worker: RolloutWorker):
    arenas, digests = published(2.0)
    arenas[1].flat[65] ^= 1
    with pytest.raises(VerificationError, match="version 1 from train rank 1"):
        worker.stage(1, arenas, digests)
    with pytest.raises(RuntimeError, match="commit of version 1, but None is staged"):
        worker.commit(1)
    assert weights(worker) == [[0.0] * 4, [0.0] * 2]


def test_a_failed_stage_takes_back_the_version_staged_before_it(worker: RolloutWorker):
    worker.stage(1, *published(2.0))
    arenas, _ = published(3.0)
    with pytest.raises(VerificationError):
        worker.stage(2, arenas, ["0" * 32, "0" * 32])
    with pytest.raises(RuntimeError, match="None is staged"):
        worker.commit(1)


def test_another_version_than_the_staged_one_is_not_committed(worker: RolloutWorker):
    worker.stage(1, *published(2.0))
    with pytest.raises(RuntimeError, match="commit of version 2, but 1 is staged"):
        worker.commit(2)
    worker.commit(1)


def test_without_digests_nothing_is_compared(worker: RolloutWorker):
    arenas, _ = published(2.0)
    worker.stage(1, arenas, [None, None])
    worker.commit(1)
    assert weights(worker)[0] == [2.0] * 4


def test_a_batch_seeds_the_engine_before_its_requests(worker: RolloutWorker):
    assert generate(worker) == [Completion([4, 5], [0.0, 0.0], "length", 0)]
    assert worker._engine.run(lambda engine: engine.log) == [("seed", 5)]
