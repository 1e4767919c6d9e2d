"""One page that shows a whole run: reads what the run wrote in its folder and writes `report.html` beside it.

Invariant: the page is replaced whole, needs no network, and nothing that a run wrote (a completion, a reason, a note)
can act as markup or script in it: text is HTML-escaped, and data is JSON in which `<` is escaped. A line that holds no
JSON object, torn by a kill, is skipped and counted on the page; a value that is not finite is a gap.

Called when a run ends; works as well on the folder of one that was killed or still goes on. This module chooses and
thins the numbers and writes the text; the script in report_template.html draws them.
"""

import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

TEMPLATE = Path(__file__).with_name("report_template.html")
LOGPROB_DIFF_LIMIT = 1e-4
"""The largest difference between the engine's and the trainer's logprobs that invariant 1 allows in fp32."""
MAX_POINTS = 1000
"""Points drawn of one curve, two a bucket: its lowest and its highest."""
NUM_MEANS = 100
"""A curve of more than three times as many points is drawn faint, with the means of so many stretches over it."""
MAX_BARS = 240
MAX_SPANS = 20_000
MAX_ROWS_PER_LANE = 4
NUM_SAMPLES = 20
NUM_LOG_LINES = 200
MAX_TEXT_CHARACTERS = 4000
TIME_PARTS = ["time/rollout_wait_s", "time/train_s", "time/refit_s"]
LANE_ORDER = ["orchestrator", "train", "rollout", "reference", "environment"]

Row = dict[str, Any]
Point = list[float | None]


@dataclass(frozen=True, slots=True)
class Chart:
    """One set of axes; `series` maps the label of a curve to its metrics key."""

    title: str
    series: dict[str, str]
    log_limit: float | None = None
    """Draws a logarithmic axis with a line at this value."""


