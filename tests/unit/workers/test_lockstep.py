"""Ranks of one engine in one process: real gloo, real engine threads, engines that only count."""

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist

from transport.names import EngineParameter
from transport.receipt import VerificationError
from transport.types import Completion
from workers.engine import SamplingSpec
from workers.lockstep import Ranks, join_ranks, launcher_environment
from workers.rollout import EngineFailed, EngineThread, Request, RolloutWorker

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
PATIENT = Ranks(2, launch_s=20, step_s=20)
HASTY = Ranks(2, launch_s=20, step_s=1)


class SteppingEngine:
    """A token a step for every running request: the weight version then served, so a completion shows each switch."""

    packed_modules_mapping: Mapping[str, list[str]] = {}
    turns = False

    def __init__(self, step_s: float = 0.001, sampled: int = 0) -> None:
        self.weight_version, self.num_steps = 0, 0
        self._step_s, self._sampled = step_s, sampled
        self._running: dict[str, tuple[list[int], SamplingSpec]] = {}

    def add_request(self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec) -> None:
        self._running[request_id] = ([], sampling)

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def step(self) -> list[tuple[str, list[Completion]]]:
        time.sleep(self._step_s)
        self.num_steps += 1
        finished = []
        for request_id, (tokens, sampling) in list(self._running.items()):
            tokens.append(self.weight_version + self._sampled)
            if len(tokens) == sampling.max_tokens:
                del self._running[request_id]
                finished.append((request_id, [Completion(tokens, [0.5] * len(tokens), "length", 0)]))
        return finished

    def seed(self, seed: int) -> None: ...

    def parameters(self) -> Mapping[str, torch.Tensor]:
        return {}

    def describe_parameters(self) -> dict[str, EngineParameter]:
        return {}

    def turn(self, parameters: Mapping[str, torch.Tensor]) -> None: ...

    def weights_written(self, weight_version: int) -> None:
        self.weight_version = weight_version

    def close(self) -> None: ...


