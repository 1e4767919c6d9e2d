import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.version_life import NUM_HALVES, State, VersionLife


def a_life(*calls: tuple[str, int] | tuple[str, int, int | str], meets: bool = False) -> VersionLife:
    """Engine 0, after these calls."""
    life = VersionLife()
    life.meets = meets
    life.join(0)
    for method, *arguments in calls:
        getattr(life, method)(*arguments)
    return life


PUBLISHED_1 = (("begin_publish", 1), ("published", 1))
STAGED_1 = (*PUBLISHED_1, ("begin_stage", 0, 1), ("staged", 0, 1))
SERVING_1 = (*STAGED_1, ("committed", 0, 1))
QUARANTINED_1 = (*SERVING_1, ("fail", 0, "it was late"))


def test_a_version_is_published_then_staged_then_committed_and_only_then_served():
    life = a_life()
    seen = []
    for method, *arguments in SERVING_1:
        seen.append((life.readable, life.engines[0].state.value, life.serving()))
        getattr(life, method)(*arguments)
    assert seen == [
        (None, "joined", []), (None, "joined", []), (1, "joined", []), (1, "staging", []), (1, "staged", []),
    ]  # fmt: skip
    assert (life.engines[0].state, life.serving(), life.quarantined()) == (State.SERVING, [0], {})
    assert life.engines[0].serving == 1


def test_an_engine_serves_the_old_version_until_the_new_one_is_committed():
    life = a_life(*SERVING_1)
    for method, *arguments in (("begin_publish", 2), ("published", 2), ("begin_stage", 0, 2), ("staged", 0, 2)):
        getattr(life, method)(*arguments)
        assert (life.serving(), life.engines[0].serving) == ([0], 1)
    life.committed(0, 2)
    assert life.engines[0].serving == 2


def test_where_both_sides_meet_a_version_is_staged_while_it_is_written_and_committed_afterwards():
    life = a_life(("begin_publish", 1), ("begin_stage", 0, 1), ("staged", 0, 1), meets=True)
    with pytest.raises(AssertionError):
        life.committed(0, 1)
    life.published(1)
    life.committed(0, 1)
    assert life.serving() == [0]


def test_a_quarantined_engine_serves_again_once_it_has_a_newer_version():
    life = a_life(*QUARANTINED_1)
    assert (life.serving(), life.quarantined()) == ([], {0: "it was late"})
    for method, *arguments in (("begin_publish", 2), ("published", 2), ("begin_stage", 0, 2), ("staged", 0, 2)):
        getattr(life, method)(*arguments)
    life.committed(0, 2)
    assert (life.serving(), life.quarantined(), life.engines[0].reason) == ([0], {}, "")


def test_an_engine_that_fails_does_not_keep_the_next_version_from_being_published():
    for state in (PUBLISHED_1, STAGED_1[:-1], STAGED_1, SERVING_1):
        life = a_life(*state, ("fail", 0, "it was late"), ("begin_publish", 2))
        assert life.readable is None


@pytest.mark.parametrize(
    ("calls", "refused"),
    [
        ((), ("join", 0)),
        ((("leave", 0),), ("leave", 0)),
        (PUBLISHED_1, ("begin_publish", 1)),  # its bytes may be staged already
        (PUBLISHED_1, ("begin_publish", 0)),
        (STAGED_1[:-1], ("begin_publish", 2)),  # engine 0 has not finished with version 1
        (STAGED_1, ("begin_publish", 2)),
        (SERVING_1, ("begin_publish", 3)),  # engine 0 serves from that half
        ((*PUBLISHED_1, ("begin_publish", 2)), ("published", 1)),
        (STAGED_1, ("begin_stage", 0, 1)),
        (STAGED_1[:-1], ("begin_stage", 0, 1)),
        (SERVING_1, ("begin_stage", 0, 1)),
        (QUARANTINED_1, ("begin_stage", 0, 1)),
        (PUBLISHED_1, ("begin_stage", 0, 2)),
        ((("begin_publish", 1),), ("begin_stage", 0, 1)),  # it is being written
        ((*PUBLISHED_1, ("begin_publish", 2), ("published", 2)), ("begin_stage", 0, 1)),
        (PUBLISHED_1, ("begin_stage", 7, 1)),
        (PUBLISHED_1, ("staged", 0, 1)),
        (STAGED_1, ("staged", 0, 1)),
        (STAGED_1[:-1], ("staged", 0, 0)),  # the answer of a call that was given up
        ((*STAGED_1[:-1], ("fail", 0, "late")), ("staged", 0, 1)),
        (STAGED_1[:-1], ("committed", 0, 1)),
        (STAGED_1, ("committed", 0, 0)),
        ((*STAGED_1, ("fail", 0, "late")), ("committed", 0, 1)),
        (SERVING_1, ("committed", 0, 1)),
    ],
)
def test_what_comes_out_of_turn_is_refused_and_changes_nothing(
    calls: tuple[tuple[str, int], ...], refused: tuple[str, int]
):
    life = a_life(*calls)
    before = copy.deepcopy(vars(life))
    method, *arguments = refused
    with pytest.raises((AssertionError, KeyError)):
        getattr(life, method)(*arguments)
    assert vars(life) == before