CHARTS = [
    Chart("Reward and accuracy", {"reward/mean": "reward/mean", "eval/accuracy": "eval/accuracy"}),
    Chart("Loss", {"loss": "loss"}),
    Chart("Gradient norm", {"grad_norm": "grad_norm"}),
    Chart("Entropy, nats per token", {"entropy": "entropy"}),
    Chart("KL to the reference policy", {"kl": "kl"}),
    Chart("Engine against trainer: logprob_diff/max", {"max": "logprob_diff/max"}, LOGPROB_DIFF_LIMIT),
    Chart("Tokens per completion", {"tokens": "tokens/completion"}),
    Chart("Staleness, weight versions", {"mean": "staleness/mean", "max": "staleness/max"}),
]


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` from whatever of metrics, events, samples and config is there; returns its path."""
    metrics, num_torn_metrics = read_json_lines(run_dir / "metrics.jsonl")
    events, num_torn_events = read_json_lines(run_dir / "events.jsonl")
    samples, num_torn_samples = read_json_lines(run_dir / "samples.jsonl")
    steps = latest_of_each_step(metrics)
    spans = [event for event in events if is_span(event)]
    config = run_dir / "config.yaml"
    num_torn = num_torn_metrics + num_torn_events + num_torn_samples
    data = {
        "charts": charts_of(steps),
        "time_split": time_split_of(steps),
        "timeline": timeline_of(spans),
    }
    parts = {
        "title": html.escape(run_dir.resolve().name),
        "subtitle": f"{num_torn} unreadable line{'s' * (num_torn != 1)} skipped" if num_torn else "",
        "cards": "\n".join(cards_of(steps, spans)),
        "samples": samples_table(samples[-NUM_SAMPLES:]),
        "log": log_list(events),
        "config": html.escape(
            config.read_text(encoding="utf-8", errors="replace") if config.exists() else "no config.yaml in this run"
        ),
        "data": script_json(data),
    }
    # One pass, so that a completion which spells a placeholder stays what it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    report = run_dir / "report.html"
    unfinished = run_dir / "report.html.tmp"
    # A lone surrogate, half of a character in a completion, has no bytes in UTF-8.
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    return unfinished.replace(report)


def read_json_lines(path: Path) -> tuple[list[Row], int]:
    """The JSON objects of a file, one a line, and the number of lines that hold none; a missing file is empty."""
    if not path.exists():
        return [], 0
    rows: list[Row] = []
    num_torn = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                num_torn += 1
    return rows, num_torn


def number(row: Row, key: str) -> float | None:
    """The finite number under a key; None where there is none."""
    value = row.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def rounded(value: float | None) -> float | None:
    """A value to draw: six digits keep the page small. Not for times, whose first six digits never change."""
    return None if value is None else float(f"{value:.6g}")


def latest_of_each_step(metrics: list[Row]) -> list[Row]:
    """Rows in step order. A resumed run writes the steps after its checkpoint again: the later row is the one kept."""
    by_step = {step: row for row in metrics if (step := number(row, "step")) is not None}
    return [by_step[step] for step in sorted(by_step)]


def is_span(event: Row) -> bool:
    """True of a span with finite ends; events of other kinds belong to other readers."""
    return event.get("event") == "span" and number(event, "start") is not None and number(event, "end") is not None


def cards_of(steps: list[Row], spans: list[Row]) -> Iterable[str]:
    """The figures to be seen first, each an HTML card."""
    accuracies = present(steps, "eval/accuracy")
    if accuracies:
        note = f"from {accuracies[0]:.3f}" if len(accuracies) > 1 else "evaluated once"
        yield card("Eval accuracy", f"{accuracies[-1]:.3f}", note)
    else:
        yield card("Eval accuracy", "n/a", "no step was evaluated")
    rewards = present(steps, "reward/mean")
    # An evaluation before the first step is a row too, one without a loss.
    num_steps = len([row for row in steps if "loss" in row] or steps)
    yield card("Steps", str(num_steps), f"reward {rewards[0]:.3f} → {rewards[-1]:.3f}" if rewards else "no rewards yet")
    step_seconds = present(steps, "time/step_s")
    if spans:
        wall_s = max(span["end"] for span in spans) - min(span["start"] for span in spans)
        yield card("Wall time", duration(wall_s), "first span to last")
    else:
        yield card("Wall time", duration(sum(step_seconds)) if step_seconds else "n/a", "sum of the steps")
    speeds = present(steps, "tokens/s")
    yield card(
        "Median step",
        duration(median(step_seconds)) if step_seconds else "n/a",
        f"{median(speeds):,.0f} tokens/s" if speeds else "",
    )
    yield from safety_cards(steps)


def safety_cards(steps: list[Row]) -> Iterable[str]:
    """Whether sampler and trainer agreed, whether weights arrived, and what was dropped and why."""
    differences = present(steps, "logprob_diff/max")
    if differences:
        fits = max(differences) <= LOGPROB_DIFF_LIMIT
        verdict = f"{'within' if fits else 'above'} {LOGPROB_DIFF_LIMIT:.0e}"
        yield card("Max logprob_diff", f"{max(differences):.1e}", verdict, "good" if fits else "bad")
    else:
        yield card("Max logprob_diff", "n/a", "not measured")
    refits = present(steps, "refit/verified")
    num_verified = sum(verified == 1 for verified in refits)
    state = ("good" if num_verified == len(refits) else "bad") if refits else ""
    note = {"good": "every digest matched", "bad": "a refit was not verified", "": "no refit yet"}[state]
    yield card("Refits verified", f"{num_verified}/{len(refits)}" if refits else "n/a", note, state)
    reasons: dict[str, float] = {}
    for row in steps:
        for key in row:
            if key.startswith("samples/invalid/"):
                reason = key.removeprefix("samples/invalid/")
                reasons[reason] = reasons.get(reason, 0) + (number(row, key) or 0)
    dropped = max(sum(present(steps, "samples/invalid")), sum(reasons.values()))
    by_count = sorted(reasons.items(), key=lambda item: -item[1])
    why = ", ".join(f"{reason} {count:.0f}" for reason, count in by_count if count) or "none"
    yield card("Samples dropped", f"{dropped:.0f}", why if dropped else "none", "bad" if dropped else "good")


def card(label: str, value: str, note: str, state: str = "") -> str:
    """One figure. `state` is "good", "bad" or empty, and only repeats in colour what the note says in words."""
    return (
        f'<div class="card {state}"><div class="label">{html.escape(label)}</div>'
        f'<div class="value">{html.escape(value)}</div><div class="note">{html.escape(note)}</div></div>'
    )


def present(steps: list[Row], key: str) -> list[float]:
    """The finite values of a key, in step order."""
    return [value for row in steps if (value := number(row, key)) is not None]


def duration(seconds: float) -> str:
    """0.34 s, 41.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds) % 60:02d} s"
    return f"{int(minutes // 60)} h {int(minutes) % 60:02d} min"


def charts_of(steps: list[Row]) -> list[Row]:
    """The charts that have data.

    {"title", "log_limit", "series": [{"label", "points": [[step, value or None], ...], "means": [[step, mean], ...]}]}
    """
    drawn = []
    for chart in CHARTS:
        curves = []
        for label, key in chart.series.items():
            if points := points_of(steps, key):
                curves.append({"label": label, "points": thin(points, MAX_POINTS), "means": means_of(points)})
        if curves:
            drawn.append({"title": chart.title, "log_limit": chart.log_limit, "series": curves})
    return drawn


def points_of(steps: list[Row], key: str) -> list[Point]:
    """A curve's points: a step without the key is passed over, a step whose value is not finite is a gap (None)."""
    points: list[Point] = [[number(row, "step"), rounded(number(row, key))] for row in steps if key in row]
    if all(value is None for _, value in points):
        return []
    return points


def means_of(points: list[Point]) -> list[Point]:
    """The mean over each of NUM_MEANS stretches of a long curve, placed at its middle; empty for a short one."""
    finite = [(step, value) for step, value in points if step is not None and value is not None]
    if len(finite) <= 3 * NUM_MEANS:
        return []
    size = math.ceil(len(finite) / NUM_MEANS)
    stretches = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [[part[len(part) // 2][0], rounded(sum(value for _, value in part) / len(part))] for part in stretches]


def thin(points: list[Point], max_points: int) -> list[Point]:
    """At most `max_points` of them: the lowest and the highest of every bucket, so that no spike is lost."""
    if len(points) <= max_points:
        return points
    size = math.ceil(2 * len(points) / max_points)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [(value, index) for index, (_, value) in enumerate(bucket) if value is not None]
        indices = sorted({min(finite)[1], max(finite)[1]}) if finite else [0]
        kept += [bucket[index] for index in indices]
    return kept


def time_split_of(steps: list[Row]) -> list[Point]:
    """Bars [step, rollout, train, refit, rest] in seconds; of a long run, the means of neighbouring steps."""
    bars = []
    for row in steps:
        if not any(key in row for key in [*TIME_PARTS, "time/step_s"]):
            continue
        parts = [number(row, key) or 0.0 for key in TIME_PARTS]
        rest = max(0.0, (number(row, "time/step_s") or 0.0) - sum(parts))
        bars.append([row["step"], *parts, rest])
    size = math.ceil(len(bars) / MAX_BARS) or 1
    buckets = [bars[start : start + size] for start in range(0, len(bars), size)]
    return [
        [bucket[0][0], *(rounded(sum(values) / len(values)) for values in list(zip(*bucket, strict=True))[1:])]
        for bucket in buckets
    ]


def timeline_of(spans: list[Row]) -> Row:
    """Lanes of spans, in milliseconds since the run's first span.

    {"lanes": [{"who": "train/0", "num_rows": 1, "spans": [[row, name index, step or None, start, end], ...]}],
     "names": ["generate", ...], "step_marks": [[step, start], ...], "end": 46300.0, "note": "880 of 880 spans ..."}
    """
    origin = min((span["start"] for span in spans), default=0.0)
    names = sorted({str(span.get("name")) for span in spans})
    name_index = {name: index for index, name in enumerate(names)}
    by_lane: dict[str, list[list[Any]]] = {}
    step_marks: dict[float, float] = {}
    for span in sorted(spans, key=lambda span: (span["start"], -span["end"])):
        start, end = (round((span[key] - origin) * 1000, 2) for key in ("start", "end"))
        step, name = number(span, "step"), str(span.get("name"))
        by_lane.setdefault(str(span.get("who")), []).append([0, name_index[name], step, start, end])
        if step is not None and name == "forward_backward":
            step_marks.setdefault(step, start)
    lanes = [lane_of(who, by_lane[who], MAX_SPANS // len(by_lane)) for who in sorted(by_lane, key=lane_rank)]
    num_kept = sum(len(lane["spans"]) for lane in lanes)
    note = "Seconds since the first span."
    if num_kept < len(spans):
        note += (
            f" {num_kept:,} of {len(spans):,} spans are kept: each worker's newest, and the longest of every few older."
        )
    return {
        "lanes": lanes,
        "names": names,
        "step_marks": thin(sorted([step, start] for step, start in step_marks.items()), MAX_SPANS // 10),
        "end": max((span[4] for lane in by_lane.values() for span in lane), default=0.0),
        "note": note,
    }


def lane_rank(who: str) -> tuple[int, str, int]:
    """The orchestrator first, then roles in the order of the pipeline, and worker 10 after worker 9."""
    role, _, rank = who.partition("/")
    place = LANE_ORDER.index(role) if role in LANE_ORDER else len(LANE_ORDER)
    return place, role, int(rank) if rank.isdecimal() else 0


def lane_of(who: str, spans: list[list[Any]], max_spans: int) -> Row:
    """One worker's spans in start order: the newest, half of the budget, whole, and the longest of every few older.

    Spans that overlap (a stage while the engine decodes) get rows of their own, where a name keeps to its row.
    """
    if len(spans) > max_spans:
        num_newest = max_spans // 2
        older, newest = spans[: len(spans) - num_newest], spans[len(spans) - num_newest :]
        size = math.ceil(len(older) / (max_spans - num_newest))
        stretches = [older[start : start + size] for start in range(0, len(older), size)]
        spans = [max(stretch, key=lambda span: span[4] - span[3]) for stretch in stretches] + newest
    row_ends: list[float] = []
    home_rows: dict[int, int] = {}
    for span in spans:
        _, name, _, start, end = span
        free = [row for row, row_end in enumerate(row_ends) if row_end <= start]
        if not free and len(row_ends) < MAX_ROWS_PER_LANE:
            free = [len(row_ends)]
            row_ends.append(end)
        home = home_rows.setdefault(name, free[0] if free else MAX_ROWS_PER_LANE - 1)
        span[0] = home if home in free or not free else free[0]
        row_ends[span[0]] = max(row_ends[span[0]], end)
    return {"who": who, "num_rows": len(row_ends), "spans": spans}


def script_json(data: Row) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def shown(value: object) -> str:
    """A value of any kind as escaped text of bounded length."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_TEXT_CHARACTERS:
        text = f"{text[:MAX_TEXT_CHARACTERS]} … and {len(text) - MAX_TEXT_CHARACTERS:,} more characters"
    return html.escape(text)


def samples_table(samples: list[Row]) -> str:
    """The last samples as a table, newest first; empty where the run wrote none."""
    if not samples:
        return ""
    columns = ["step", "prompt", "completion", "answer", "reward"]
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{name}" data-label="{name}">{shown(row[name]) if name in row else ""}</td>' for name in columns
        )
        + "</tr>"
        for row in reversed(samples)
    )
    return f'<h2>Samples</h2>\n<table class="samples"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def log_list(events: list[Row]) -> str:
    """Phases and notes in the order in which they came, with the seconds since the first; the newest of many."""
    texts = [event for event in events if event.get("event") in ("phase", "note") and "text" in event]
    times = [time for event in texts if (time := number(event, "time")) is not None]
    lines = []
    for event in texts[-NUM_LOG_LINES:]:
        time = number(event, "time")
        when = "" if time is None else f"{time - times[0]:.1f} s"
        lines.append(f'<li class="{event["event"]}"><span>{html.escape(when)}</span> {shown(event["text"])}</li>')
    return "\n".join(lines)