Start = Callable[..., list[EngineThread]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the ranks of one engine; ends them after the test."""
    threads: list[EngineThread] = []

    def launch(ranks: Ranks, *make: Callable[[], Any]) -> list[EngineThread]:
        store = dist.TCPStore("127.0.0.1", 0, ranks.size, is_master=True, wait_for_workers=False)
        for rank in range(ranks.size):
            join = functools.partial(join_ranks, None if rank else store, f"127.0.0.1:{store.port}", rank, ranks)
            threads.append(EngineThread(make[rank % len(make)], join))
        return threads

    yield launch
    for thread in threads:
        thread.close()


def post(thread: EngineThread, command: Callable[[Any], Any], key: str | None = None) -> "Future[Any]":
    """Run a command from a thread of its own, as Ray does."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(thread.run(command, key))
        except RuntimeError as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def add(request_id: str, max_tokens: int) -> Callable[[Any], None]:
    return lambda engine: engine.add_request(request_id, [1], SamplingSpec(1, max_tokens))


def switch(version: int) -> Callable[[Any], int]:
    """Commits a version. Returns the step before which it did."""
    return lambda engine: (engine.weights_written(version), engine.num_steps)[1]


def finished(thread: EngineThread, num: int) -> dict[str, list[int]]:
    return {request_id: one.tokens for request_id, (one,) in thread.take_finished(num, timeout_s=10)}


def test_commands_that_reach_the_ranks_in_any_order_run_in_one_order_before_the_same_steps(start: Start):
    ranks = start(Ranks(3, 20, 20), SteppingEngine)
    generator = random.Random(0)
    commands = [(f"add {i}", add(str(i), 30)) for i in range(6)] + [(f"commit {v}", switch(v)) for v in range(1, 9)]

    def trickle(thread: EngineThread, order: list[tuple[str, Any]], pauses: list[float]) -> None:
        for (key, command), pause in zip(order, pauses, strict=True):
            post(thread, command, key)
            time.sleep(pause)

    senders = []
    for thread in ranks:
        order = generator.sample(commands, len(commands))
        pauses = [generator.random() * 0.01 for _ in commands]
        senders.append(threading.Thread(target=trickle, args=(thread, order, pauses)))
    for sender in senders:
        sender.start()
    first, second, third = (finished(thread, 6) for thread in ranks)
    assert first == second == third
    assert len({tuple(tokens) for tokens in first.values()}) > 1  # versions did change while they were decoding
    for sender in senders:
        sender.join()


def test_a_version_commits_before_the_same_step_of_every_rank_while_they_decode(start: Start):
    ranks = start(PATIENT, SteppingEngine, functools.partial(SteppingEngine, step_s=0.004))
    for thread in ranks:
        post(thread, add("a", 60), "add a")
    for version in range(1, 6):
        late = version % 2  # now the one, now the other hears of it later
        early = post(ranks[1 - late], switch(version), f"commit {version}")
        time.sleep(0.02)
        then = post(ranks[late], switch(version), f"commit {version}")
        assert early.result(10) == then.result(10)
    sampled = finished(ranks[0], 1)
    assert sampled == finished(ranks[1], 1)
    assert len(set(sampled["a"])) > 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_idle_rank_runs_what_is_its_own_matter_without_the_others(start: Start):
    ranks = start(PATIENT, SteppingEngine)
    assert post(ranks[1], lambda engine: engine.num_steps).result(2) == 0
    with pytest.raises(TimeoutError):
        post(ranks[1], lambda engine: None, "commit 1").result(0.3)


def test_more_commands_than_a_message_has_room_for_all_run(start: Start):
    ranks = start(PATIENT, SteppingEngine)
    keys = [f"{i:03} " + "x" * 200 for i in range(20)]
    futures = [post(thread, lambda engine: None, key) for thread in ranks for key in keys]
    for future in futures:
        future.result(10)


def test_completions_are_handed_out_without_a_further_command(start: Start):
    ranks = start(PATIENT, SteppingEngine)
    for thread in ranks:
        post(thread, add("a", 3), "add a")
    assert finished(ranks[0], 1) == finished(ranks[1], 1) == {"a": [0, 0, 0]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_ranks_that_sample_different_tokens_hand_out_nothing(start: Start):
    ranks = start(PATIENT, SteppingEngine, functools.partial(SteppingEngine, sampled=1))
    for thread in ranks:
        post(thread, add("a", 3), "add a")
    for rank, thread in enumerate(ranks):
        with pytest.raises(EngineFailed, match=f"engine rank {1 - rank} sampled other completions than rank {rank}"):
            thread.take_finished(1, timeout_s=10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_command_that_only_rank_0_of_an_idle_engine_gets_names_the_late_rank(start: Start):
    ranks = start(HASTY, SteppingEngine)
    with pytest.raises(EngineFailed, match=r"engine rank 1 did not come to commit 7 within 1 s"):
        post(ranks[0], switch(7), "commit 7").result(5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_command_that_a_decoding_rank_does_not_get_names_it_and_the_command(start: Start):
    ranks = start(HASTY, SteppingEngine)
    for future in [post(thread, add("a", 1_000_000), "add a") for thread in ranks]:
        future.result(5)
    post(ranks[0], switch(7), "commit 7")
    with pytest.raises(EngineFailed, match=r"engine rank 0 was told to commit 7, rank 1 was not, within 1 s"):
        ranks[1].take_finished(1, timeout_s=5)
    # Rank 0 is at the next step by then, and waits for rank 1 as long.
    with pytest.raises(EngineFailed, match=r"engine rank 1 (is gone, waited for at|did not come to) the next step"):
        ranks[0].take_finished(1, timeout_s=5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_fails_is_missed_at_once_and_not_after_the_deadline(start: Start):
    class Failing(SteppingEngine):
        def step(self) -> Any:
            if self.num_steps == 5:
                raise ValueError("the cache is full")
            return super().step()

    ranks = start(PATIENT, SteppingEngine, Failing)
    begin = time.monotonic()
    for thread in ranks:
        post(thread, add("a", 1_000_000), "add a")
    with pytest.raises(EngineFailed, match="the cache is full"):
        ranks[1].take_finished(1, timeout_s=10)
    with pytest.raises(EngineFailed, match="engine rank 1 is gone"):
        ranks[0].take_finished(1, timeout_s=10)
    assert time.monotonic() - begin < 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_callers_whose_commands_wait_for_agreement_get_the_error_too(start: Start):
    ranks = start(HASTY, SteppingEngine)
    waiting = [post(ranks[0], switch(version), f"commit {version}") for version in (7, 8)]
    for future in waiting:
        with pytest.raises(EngineFailed, match="engine rank 1 did not come"):
            future.result(5)


def test_what_one_rank_refuses_every_rank_refuses_and_the_engine_goes_on(start: Start):
    ranks = start(PATIENT, SteppingEngine)

    def commit(thread: EngineThread, version: int, fails: bool) -> "Future[Any]":
        def check() -> None:
            if fails:
                raise VerificationError("commit of version 7, but None is staged")

        def run(engine: SteppingEngine) -> None:
            thread.unanimous(check)
            engine.weights_written(version)

        return post(thread, run, f"commit {version}")

    for future in [commit(thread, 7, fails=rank == 1) for rank, thread in enumerate(ranks)]:
        with pytest.raises(VerificationError, match=r"^engine rank 1: commit of version 7, but None is staged$"):
            future.result(5)
    for future in [commit(thread, 8, fails=False) for thread in ranks]:
        future.result(5)
    assert [thread.run(lambda engine: engine.weight_version) for thread in ranks] == [8, 8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_never_comes_fails_the_start_of_the_others():
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    alone = EngineThread(
        SteppingEngine, functools.partial(join_ranks, store, f"127.0.0.1:{store.port}", 0, Ranks(2, 1, 1))
    )
    with pytest.raises(EngineFailed):
        post(alone, lambda engine: None).result(20)
    alone.close()


def test_ranks_of_an_engine_meet_at_the_store_that_serves_already_and_see_their_own_device_only():
    assert launcher_environment("127.0.0.1:4711", 1, Ranks(2, 20, 20)) == {
        "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    assert "GLOO_SOCKET_IFNAME" not in launcher_environment("10.0.0.5:4711", 1, Ranks(2, 20, 20))


class StagedWeights:
    """A WeightReceiver that has staged a version, or says at the check or at the commit that it has not."""

    def __init__(self, refuses: str = "") -> None:
        self._refuses = refuses

    def check(self, version: int) -> None:
        if self._refuses == "check":
            raise VerificationError(f"commit of version {version}, but None is staged")

    def commit(self, engine: SteppingEngine, version: int) -> float:
        if self._refuses == "commit":
            raise VerificationError(f"commit of version {version}, but {version + 1} is staged")
        engine.weights_written(version)
        return 0.0


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RolloutWorker]]:
    """Ranks 2 and 3 of 4, which are engine 1."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    made = [RolloutWorker(rank, 4, SteppingEngine, PATIENT) for rank in (2, 3)]
    address = made[0].rendezvous()
    for worker in made:
        worker.start(address)
        worker._weights = StagedWeights()  # type: ignore[assignment]
    yield made
    for worker in made:
        worker.close()


def on_both(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that wait for each other, or their exceptions."""
    futures: list[Future[Any]] = [Future() for _ in calls]

    def run(call: Callable[[], Any], future: "Future[Any]") -> None:
        try:
            future.set_result(call())
        except RuntimeError as error:
            future.set_exception(error)

    for call, future in zip(calls, futures, strict=True):
        threading.Thread(target=run, args=(call, future), daemon=True).start()
    return [future.exception(10) or future.result() for future in futures]


def test_the_workers_of_one_engine_sample_the_same_and_the_first_one_answers(workers: list[RolloutWorker]):
    assert os.environ["WORLD_SIZE"] == "2" and os.environ["RANK"] in ("0", "1")
    requests = [Request(str(index), [1], SamplingSpec(1, 3)) for index in range(2)]
    first, second = on_both(
        [functools.partial(worker.generate, requests, 5, 10.0, worker is workers[0]) for worker in workers]
    )
    assert [request_id for request_id, _ in first] == ["0", "1"]
    assert second == []


def test_a_version_commits_on_both_workers_of_an_engine_or_on_none(workers: list[RolloutWorker]):
    workers[1]._weights = StagedWeights("check")  # type: ignore[assignment]
    refusals = on_both([functools.partial(worker.commit, 7) for worker in workers])
    assert [str(one) for one in refusals] == ["engine rank 1: commit of version 7, but None is staged"] * 2
    workers[1]._weights = StagedWeights()  # type: ignore[assignment]
    assert all(isinstance(one, float) for one in on_both([functools.partial(worker.commit, 8) for worker in workers]))
    assert [worker._engine.run(lambda engine: engine.weight_version) for worker in workers] == [8, 8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_cannot_commit_what_it_had_checked_ends_the_engine(workers: list[RolloutWorker]):
    workers[1]._weights = StagedWeights("commit")  # type: ignore[assignment]
    first, second = on_both([functools.partial(worker.commit, 7) for worker in workers])
    assert isinstance(first, float)  # this one has committed, so the other must not go on with the old weights
    assert isinstance(second, EngineFailed) and "could not commit what it had checked" in str(second)
    with pytest.raises(EngineFailed, match="engine rank 1 is gone"):
        workers[0].submit([Request("a", [1], SamplingSpec(1, 3))], 5)