def test_where_both_sides_meet_an_older_version_is_not_staged():
    with pytest.raises(AssertionError):
        a_life(*PUBLISHED_1, ("begin_publish", 2), meets=True).begin_stage(0, 1)


# Any interleaving, on simulated memory.

NUM_CELLS = 2
"""A half of the buffers is that many cells; one holds a version's bytes once they are written."""
ENGINES = st.integers(0, 2)
NEAR = st.sampled_from([0, 0, -1, 1, -2, 2])
"""In what a version that somebody asks for differs from the newest."""

Half = list[int | None]


def empty_halves() -> list[Half]:
    return [[None] * NUM_CELLS for _ in range(NUM_HALVES)]


@dataclass
class Engine:
    """What an engine process does, without a guard of its own.

    One that `turns` serves from the trainer's halves; any other has halves where versions land.
    """

    turns: bool
    halves: list[Half] = field(default_factory=empty_halves)
    staging: int | None = None
    """The version of the stage call that is running; given up or not."""
    returned: set[int] = field(default_factory=set)
    """Versions whose stage call has returned, and may be reported at any time later."""
    parameters: Half = field(default_factory=lambda: [None] * NUM_CELLS)
    committed: list[int] = field(default_factory=list)

    def stage(self, written: Half) -> None:
        """The running call copies what is there and returns."""
        assert self.staging is not None
        if not self.turns:
            self.halves[self.staging % NUM_HALVES][:] = written
        self.returned.add(self.staging)
        self.staging = None


