import json
import math
import pathlib
import time
from typing import Any

import pytest

from configs.load import ConfigurationError
from configs.schema import LoggingConfig
from orchestrator.metrics import PhaseTimes, RunLog, check_trackers
from workers.worker import Timed


def run_log(run_dir: pathlib.Path, steps_done: int = 0) -> RunLog:
    return RunLog(run_dir, LoggingConfig(), {}, steps_done)


def lines(run_dir: pathlib.Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / file).read_text().splitlines()]


def record(run_dir: pathlib.Path, steps_done: int, *numbers: int) -> None:
    """Write the records of the steps with these numbers, which count from 1 as people do; 0 is before the first."""
    log = run_log(run_dir, steps_done)
    for number in numbers:
        log.metrics({"step": number, "loss": 0.5}, steps=9)
    log.close()


def steps(run_dir: pathlib.Path) -> list[int]:
    return [line["step"] for line in lines(run_dir, "metrics.jsonl")]


def test_a_step_is_one_line_and_one_message(tmp_path: pathlib.Path):
    log = run_log(tmp_path)
    log.metrics({"step": 1, "loss": 0.5}, steps=9)
    assert lines(tmp_path, "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert log.messages_since(0) == [{"kind": "step", "steps": 9, "metrics": {"step": 1, "loss": 0.5}}]
    assert log.messages_since(1) == []
    log.close()


def test_a_line_is_on_disk_before_the_run_ends(tmp_path: pathlib.Path):
    log = run_log(tmp_path)
    log.metrics({"step": 1}, steps=9)
    log.sample("312=", "132", math.nan, "123")
    assert steps(tmp_path) == [1]
    assert lines(tmp_path, "samples.jsonl") == [
        {"step": 0, "prompt": "312=", "completion": "132", "answer": "123", "reward": None}
    ]
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null(tmp_path: pathlib.Path, value: float):
    log = run_log(tmp_path)
    log.metrics({"step": 1, "loss": value}, steps=9)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_a_resumed_run_keeps_the_record_of_its_last_saved_step_and_cuts_those_it_does_again(tmp_path: pathlib.Path):
    record(tmp_path, 0, 0, 1, 2, 3, 4)
    # The checkpoint was saved after the second step: steps 3 and 4 are done again.
    record(tmp_path, 2, 3)
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_a_run_that_starts_again_from_nothing_leaves_no_old_record(tmp_path: pathlib.Path):
    record(tmp_path, 0, 0, 1, 2)
    record(tmp_path, 0, 0, 1)
    assert steps(tmp_path) == [0, 1]


def test_a_torn_last_line_is_dropped(tmp_path: pathlib.Path):
    record(tmp_path, 0, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    record(tmp_path, 5, 6)
    assert steps(tmp_path) == [1, 2, 6]


def test_events_carry_who_did_what_at_which_step(tmp_path: pathlib.Path):
    log = run_log(tmp_path)
    log.step = 4
    log.observe("train/0", "optim_step", Timed(None, 10.0, 12.5, cpu_s=2.0))
    log.note("rank 3 is late")
    log.close()
    span, note = lines(tmp_path, "events.jsonl")
    assert span == {
        "event": "span", "who": "train/0", "name": "optim_step", "step": 4, "start": 10.0, "end": 12.5,
    }  # fmt: skip
    assert (note["event"], note["text"]) == ("note", "rank 3 is late")


def test_phases_notes_and_the_warm_start_are_messages_for_the_driver(tmp_path: pathlib.Path):
    log = run_log(tmp_path)
    log.phase("training")
    log.note("slow disk")
    log.warm_start(1, 250, 2.5)
    assert log.messages_since(0) == [
        {"kind": "phase", "text": "training"},
        {"kind": "note", "text": "slow disk"},
        {"kind": "warm_start", "step": 1, "steps": 250, "loss": 2.5},
    ]
    log.close()


def test_cpu_seconds_are_those_since_the_last_call(tmp_path: pathlib.Path):
    log = run_log(tmp_path)
    log.take_cpu_s()
    for cpu_s in (1000.0, 1003.0):
        log.observe("train/0", "setup", Timed(None, 0.0, 1.0, cpu_s))
    log.observe("rollout/0", "generate", Timed(None, 0.0, 1.0, cpu_s=500.0))
    assert 1503.0 <= log.take_cpu_s() < 1513.0
    log.observe("rollout/0", "generate", Timed(None, 0.0, 1.0, cpu_s=507.0))
    assert 7.0 <= log.take_cpu_s() < 17.0
    log.close()


def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it():
    with pytest.raises(ConfigurationError, match=r"logging\.trackio_project: .* pip install trackio"):
        check_trackers(LoggingConfig(trackio_project="rayfit"))
    check_trackers(LoggingConfig())


def test_a_phase_within_a_phase_counts_as_the_outer_one():
    times = PhaseTimes()
    with times("evaluate"):
        with times("rollout"):
            time.sleep(0.02)
        with times("score"):
            time.sleep(0.01)
    assert times.seconds.keys() == {"evaluate"}
    assert 0.03 <= times.seconds["evaluate"] < 1.0


def test_a_phase_entered_twice_is_summed_and_one_never_entered_is_0():
    times = PhaseTimes()
    for _ in range(2):
        with times("train"):
            time.sleep(0.01)
    assert 0.02 <= times.seconds["train"] < 1.0
    assert times.seconds["refit"] == 0.0


def test_a_phase_that_raised_has_ended():
    times = PhaseTimes()
    with pytest.raises(ValueError, match="lost"), times("train"):
        raise ValueError("lost")
    with times("refit"):
        pass
    assert times.seconds.keys() == {"train", "refit"}
