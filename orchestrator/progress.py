"""What a person sees of a run: a live view on a terminal, one plain line a step everywhere else.

Invariant: nothing that a run says is read as markup, a missing metric is left out, and the screen is redrawn at most
four times a second whatever the rate of messages. The driver feeds it:

    {"kind": "phase", "text": "starting workers"}
    {"kind": "note", "text": "checkpoint 10 saved"}
    {"kind": "warm_start", "step": 50, "steps": 300, "loss": 1.83}
    {"kind": "step", "steps": 50, "metrics": {"step": 12, "reward/mean": 0.512, "loss": -0.0021, ...}}

The metrics are an object of metrics.jsonl. On a terminal rich owns a thread that redraws; `close` stops it.
"""

import math
import threading
import time
from collections import deque
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESHES_PER_SECOND = 4
WARM_START_LINE_EVERY = 50
NUM_NOTES = 4
SPARKLINE_WIDTH = 36
TIME_BAR_WIDTH = 24
NUM_RECENT_STEPS = 20
SPARKS = "▁▂▃▄▅▆▇█"
TIME_PARTS = {
    "rollout": ("time/rollout_wait_s", "blue"),
    "train": ("time/train_s", "green"),
    "refit": ("time/refit_s", "magenta"),
}


class Progress:
    """The view of one run; `console` is the process's own unless a test hands one in."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console()
        self._lock = threading.Lock()
        """Held while messages change what the redrawing thread reads."""
        self._started_s = time.monotonic()
        self._phase = ""
        self._step, self._steps = 0, 0
        self._metrics: dict[str, Any] = {}
        self._accuracy: float | None = None
        self._rewards: deque[float] = deque(maxlen=SPARKLINE_WIDTH)
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=NUM_RECENT_STEPS + 1)
        """When recent steps were reported, as (step, seconds): what is left to come is estimated from it."""
        self._notes: deque[str] = deque(maxlen=NUM_NOTES)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_SECOND
            )
            self._live.start()
        else:
            self._print(title)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the last view on the screen and gives the terminal back; may be called twice."""
        if self._live is not None:
            self._live.stop()

    def update(self, message: dict[str, Any]) -> None:
        """Shows one message. Raises ValueError for a kind that nobody sends."""
        with self._lock:
            match message["kind"]:
                case "phase":
                    self._phase = one_line(message["text"])
                    self._print(self._phase)
                case "note":
                    self._notes.append(one_line(message["text"]))
                    self._print(self._notes[-1])
                case "warm_start":
                    self._update_warm_start(message["step"], message["steps"], message["loss"])
                case "step":
                    self._update_step(message["steps"], message["metrics"])
                case kind:
                    raise ValueError(f"a progress message is a phase, note, warm_start or step, got {kind!r}")

    def _print(self, line: str) -> None:
        """A plain line, where there is no live view to show the same."""
        if self._live is None:
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _update_warm_start(self, step: int, steps: int, loss: float) -> None:
        self._phase, self._step, self._steps = f"warm start, loss {loss:.4f}", step, steps
        if step % WARM_START_LINE_EVERY == 0 or step == steps:
            self._print(f"warm start {step}/{steps}  loss {loss:.4f}")

    def _update_step(self, steps: int, metrics: dict[str, Any]) -> None:
        self._phase = "training"
        next_step = self._arrivals[-1][0] + 1 if self._arrivals else 1
        self._step, self._steps, self._metrics = metrics.get("step", next_step), steps, metrics
        self._arrivals.append((self._step, time.monotonic()))
        if (reward := metrics.get("reward/mean")) is not None and math.isfinite(reward):
            self._rewards.append(reward)
        # Most steps are not evaluated: the last accuracy stays in view.
        if metrics.get("eval/accuracy") is not None:
            self._accuracy = metrics["eval/accuracy"]
        self._print(plain_line(self._step, steps, metrics))

    def _render(self) -> RenderableType:
        with self._lock:
            elapsed_s = time.monotonic() - self._started_s
            clock = f"elapsed {clock_time(elapsed_s)}"
            if (remaining_s := self._remaining_s()) is not None:
                clock += f"  ETA {clock_time(remaining_s)}"
            rows: list[RenderableType] = [two_ends(Text(self._phase, style="bold"), Text(clock, style="dim"))]
            if self._steps:
                rows.append(progress_row(self._step, self._steps))
            if self._metrics:
                rows += self._metric_rows()
            rows += [line(f"· {note}", "dim") for note in self._notes]
            return Panel(Group(*rows), title=Text(self._title), title_align="left", border_style="dim")

    def _metric_rows(self) -> list[RenderableType]:
        metrics = self._metrics
        reward = figures(metrics, {"reward": ("reward/mean", ".3f")})
        accuracy = [] if self._accuracy is None else [f"accuracy {self._accuracy:.3f}"]
        numbers = figures(metrics, {"loss": ("loss", ".4f"), "logprob_diff": ("logprob_diff/max", ".1e")})
        rows: list[RenderableType] = [
            line("  ".join([*reward, sparkline(list(self._rewards))])),
            line("   ".join([*accuracy, *numbers])),
        ]
        speed = [f"{metrics['tokens/s']:,.0f} tokens/s"] if metrics.get("tokens/s") is not None else []
        return [*rows, *time_rows(metrics, speed)]

    def _remaining_s(self) -> float | None:
        """Seconds to the last step at the pace of the recent ones, evaluations and checkpoints included."""
        if len(self._arrivals) < 2:
            return None
        (first_step, first_s), (last_step, last_s) = self._arrivals[0], self._arrivals[-1]
        if last_step <= first_step:
            return None
        return (self._steps - last_step) * (last_s - first_s) / (last_step - first_step)


