import io
import threading

import pytest
from rich.console import Console

from orchestrator.progress import Progress, clock_time, sparkline

STEP = {
    "step": 12,
    "reward/mean": 0.512,
    "eval/accuracy": 0.61,
    "loss": -0.0021,
    "time/step_s": 0.34,
    "time/rollout_wait_s": 0.16,
    "time/train_s": 0.17,
    "time/refit_s": 0.01,
    "tokens/s": 6210.4,
    "logprob_diff/max": 1.1e-5,
}


def said(*messages: dict, terminal: bool = False, width: int = 80) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, height=24, color_system=None)
    with Progress("grpo tiny", console) as progress:
        for message in messages:
            progress.update(message)
    return console.file.getvalue()


def test_a_plain_line_carries_the_numbers_of_its_step_on_one_line():
    assert said({"kind": "step", "steps": 50, "metrics": STEP}).splitlines()[1:] == [
        "step 12/50  reward 0.512  accuracy 0.610  loss -0.0021  0.34 s (rollout 0.16 train 0.17 refit 0.01)"
        "  6210 tokens/s  logprob_diff 1.1e-05"
    ]


def test_a_plain_line_leaves_out_what_was_not_measured():
    metrics = {"step": 3, "loss": float("nan"), "reward/mean": None}
    assert said({"kind": "step", "steps": 50, "metrics": metrics}).splitlines()[1:] == ["step 3/50  loss nan"]


def test_phases_and_notes_are_one_plain_line_each_and_never_markup():
    messages = [
        {"kind": "phase", "text": "starting [bold]workers"},
        {"kind": "note", "text": "lost\nrank 3 [/red] :boom:"},
    ]
    assert said(*messages).splitlines()[1:] == ["starting [bold]workers", "lost rank 3 [/red] :boom:"]


def test_warm_start_prints_every_fiftieth_step_and_the_last():
    messages = [{"kind": "warm_start", "step": step, "steps": 120, "loss": 1 / step} for step in range(1, 121)]
    assert said(*messages).splitlines()[1:] == [
        "warm start 50/120  loss 0.0200",
        "warm start 100/120  loss 0.0100",
        "warm start 120/120  loss 0.0083",
    ]


@pytest.mark.parametrize("width", [40, 60, 120])
def test_a_narrow_terminal_shows_the_run_within_its_width(width):
    text = said(
        {"kind": "warm_start", "step": 300, "steps": 300, "loss": 0.5},
        {"kind": "note", "text": "[/red] a note that is far longer than the terminal is wide " * 3},
        {"kind": "step", "steps": 50, "metrics": {"step": 11, "eval/accuracy": 0.25}},
        {"kind": "step", "steps": 50, "metrics": {key: STEP[key] for key in STEP if key != "eval/accuracy"}},
        {"kind": "phase", "text": "writing a report " * 10},
        terminal=True,
        width=width,
    )
    last_view = text[text.rindex("╭") :]
    assert max(len(line) for line in last_view.splitlines()) <= width
    for part in ["step 12/50", "reward 0.512", "accuracy 0.250", "loss -0.0021", "6,210 tokens/s", "rollout 0.16"]:
        assert part in last_view
    assert last_view.count("\n") == 9


def test_a_step_without_metrics_is_shown_on_a_terminal():
    nothing = {"kind": "step", "steps": 2, "metrics": {}}
    broken = {"kind": "step", "steps": 2, "metrics": {"reward/mean": float("nan"), "time/train_s": float("nan")}}
    assert "step 2/2" in said(nothing, broken, terminal=True)


def test_no_thread_of_the_live_view_outlives_it():
    before = threading.active_count()
    said({"kind": "phase", "text": "starting"}, terminal=True)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=1)
    assert threading.active_count() <= before


def test_a_message_that_nobody_sends_is_refused():
    with pytest.raises(ValueError, match="got 'stpe'"):
        said({"kind": "stpe"})


def test_a_sparkline_spans_the_lowest_to_the_highest():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▄█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([]) == ""


def test_clock_times_read_like_a_clock():
    assert [clock_time(seconds) for seconds in (41.9, 725, 10930)] == ["0:41", "12:05", "3:02:10"]
