"""The real WeightSync, WorkerGroup, RolloutWorkers, packing and receipts; only Ray is played: a call runs when a test
says so, and the clock moves when a test says so."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from configs.schema import TransportConfig
from orchestrator.errors import DeadlineExceeded, RefitFailed
from orchestrator.version_life import State
from orchestrator.weight_sync import RefitReport, WeightSync
from orchestrator.worker_group import PEER_GRACE_S, WorkerGroup
from tests.unit.workers.local_transport import HoldingEngine, LocalPublisher, LocalTransport
from transport.auto import Probe, Site
from transport.base import Offers, Parameters
from transport.layout import Box, Layout, Placement, Shard
from transport.receipt import withdraw_receipt
from workers.rollout import RolloutWorker
from workers.weights import Outlet, Publication, WeightSender
from workers.worker import Worker

DEADLINE_S = 30.0
PARAMETERS: Parameters = {"m.a": ((4,), "float32"), "m.b": ((3,), "bfloat16")}
GARBAGE = 99.0
"""What a half holds while it is being written."""
PROBE = Probe("cpu")
PUBLISH_PARTS = 3
"""It begins to write, it has written, it answers."""


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time stands still but for `pass_s`."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Run everything that waits for nothing."""
        for _ in range(20):
            self.run_until_complete(asyncio.sleep(0))

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.settle()