def one_line(text: str) -> str:
    """A note of many lines would tear the view and a log alike."""
    return " ".join(text.split())


def line(text: str, style: str = "") -> Text:
    """Text that is cut, not wrapped, where the terminal is narrow."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def clock_time(seconds: float) -> str:
    """0:41, 12:05, 3:02:10."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def figures(metrics: dict[str, Any], formats: dict[str, tuple[str, str]]) -> list[str]:
    """A part like `loss -0.0021` for every {"loss": (key, format)} that was measured; a NaN is shown, it is news."""
    return [f"{label} {metrics[key]:{form}}" for label, (key, form) in formats.items() if metrics.get(key) is not None]


def plain_line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    """A step as one line of a log.

    step 12/50  reward 0.512  loss -0.0021  0.34 s (rollout 0.16 train 0.17 refit 0.01)  6210 tokens/s
    """
    headline = {"reward": ("reward/mean", ".3f"), "accuracy": ("eval/accuracy", ".3f"), "loss": ("loss", ".4f")}
    parts = [f"step {step}/{steps}", *figures(metrics, headline)]
    if metrics.get("time/step_s") is not None:
        split = " ".join(figures(metrics, {label: (key, ".2f") for label, (key, _) in TIME_PARTS.items()}))
        parts.append(f"{metrics['time/step_s']:.2f} s" + (f" ({split})" if split else ""))
    if metrics.get("tokens/s") is not None:
        parts.append(f"{metrics['tokens/s']:.0f} tokens/s")
    return "  ".join([*parts, *figures(metrics, {"logprob_diff": ("logprob_diff/max", ".1e")})])


def sparkline(values: list[float]) -> str:
    """The values as a row of blocks, the lowest as the lowest block and the highest as the full one."""
    if not values:
        return ""
    low, spread = min(values), max(values) - min(values)
    return "".join(SPARKS[int((value - low) / spread * (len(SPARKS) - 1)) if spread else 0] for value in values)


def two_ends(left: Text, right: Text) -> Table:
    """One at the left edge, cut where it must be, and one at the right."""
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_row(left, right)
    return table


def progress_row(step: int, steps: int) -> Table:
    """step 12/50 ━━━━━━━━──────── 24 %"""
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=steps, completed=min(step, steps))
    table.add_row(f"step {step}/{steps}", bar, f"{100 * step / steps:.0f} %")
    return table


def time_rows(metrics: dict[str, Any], before: list[str]) -> list[RenderableType]:
    """How long the step took and on what: a bar with a colour for each part, and a row that says which is which."""
    step_s = metrics.get("time/step_s") or 0.0
    seconds = {label: metrics.get(key) or 0.0 for label, (key, _) in TIME_PARTS.items()}
    seconds["rest"] = max(0.0, step_s - sum(seconds.values()))
    total_s, drawn = sum(seconds.values()), 0
    if total_s == 0 or not math.isfinite(total_s):
        return [line("   ".join(before))]
    colors = {label: color for label, (_, color) in TIME_PARTS.items()} | {"rest": "bright_black"}
    bar = line("   ".join([*before, f"{step_s:.2f} s a step "]))
    legend = []
    for so_far, (label, part_s) in zip(accumulate(seconds.values()), seconds.items(), strict=True):
        end = round(TIME_BAR_WIDTH * so_far / total_s)
        bar.append("█" * (end - drawn), colors[label])
        drawn = end
        legend.append(Text.assemble(("■", colors[label]), f" {label} {part_s:.2f}"))
    return [bar, Text("  ", no_wrap=True, overflow="ellipsis").join(legend)]
