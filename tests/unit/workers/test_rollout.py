import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from tests.unit.workers.local_transport import HoldingEngine, LocalTransport
from transport.auto import Probe
from transport.base import Link, Parameters
from transport.names import EngineParameter
from transport.packing import Packed
from transport.plan import Copy
from transport.receipt import VerificationError
from transport.types import Completion
from workers.engine import SamplingSpec
from workers.rollout import EngineFailed, EngineThread, Request, RolloutWorker
from workers.weights import Inlet, Outlet, WeightSender

TWO_TOKENS = SamplingSpec(n=1, max_tokens=2)
FOREVER = SamplingSpec(n=1, max_tokens=1_000_000)


PARAMETERS: Parameters = {"w": ((4,), "float32"), "b": ((2,), "bfloat16")}


class CountingEngine(HoldingEngine):
    """Each completion counts up from its prompt's last token, a token a step, under the version then served."""

    def __init__(self, turns: bool = True) -> None:
        super().__init__(PARAMETERS, turns)
        self.log: list[Any] = []
        self.threads = {threading.get_ident()}
        self.is_stepping = False
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

    def weights_written(self, weight_version: int) -> None:
        assert not self.is_stepping
        super().weights_written(weight_version)

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
        owner.run(lambda engine: engine.parameters()["gone"])
    with pytest.raises(EngineFailed, match="gone"):
        within(5, lambda: owner.run(lambda engine: None))
    owner.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_library_that_wants_to_end_the_process_in_a_command_does_not_leave_its_caller_waiting():
    owner = EngineThread(CountingEngine)

    def leave(engine: CountingEngine) -> None:
        raise SystemExit(3)

    with pytest.raises(EngineFailed, match=r"^SystemExit: 3$"):
        within(5, lambda: owner.run(leave))
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


def test_a_refusal_fails_its_caller_alone_and_the_engine_goes_on(owner: EngineThread):
    owner.run(add("a", [3], SamplingSpec(n=1, max_tokens=30)))

    def refuse(engine: CountingEngine) -> None:
        raise VerificationError("version 7 from train rank 2")

    with pytest.raises(VerificationError, match=r"^version 7 from train rank 2$"):
        owner.run(refuse)
    assert owner.run(lambda engine: engine.weight_version) == 0
    (finished,) = owner.take_finished(1, timeout_s=10)
    assert finished[1][0].tokens == list(range(4, 34))


# A worker and its end of the refit.


class Trainer:
    """Two train ranks: rank 0 holds w[:3], rank 1 w[3] and b. Version v is v everywhere."""

    def __init__(self, lands: bool) -> None:
        copies = {
            0: [Copy("w", 0, "w", (0,), 0, "w", (0,), (3,), "float32")],
            1: [
                Copy("w", 1, "w", (0,), 0, "w", (3,), (1,), "float32"),
                Copy("b", 1, "b", (0,), 0, "b", (0,), (2,), "bfloat16"),
            ],
        }
        self._shards = [{"w": torch.zeros(3)}, {"w": torch.zeros(1), "b": torch.zeros(2)}]
        self._senders = [WeightSender(shards, torch.device("cpu")) for shards in self._shards]
        transport, link = LocalTransport(lands), Link("test-0", (0, 1), (0,), 20)
        self.regions = transport.arrange(PARAMETERS, copies)
        offers = {
            rank: sender.open([Outlet(link, transport, self.regions[rank], 1)])["test-0"]
            for rank, sender in enumerate(self._senders)
        }
        for sender in self._senders:
            sender.attach({"test-0": offers})
        self.inlet, self.offers = Inlet(link, transport, self.regions, 1), offers

    def publish(self, version: int, verify: bool = True) -> dict[int, Packed]:
        for shards in self._shards:
            for shard in shards.values():
                shard.fill_(version)
        return {rank: s.publish(version, verify).packed["test-0"] for rank, s in enumerate(self._senders)}

    def corrupt(self, version: int) -> None:
        """Flip a bit of b where it was published."""
        self.offers[1 if len(self.offers[1]) else 0][version % 2][self.regions[1].pieces[1].offset] ^= 1


