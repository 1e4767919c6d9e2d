import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psutil
import pytest

from recipes import sort_task
from workers import environment
from workers.environment import EnvironmentWorker, RewardProcess, RewardProcessError

REWARDS = "tests.unit.workers.sample_rewards"
TIMEOUT_S = 1.0

Score = Callable[..., list[tuple[float, str | None]]]


def sample(completion: str) -> dict[str, Any]:
    return {"prompt": "?", "completion": completion, "answer": "!", "finish_reason": "stop", "tokens": [4, 6, 1]}


@pytest.fixture
def worker() -> Iterator[EnvironmentWorker]:
    worker = EnvironmentWorker(0, 1, f"{REWARDS}:obey", TIMEOUT_S, None)
    yield worker
    worker.close()


@pytest.fixture
def score(worker: EnvironmentWorker) -> Score:
    """Scores completions in one batch; `obey` does what a completion says, and gives any other its length."""

    def score(*completions: str) -> list[tuple[float, str | None]]:
        answers = worker.score([sample(completion) for completion in completions])
        return [(answer["reward"], answer["invalid"]) for answer in answers]

    return score


def reward_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "workers.reward_process" in child.cmdline()]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def test_rewards_come_back_in_order(score: Score):
    assert score("a", "bbb", "", "cc") == [(1.0, None), (3.0, None), (0.0, None), (2.0, None)]


def test_no_samples_have_no_rewards(score: Score):
    assert score() == []


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("raise", "exception: ValueError: no such answer "),
        ("overflow", "exception: OverflowError: int too large to convert to float"),
        ("loop", "timeout"),
        ("loop in c", "timeout"),
        ("exit", "exit"),
        ("sys.exit", "exit"),
        ("segfault", "exit"),
        ("write an endless frame", "exit"),
        ("write a frame of noise", "exit"),
        ("half a surrogate pair", "exception: ValueError: ?"),
        ("nan", "nan"),
        ("infinity", "nan"),
        ("string", "type: str is not a number"),
        ("none", "type: NoneType is not a number"),
    ],
)
def test_a_sample_that_fails_costs_only_itself(score: Score, action: str, reason: str):
    before, failed, after, last = score("a", action, "bb", "ccc")
    assert math.isnan(failed[0])
    assert failed[1] is not None
    assert failed[1].startswith(reason)
    assert [before, after, last] == [(1.0, None), (2.0, None), (3.0, None)]


def test_an_exceptions_message_is_cut_at_two_hundred_characters(score: Score):
    ((_, reason),) = score("raise")
    assert reason == "exception: ValueError: " + ("no such answer " + "x" * 1000)[:200]


def test_every_sample_of_a_batch_has_its_own_timeout(score: Score):
    start = time.monotonic()
    reasons = [reason for _, reason in score("loop", "a", "loop", "b")]
    assert reasons == ["timeout", None, "timeout", None]
    assert 2 * TIMEOUT_S <= time.monotonic() - start < 2 * TIMEOUT_S + 20


def test_many_samples_together_may_take_longer_than_the_timeout_of_one(score: Score):
    start = time.monotonic()
    assert score(*["nap"] * 8) == [(0.5, None)] * 8
    assert time.monotonic() - start > TIMEOUT_S


def test_a_failure_in_the_last_sample_leaves_the_worker_ready_for_the_next_batch(score: Score):
    assert score("a", "exit")[1][1] == "exit"
    assert score("bb") == [(2.0, None)]


def test_truth_values_count_as_one_and_zero(score: Score):
    assert score("true", "false") == [(1.0, None), (0.0, None)]


def test_what_a_reward_prints_or_reads_does_not_reach_the_protocol(score: Score):
    assert score("print", "read stdin", "bb") == [(4.0, None), (0.0, None), (2.0, None)]


def test_one_process_serves_batch_after_batch(score: Score):
    assert score("pid") == score("pid")


def test_an_async_reward_is_awaited():
    worker = EnvironmentWorker(0, 1, f"{REWARDS}:slow_length", TIMEOUT_S, None)
    assert [answer["reward"] for answer in worker.score([sample("a"), sample("bb")])] == [1.0, 2.0]
    worker.close()


def test_a_large_batch_passes_through_pipes_that_hold_less(score: Score):
    completions = [str(index % 10) * 1000 for index in range(5000)]
    assert score(*completions) == [(1000.0, None)] * 5000


def test_a_process_that_exits_before_it_has_read_a_large_batch_costs_one_sample(score: Score):
    first, *others = score("exit", *["a" * 1000] * 5000)
    assert first[1] == "exit"
    assert others == [(1000.0, None)] * 5000