class Trainer(Worker):
    """Train rank 0 holds the first rows of both tensors, rank 1 the last; version v is v everywhere."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        boxes = {"m.a": Box((2 * rank,), (2,)), "m.b": Box((2 * rank,), (2 - rank,))}
        self._shards = {name: torch.zeros(box.shape) for name, box in boxes.items()}
        self._layout = [
            Placement(name, (PARAMETERS[name][0]), name, "float32", (Shard(rank, box, (0,)),))
            for name, box in boxes.items()
        ]
        self.sender = WeightSender(self._shards, torch.device("cpu"))

    def layout(self) -> Layout:
        return self._layout

    def site(self) -> Site:
        return PROBE.site

    def open_channels(self, outlets: list[Outlet]) -> dict[str, Any]:
        return self.sender.open(outlets)

    def attach(self, offers: dict[str, Offers]) -> None:
        self.sender.attach(offers)

    def begin(self, version: int) -> None:
        """The first part of a publish call: the half is no version any more and holds some other bytes."""
        for publisher in self.sender._publishers.values():
            assert isinstance(publisher, LocalPublisher)
            flat = publisher.flats[version % 2]
            withdraw_receipt(flat, publisher.region)
            publisher.region.pieces[0].view(flat).fill_(GARBAGE)

    def publish(self, version: int, verify: bool) -> Publication:
        for shard in self._shards.values():
            shard.fill_(version)
        return self.sender.publish(version, verify)


class Actor:
    """A process as Ray shows it. Calls run one by one, in order, at `go_on`; a publish call takes several."""

    def __init__(self, clock: Clock, worker: Worker) -> None:
        self.run = self  # so that `actor.run.remote(...)` is what it is with Ray
        self.worker, self.is_dead = worker, False
        self._clock, self._parts_done = clock, 0
        self._result: Any = None
        self.calls: deque[tuple[str, tuple[Any, ...], asyncio.Future[Any]]] = deque()

    def remote(self, method: str, *arguments: Any) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = self._clock.create_future()
        if self.is_dead:
            future.set_exception(ray.exceptions.RayActorError())
        else:
            self.calls.append((method, arguments, future))
        return future

    def go_on(self) -> None:
        """Run the next call, or the next part of it."""
        if not self.calls:
            return
        method, arguments, _ = self.calls[0]
        if method == "publish" and self._parts_done == 0:
            self.worker.begin(arguments[0])  # type: ignore[attr-defined]
        elif method != "publish" or self._parts_done == 1:
            try:
                self._result = self.worker.run(method, *arguments)
            except RuntimeError as error:
                self._result = error
        self._parts_done += 1
        if self._parts_done == (PUBLISH_PARTS if method == "publish" else 1):
            self._parts_done = 0
            self._answer(self.calls.popleft()[2], self._result)

    def fail(self) -> None:
        """The next call raises."""
        if self.calls:
            self._answer(self.calls.popleft()[2], MemoryError("no room"))

    def die(self) -> None:
        self.is_dead = True
        while self.calls:
            self._answer(self.calls.popleft()[2], ray.exceptions.RayActorError())

    def _answer(self, future: "asyncio.Future[Any]", answer: Any) -> None:
        if future.cancelled():
            return
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        self._clock.settle()


class Run:
    """Two train ranks and some engines, connected."""

    def __init__(
        self, num_engines: int = 2, ranks: int = 1, lands: bool = False, turns: bool = True, verify: str = "always",
        one_sided: bool = True,
    ) -> None:  # fmt: skip
        self.clock = Clock()
        self.engines: list[HoldingEngine] = []
        self.trainers = [Actor(self.clock, Trainer(rank)) for rank in range(2)]
        self.rollouts = [
            Actor(self.clock, RolloutWorker(rank, num_engines * ranks, self._maker(turns)))
            for rank in range(num_engines * ranks)
        ]
        groups: list[WorkerGroup[Any]] = [
            WorkerGroup(role, actors, None, lambda *span: None)  # type: ignore[arg-type]
            for role, actors in (("trainer", self.trainers), ("rollout", self.rollouts))
        ]
        config = TransportConfig.model_validate({"type": "object_store", "verify": verify})
        self.ranks, self.version, self.notes = ranks, 0, list[str]()
        self.sync = WeightSync(groups[0], groups[1], config, DEADLINE_S, ranks, self.notes.append)
        self.refits: asyncio.Task[RefitReport] | None = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("orchestrator.channels.make_transport", lambda kind: LocalTransport(lands, one_sided))
            self._finish(self.clock.create_task(self.sync.connect(DEADLINE_S)))

    def _maker(self, turns: bool) -> Callable[[], HoldingEngine]:
        engine = HoldingEngine(PARAMETERS, turns)
        self.engines.append(engine)
        return lambda: engine

    @property
    def actors(self) -> list[Actor]:
        return [*self.trainers, *self.rollouts]

    @property
    def is_publishing(self) -> bool:
        return any(actor.calls for actor in self.trainers)

    def start_refit(self) -> None:
        self.version += 1
        self.refits = self.clock.create_task(self.sync.refit(self.version))
        self.clock.settle()

    def _finish(self, task: "asyncio.Task[Any]") -> Any:
        """Let everybody work until it is done."""
        for _ in range(50):
            self.clock.settle()
            for actor in self.actors:
                actor.go_on()
            if task.done():
                return task.result()
        raise AssertionError("it waits for something that nobody does")

    def refit(self) -> RefitReport:
        self.start_refit()
        assert self.refits is not None
        return self._finish(self.refits)

    def publish(self) -> None:
        """Begin a refit, up to where the engines are told to stage."""
        self.start_refit()
        for actor in self.trainers * PUBLISH_PARTS:
            actor.go_on()

    def ranks_of(self, engine: int) -> range:
        return range(engine * self.ranks, (engine + 1) * self.ranks)

    def serves(self, engine: int, *versions: int) -> bool:
        """Whether each of its ranks holds exactly one of these versions."""
        return all(
            engine.serves() == {name: [float(engine.weight_version)] for name in PARAMETERS}
            and engine.weight_version in versions
            for engine in (self.engines[rank] for rank in self.ranks_of(engine))
        )

    def close(self) -> None:
        for actor in self.rollouts:
            actor.worker.close()  # type: ignore[attr-defined]
        if self.refits is not None and not self.refits.cancel() and not self.refits.cancelled():
            self.refits.exception()
        self.clock.settle()
        self.clock.close()


@pytest.fixture
def runs() -> Any:
    """Makes a Run; ends it after the test."""
    made: list[Run] = []

    def make(**options: Any) -> Run:
        made.append(Run(**options))
        return made[-1]

    yield make
    for run in made:
        run.close()


Runs = Callable[..., Run]


def test_every_refit_is_one_call_per_train_rank_and_two_per_engine_rank(runs: Runs):
    run = runs(num_engines=2, ranks=2)
    for version in (1, 2, 3):
        report = run.refit()
        assert (report.version, report.verified, report.quarantined) == (version, True, {})
        # a of 4 x 4 bytes and b of 3 x 2.
        assert (report.num_bytes, report.num_actor_calls) == (22, 2 + 2 * 4)
        assert run.serves(0, version) and run.serves(1, version)
        assert run.sync.life.serving() == [0, 1]


def test_nobody_stages_before_every_train_rank_has_published(runs: Runs):
    run = runs()
    run.start_refit()
    for actor in (*run.trainers, *run.trainers, run.trainers[0]):
        actor.go_on()
    assert run.is_publishing and not any(actor.calls for actor in run.rollouts)
    with pytest.raises(AssertionError, match="version 1 is still being written"):
        run.sync.life.begin_stage(0, 1)
    run.trainers[1].go_on()
    assert [actor.calls[0][0] for actor in run.rollouts] == ["stage", "stage"]


def test_where_both_sides_meet_engines_stage_while_train_ranks_publish(runs: Runs):
    run = runs(one_sided=False)
    for version in (1, 2):
        run.start_refit()
        assert [actor.calls[0][0] for actor in run.actors] == ["publish", "publish", "stage", "stage"]
        assert run.rollouts[0].calls[0][1] == (version, {})  # what train ranks announce comes another way
        for actor in run.trainers * 2:
            actor.go_on()
        run._finish(run.refits)  # type: ignore[arg-type]
        assert run.serves(0, version) and run.serves(1, version)


def test_where_both_sides_meet_nobody_commits_before_every_train_rank_has_published(runs: Runs):
    run = runs(one_sided=False)
    run.start_refit()
    for actor in (*run.trainers, *run.trainers, run.trainers[0], run.rollouts[0]):
        actor.go_on()
    assert run.is_publishing and not run.rollouts[0].calls  # it has staged
    run.trainers[1].go_on()
    assert [actor.calls[0][0] for actor in run.rollouts] == ["commit", "stage"]


def test_an_engine_that_was_given_bad_bytes_is_quarantined_and_the_others_are_not_kept_waiting(runs: Runs):
    run = runs()
    run.refit()
    run.publish()
    (publisher,) = run.trainers[1].worker.sender._publishers.values()  # type: ignore[attr-defined]
    place = publisher.flats[0], publisher.region.pieces[0].offset
    run.rollouts[0].go_on()
    run.rollouts[0].go_on()
    assert run.serves(0, 2)
    place[0][place[1]] ^= 1
    run.rollouts[1].go_on()
    place[0][place[1]] ^= 1
    report = run._finish(run.refits)  # type: ignore[arg-type]
    assert run.sync.life.serving() == [0]
    assert report.quarantined.keys() == {1}
    assert "rollout/1 failed in stage: VerificationError: version 2 from train rank 1: m.a has" in report.quarantined[1]
    # The next refit heals it.
    assert run.refit().quarantined == {}
    assert run.serves(0, 3) and run.serves(1, 3)


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("lands", [True, False])
def test_a_frozen_engine_is_left_alone_until_it_wakes_and_wakes_without_harm(runs: Runs, lands: bool, turns: bool):
    run = runs(lands=lands, turns=turns)
    run.refit()
    run.publish()
    for _ in range(2):
        run.rollouts[0].go_on()
    run.rollouts[1].go_on()  # engine 1 has staged version 2 and is frozen when it is told to commit
    run.clock.pass_s(DEADLINE_S + 1)
    assert run.sync.life.quarantined() == {1: "rollout/1 did not answer commit within 30 s"}
    for _ in range(2):
        run.start_refit()
        for _ in range(5):
            for actor in (*run.trainers, run.rollouts[0]):
                actor.go_on()
        assert run.refits is not None and run.refits.done()
        # It still owes the answer to the commit, so it has been told nothing else.
        assert [call[0] for call in run.rollouts[1].calls] == ["commit"]
        assert run.sync.life.serving() == [0]
        assert "did not answer commit" in run.sync.life.quarantined()[1]
    run.rollouts[1].go_on()  # version 2, which is long overwritten
    assert run.sync.life.serving() == [0]
    run.refit()
    assert run.serves(0, 5) and run.serves(1, 5)
    assert run.sync.life.serving() == [0, 1]


def test_an_engine_that_was_late_with_something_else_serves_nothing_until_it_has_answered(runs: Runs):
    run = runs()
    run.refit()
    collect = run.clock.create_task(run.sync._rollout.call_rank(1, "generate", [], 0, 1.0, deadline_s=5.0))
    run.clock.settle()
    run.clock.pass_s(6)
    assert isinstance(collect.exception(), DeadlineExceeded)
    for _ in range(2):
        run.start_refit()
        for _ in range(5):
            for actor in (*run.trainers, run.rollouts[0]):
                actor.go_on()
        assert run.sync.life.serving() == [0]
        assert run.sync.life.quarantined() == {1: "it owes the answer to a call that was given up"}
    run.rollouts[1].go_on()
    run.refit()
    assert run.serves(1, 4) and run.sync.life.serving() == [0, 1]


def test_a_rank_that_keeps_the_others_of_its_engine_waiting_is_left_alone_too(runs: Runs):
    run = runs(num_engines=2, ranks=2)
    run.refit()
    run.publish()
    for rank in (0, 1, 0, 1, 2):  # engine 0 commits; of engine 1 rank 2 stages, rank 3 is frozen
        run.rollouts[rank].go_on()
    run.rollouts[2].fail()  # nothing to fail: it waits for rank 3
    run.clock.pass_s(DEADLINE_S + 1)
    assert run.sync.life.quarantined() == {1: "rollout/3 did not answer stage within 30 s"}
    # The same where one fails at once and the other does not end within the grace.
    run.rollouts[3].go_on()
    run.publish()
    run.rollouts[2].fail()
    run.clock.pass_s(PEER_GRACE_S + 1)
    assert run.sync.life.quarantined() == {1: "rollout/2 failed in stage: MemoryError: no room"}
    for rank in (0, 1, 0, 1):
        run.rollouts[rank].go_on()
    run.start_refit()
    for _ in range(5):
        for actor in (*run.trainers, *run.rollouts[:2]):
            actor.go_on()
    assert [call[1][0] for call in run.rollouts[3].calls] == [3]  # it owes the answer to version 3, and gets no more
    run.rollouts[3].go_on()
    run.refit()
    assert run.serves(0, 5) and run.serves(1, 5)


def test_a_dead_engine_stays_out_and_the_run_goes_on(runs: Runs):
    run = runs()
    run.refit()
    run.rollouts[0].die()
    for version in (2, 3):
        report = run.refit()
        assert report.quarantined.keys() == {0}
        assert "the process died" in report.quarantined[0]
        assert run.serves(1, version)


def test_a_refit_that_reaches_no_engine_fails_with_every_reason(runs: Runs):
    run = runs()
    for actor in run.rollouts:
        actor.die()
    with pytest.raises(RefitFailed, match=r"^no engine serves version 1: rollout/0 failed .*; rollout/1 failed"):
        run.refit()


@pytest.mark.parametrize(("verify", "verified"), [("always", [1, 1, 1]), ("first", [1, 0, 0]), ("off", [0, 0, 0])])
def test_refits_are_verified_as_configured(runs: Runs, verify: str, verified: list[int]):
    run = runs(verify=verify)
    assert [int(run.refit().verified) for _ in range(3)] == verified


def test_a_first_refit_is_verified_once_more_for_an_engine_that_missed_it(runs: Runs):
    run = runs(verify="first")
    run.publish()
    run.rollouts[1].fail()
    run._finish(run.refits)  # type: ignore[arg-type]
    assert [run.refit().verified for _ in range(2)] == [True, False]


# Any interleaving.


class Refits(RuleBasedStateMachine):
    """Refits in which anybody may be slow, fail, freeze, wake or die at any time."""

    @initialize(
        ranks=st.integers(1, 2), lands=st.booleans(), turns=st.booleans(), verify=st.sampled_from(["always", "off"])
    )
    def begin(self, ranks: int, lands: bool, turns: bool, verify: str) -> None:
        self.now = Run(2, ranks, lands, turns, verify)

    def teardown(self) -> None:
        """Whoever is not dead serves again after a refit in which nobody is late."""
        run = self.now
        for _ in range(20):
            for actor in run.actors:
                actor.go_on()
        run.clock.pass_s(PEER_GRACE_S + 1)
        alive = [engine for engine in (0, 1) if not any(run.rollouts[rank].is_dead for rank in run.ranks_of(engine))]
        if alive:
            run.refit()
            assert run.sync.life.serving() == alive
            self.an_engine_that_serves_has_the_bytes_of_exactly_its_version()
        run.close()

    @precondition(lambda self: self.now.refits is None or self.now.refits.done())
    @rule()
    def refit(self) -> None:
        self.now.start_refit()

    @rule(actor=st.integers(0, 5), times=st.integers(1, 3))
    def goes_on(self, actor: int, times: int) -> None:
        for _ in range(times):
            self.now.actors[actor % len(self.now.actors)].go_on()

    @rule(times=st.integers(1, 4), without=st.integers(0, 9))
    def all_go_on(self, times: int, without: int) -> None:
        for _ in range(times):
            for rank, actor in enumerate(self.now.actors):
                if rank - 2 != without:
                    actor.go_on()

    @precondition(lambda self: not self.now.is_publishing)
    @rule(seconds=st.sampled_from([PEER_GRACE_S + 1, DEADLINE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now.clock.pass_s(seconds)

    @rule(actor=st.integers(0, 3))
    def a_call_fails(self, actor: int) -> None:
        self.now.rollouts[actor % len(self.now.rollouts)].fail()

    @precondition(lambda self: not any(actor.is_dead for actor in self.now.rollouts))
    @rule(actor=st.integers(0, 30))
    def an_engine_rank_dies(self, actor: int) -> None:
        if actor < len(self.now.rollouts):
            self.now.rollouts[actor].die()

    @invariant()
    def an_engine_that_serves_has_the_bytes_of_exactly_its_version(self) -> None:
        """While it commits, a rank that has done so waits for the others; no step is decoded meanwhile."""
        for engine in self.now.sync.life.serving():
            life = self.now.sync.life.engines[engine]
            assert life.serving is not None
            coming = [life.target] if life.target is not None and life.state is State.STAGED else []
            assert self.now.serves(engine, life.serving, *coming)

    @invariant()
    def a_refit_ends_with_a_report_or_with_the_reasons(self) -> None:
        run = self.now
        if run.refits is not None and run.refits.done():
            error = run.refits.exception()
            if error is None:
                report = run.refits.result()
                assert report.quarantined.keys() | set(run.sync.life.serving()) == {0, 1}
                assert all(report.quarantined.values())
            else:
                assert isinstance(error, RefitFailed)


TestRefits = Refits.TestCase
TestRefits.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