@pytest.fixture(params=[True, False], ids=["turns", "copies"])
def turns(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[True, False], ids=["landing", "shared"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return Trainer(request.param)


@pytest.fixture
def worker(turns: bool, trainer: Trainer) -> Iterator[RolloutWorker]:
    worker = RolloutWorker(0, 1, lambda: CountingEngine(turns))
    worker.connect(trainer.inlet, trainer.offers)
    yield worker
    worker.close()


def weights(worker: RolloutWorker) -> list[list[float]]:
    return worker._engine.run(lambda engine: [tensor.tolist() for tensor in engine.parameters().values()])


def holds(version: float) -> list[list[float]]:
    return [[version] * 4, [version] * 2]


def generate(worker: RolloutWorker) -> list[Completion]:
    ((_, completions),) = worker.generate([Request("a", [3], TWO_TOKENS)], seed=5, timeout_s=10)
    return completions


def test_a_worker_describes_its_engine_and_how_far_it_reaches(worker: RolloutWorker):
    described = worker.describe_weights([Probe("cpu").site])
    assert described.parameters == {"w": EngineParameter((4,), "float32"), "b": EngineParameter((2,), "bfloat16")}
    assert described.packed == {"qk": ["q", "k"]}
    assert (described.reach.device, described.reach.same_host, described.reach.can_share) == ("cpu", True, True)


def test_a_staged_version_is_served_from_its_commit_on_and_not_before(worker: RolloutWorker, trainer: Trainer):
    for version in (1, 2, 3):
        staged = worker.stage(version, trainer.publish(version))
        assert staged.num_bytes == 3 * 4 + 4 + 2 * 2
        assert weights(worker) == holds(version - 1)
        assert generate(worker)[0].weight_version == version - 1
        assert worker.commit(version) > 0
        assert weights(worker) == holds(version)
        assert generate(worker)[0].weight_version == version


def test_staging_needs_no_engine_step(worker: RolloutWorker, trainer: Trainer):
    entered, go_on = threading.Event(), threading.Event()
    packed = trainer.publish(1)
    stuck = start(lambda: worker._engine.run(lambda engine: (entered.set(), go_on.wait(10))))
    entered.wait(5)
    within(5, lambda: worker.stage(1, packed))
    go_on.set()
    stuck.result(timeout=5)


def test_a_commit_runs_between_two_steps_of_requests_that_go_on(worker: RolloutWorker, trainer: Trainer):
    worker.submit([Request("a", [3], FOREVER)], seed=0)
    for version in (1, 2, 3):
        worker.stage(version, trainer.publish(version))
        within(5, lambda version=version: worker.commit(version))  # the engine asserts that it is not in a step
    assert weights(worker) == holds(3)


def test_bytes_that_changed_on_the_way_are_refused_and_the_engine_goes_on_serving(
    worker: RolloutWorker, trainer: Trainer
):
    worker.stage(1, trainer.publish(1))
    worker.commit(1)
    packed = trainer.publish(2)
    trainer.corrupt(2)
    with pytest.raises(VerificationError, match="version 2 from train rank 1: b has the digest"):
        worker.stage(2, packed)
    with pytest.raises(VerificationError, match=r"^commit of version 2, but None is staged$"):
        worker.commit(2)
    assert weights(worker) == holds(1)
    assert generate(worker)[0].weight_version == 1
    worker.stage(3, trainer.publish(3))
    worker.commit(3)
    assert generate(worker)[0].weight_version == 3


def test_a_version_that_is_not_the_last_staged_is_refused_and_the_engine_goes_on(
    worker: RolloutWorker, trainer: Trainer
):
    worker.stage(1, trainer.publish(1))
    worker.stage(2, trainer.publish(2))
    with pytest.raises(VerificationError, match=r"^commit of version 1, but 2 is staged$"):
        worker.commit(1)
    worker.commit(2)
    assert weights(worker) == holds(2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_commit_that_fails_otherwise_ends_the_engine(turns: bool, trainer: Trainer):
    class Torn(CountingEngine):
        def weights_written(self, weight_version: int) -> None:
            raise MemoryError("no room for the experts")

    worker = RolloutWorker(0, 1, lambda: Torn(turns))
    worker.connect(trainer.inlet, trainer.offers)
    worker.stage(1, trainer.publish(1))
    # Half of what a commit does has been done: nobody may be served from it.
    with pytest.raises(EngineFailed, match=r"^MemoryError: no room for the experts$"):
        worker.commit(1)
    with pytest.raises(EngineFailed, match="no room for the experts"):
        within(5, lambda: generate(worker))
    worker.close()
    assert not engine_threads()


def test_a_batch_seeds_the_engine_before_its_requests(worker: RolloutWorker):
    assert generate(worker) == [Completion([4, 5], [0.0, 0.0], "length", 0)]
    assert worker._engine.run(lambda engine: engine.log) == [("seed", 5)]