class Interleavings(RuleBasedStateMachine):
    """Anybody asks VersionLife for anything at any time; what it allows is done, in memory that has two halves.

    A call that was given up goes on: its engine is asked nothing until it has returned, as in WeightSync.
    """

    @initialize(meets=st.booleans())
    def begin(self, meets: bool) -> None:
        self.life = VersionLife()
        self.life.meets = meets
        self.halves = empty_halves()
        self.writing: tuple[int, int] | None = None
        """The version that train ranks write, and how many cells of it are there."""
        self.begun, self.written = [-1], set[int]()
        self.engines: dict[int, Engine] = {}
        for engine in (0, 1):
            self.join(engine, turns=engine == 0)

    def ask(self, method: Callable[..., None], *arguments: object) -> bool:
        """Whether VersionLife allows it; a refusal changes nothing."""
        before = copy.deepcopy(vars(self.life))
        try:
            method(*arguments)
        except (AssertionError, KeyError):
            assert vars(self.life) == before
            return False
        return True

    # What WeightSync asks for, in its order.

    @rule(times=st.integers(1, NUM_CELLS + 2))
    def train_ranks_go_on(self, times: int) -> None:
        """Begin a version, write it cell by cell; then the publish call returns."""
        for _ in range(times):
            if self.writing is None and self.life.readable == max(self.written, default=None):
                self.begin_publish(self.begun[-1] + 1)
            elif self.writing is not None:
                version, cell = self.writing
                self.halves[version % NUM_HALVES][cell] = version
                self.writing = (version, cell + 1) if cell + 1 < NUM_CELLS else None
                self.written |= {version} if self.writing is None else set()
            elif self.written:
                self.ask(self.life.published, max(self.written))

    @rule(engine=ENGINES, times=st.integers(1, 4))
    def engine_goes_on(self, engine: int, times: int) -> None:
        for _ in range(times if engine in self.engines else 0):
            if self.engines[engine].staging is not None:
                self.run_stage(engine)
            elif self.life.engines[engine].target is None:
                self.begin_stage(engine, self.begun[-1])
            elif self.life.engines[engine].state is State.STAGING:
                self.ask(self.life.staged, engine, self.begun[-1])
            else:
                self.commit(engine, self.begun[-1])

    @rule(times=st.integers(1, 9))
    def all_go_on(self, times: int) -> None:
        for _ in range(times):
            self.train_ranks_go_on(1)
            for engine in self.engines:
                self.engine_goes_on(engine, 1)

    @rule(engine=ENGINES, what=st.sampled_from(["fail", "fail", "join", "leave"]))
    def something_happens(self, engine: int, what: str) -> None:
        match what:
            case "fail":
                self.fail(engine)
            case "join":
                self.join(engine, turns=engine != 1)
            case "leave" if self.ask(self.life.leave, engine):
                del self.engines[engine]

    # What nobody should ask, but for an answer that comes late.

    @rule(engine=ENGINES, near=NEAR, what=st.sampled_from(["publish", "stage", "commit"]))
    def ask_out_of_turn(self, engine: int, near: int, what: str) -> None:
        match what:
            case "publish":
                self.begin_publish(max(self.begun[-1] + near, 0))
            case "stage":
                self.begin_stage(engine, self.begun[-1] + near)
            case "commit":
                self.commit(engine, self.begun[-1] + near)

    @rule(engine=ENGINES, data=st.data())
    def an_old_answer_arrives(self, engine: int, data: st.DataObject) -> None:
        process = self.engines.get(engine)
        if process is not None and process.returned:
            self.ask(self.life.staged, engine, data.draw(st.sampled_from(sorted(process.returned)[-3:])))
        if self.written:
            self.ask(self.life.published, data.draw(st.sampled_from(sorted(self.written)[-3:])))

    # What happens then.

    def join(self, engine: int, turns: bool) -> None:
        if self.ask(self.life.join, engine):
            self.engines.setdefault(engine, Engine(turns and not self.life.meets))

    def fail(self, engine: int) -> None:
        """Of its parameters nothing is known from now on."""
        if self.ask(self.life.fail, engine, "it was late"):
            self.engines[engine].parameters = [None] * NUM_CELLS

    def begin_publish(self, version: int) -> None:
        if self.ask(self.life.begin_publish, version):
            self.begun.append(version)
            self.writing = version, 0

    def begin_stage(self, engine: int, version: int) -> None:
        process = self.engines.get(engine)
        if (process is None or process.staging is None) and self.ask(self.life.begin_stage, engine, version):
            self.engines[engine].staging = version

    def run_stage(self, engine: int) -> None:
        """Where both sides meet, the call ends only with the publish call of the same version."""
        process = self.engines[engine]
        if process.staging is not None and not (self.life.meets and process.staging not in self.written):
            process.stage(self.halves[process.staging % NUM_HALVES])

    def commit(self, engine: int, version: int) -> None:
        if self.ask(self.life.committed, engine, version):
            process = self.engines[engine]
            process.parameters = (self.halves if process.turns else process.halves)[version % NUM_HALVES]
            process.committed.append(version)

    # What must hold whatever was asked.

    @invariant()
    def an_engine_that_serves_has_the_bytes_of_exactly_its_version(self) -> None:
        for engine in self.life.serving():
            version = self.life.engines[engine].serving
            assert self.engines[engine].parameters == [version] * NUM_CELLS
            assert self.engines[engine].committed[-1] == version

    @invariant()
    def every_version_is_newer_than_the_last(self) -> None:
        for versions in [self.begun, *(process.committed for process in self.engines.values())]:
            assert versions == sorted(set(versions))

    @invariant()
    def nobody_that_serves_reads_a_half_that_is_being_written(self) -> None:
        if self.writing is not None:
            half = self.halves[self.writing[0] % NUM_HALVES]
            assert not [e for e in self.life.serving() if self.engines[e].parameters is half]

    @invariant()
    def a_readable_version_is_the_newest_and_whole(self) -> None:
        if (version := self.life.readable) is not None:
            assert version == self.begun[-1]
            assert self.halves[version % NUM_HALVES] == [version] * NUM_CELLS

    @invariant()
    def who_has_left_is_forgotten_and_who_has_joined_is_known(self) -> None:
        assert self.life.engines.keys() == self.engines.keys()

    @invariant()
    def an_engine_is_on_its_way_to_the_newest_version_or_to_none(self) -> None:
        for number, engine in self.life.engines.items():
            moves = engine.state in (State.STAGING, State.STAGED)
            assert engine.target == (self.begun[-1] if moves else None)
            assert engine.state is not State.STAGED or engine.target in self.engines[number].returned
            assert engine.state is not State.SERVING or engine.serving is not None

    @invariant()
    def a_quarantined_engine_serves_nothing_and_says_why(self) -> None:
        assert not self.life.quarantined().keys() & set(self.life.serving())
        assert all(self.life.quarantined().values())


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