def test_five_hundred_trivial_rewards_take_milliseconds(score: Score):
    durations = []
    for _ in range(10):
        start = time.perf_counter()
        score(*["a"] * 512)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.03


def test_completions_are_decoded_from_tokens_without_special_tokens(tmp_path: pathlib.Path):
    sort_task.write_model_folder(tmp_path)
    worker = EnvironmentWorker(0, 1, "recipes.rewards:exact_match", TIMEOUT_S, str(tmp_path))
    fields = {"prompt": "7413=", "answer": "1347", "finish_reason": "stop"}
    answers = worker.score([fields | {"tokens": [4, 6, 7, 10, 1]}, fields | {"tokens": [10, 7, 6, 4, 1]}])
    worker.close()
    assert [answer["reward"] for answer in answers] == [1.0, 0.0]


def test_no_process_is_left_after_close_and_close_may_be_repeated():
    worker = EnvironmentWorker(0, 1, f"{REWARDS}:obey", TIMEOUT_S, None)
    worker.score([sample("loop"), sample("a")])
    assert len(reward_processes()) == 1
    worker.close()
    worker.close()
    assert reward_processes() == []


def test_a_process_that_is_killed_takes_its_own_children_along(worker: EnvironmentWorker, tmp_path: pathlib.Path):
    ids = tmp_path / "ids"
    (answer,) = worker.score([sample("spawn") | {"prompt": str(ids)}])
    assert answer["invalid"] == "timeout"
    for pid in ids.read_text().split():
        wait_until_ended(int(pid))


@pytest.mark.parametrize("action", ["spawn", "idle"])
def test_the_process_ends_when_its_worker_is_killed(tmp_path: pathlib.Path, action: str):
    ids = tmp_path / "ids"
    program = (
        "import sys, time; from workers.environment import EnvironmentWorker\n"
        f"worker = EnvironmentWorker(0, 1, '{REWARDS}:obey', 600.0, None)\n"
        f"sample = {sample('spawn')!r} | {{'prompt': sys.argv[1]}}\n"
        "print(worker._process._process.pid, flush=True)\n"
        f"worker.score([sample]) if {action!r} == 'spawn' else time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, ids], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline())]
        if action == "spawn":
            while not (ids.exists() and len(ids.read_text().split()) == 2):
                time.sleep(0.01)
            pids = [int(pid) for pid in ids.read_text().split()]
        assert all(is_running(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    for pid in pids:
        wait_until_ended(pid)


def test_a_process_whose_worker_is_gone_before_it_has_started_ends_at_once():
    lifeline, held = os.pipe()
    os.close(held)
    command = [sys.executable, "-m", "workers.reward_process", f"{REWARDS}:one", str(lifeline)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, pass_fds=(lifeline,), start_new_session=True, **pipes) as process:
        os.close(lifeline)
        assert process.wait(timeout=30) == 1
        assert process.stderr is not None
        assert b"the environment worker ended before" in process.stderr.read()


def test_an_interrupted_batch_leaves_no_answers_for_the_next_one(
    worker: EnvironmentWorker, score: Score, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(msgspec.msgpack, "decode", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            score("a", "a", "a")
    assert score("bb") == [(2.0, None)]


def _interrupt(*args: object, **keywords: object) -> None:
    raise KeyboardInterrupt


def test_a_sample_with_a_wrong_field_is_refused_before_it_is_sent(worker: EnvironmentWorker, score: Score):
    with pytest.raises(msgspec.ValidationError, match="answer"):
        worker.score([sample("a") | {"answer": None}])
    assert score("a") == [(1.0, None)]


def test_a_sample_that_is_too_large_is_refused(score: Score, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "MAX_FRAME_BYTES", 1000)
    assert score("a" * 900) == [(900.0, None)]
    with pytest.raises(ValueError, match="at most 1000 bytes"):
        score("a" * 1000)


def test_a_reward_that_cannot_be_imported_stops_the_worker_with_the_cause():
    with pytest.raises(RewardProcessError, match="reward no_such_module:f: importing no_such_module failed with"):
        EnvironmentWorker(0, 1, "no_such_module:f", TIMEOUT_S, None)
    assert reward_processes() == []


def test_a_module_that_never_finishes_its_import_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "endless_import.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "START_TIMEOUT_S", 0.5)
    with pytest.raises(RewardProcessError, match="endless_import:f: the process that imports it was not ready after"):
        RewardProcess("endless_import:f")
    assert reward_processes() == []
