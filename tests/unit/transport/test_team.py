import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport import team
from transport.team import deal, run_together, set_team_size, team_size


@pytest.fixture
def team_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(team.os, "sched_getaffinity", lambda pid: {0, 1})
    set_team_size(1)
    yield
    set_team_size(2)


def test_a_team_has_its_process_part_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(team.os, "sched_getaffinity", lambda pid: set(range(12)))
    sizes = {}
    for num_processes in (1, 4, 6, 12, 40):
        set_team_size(num_processes)
        sizes[num_processes] = team_size()
    set_team_size(40)
    assert sizes == {1: 4, 4: 3, 6: 2, 12: 1, 40: 1}


def test_jobs_run_at_the_same_time_and_results_keep_their_order(team_of_two: None):
    meeting = threading.Barrier(2, timeout=10)

    def job(number: int) -> int:
        meeting.wait()
        return number

    assert run_together([lambda: job(1), lambda: job(2)]) == [1, 2]


def test_an_error_is_raised_only_when_nobody_works_any_more(team_of_two: None):
    finished = []

    def slow() -> None:
        time.sleep(0.2)
        finished.append(True)

    def fail() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        run_together([fail, slow])
    assert finished == [True]
    with pytest.raises(MemoryError):
        run_together([slow, fail])


def test_costs_are_dealt_the_dearest_first():
    assert deal([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert deal([], 2) == [[], []]


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 4))
def test_everything_is_dealt_once_and_hands_differ_by_at_most_one_card(costs: list[float], num_hands: int):
    hands = deal(costs, num_hands)
    assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
    totals = [sum(costs[index] for index in hand) for hand in hands]
    assert max(totals) - min(totals) <= max(costs, default=0.0) + 1e-6
