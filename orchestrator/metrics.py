"""The run's records: metrics.jsonl (an object per step), events.jsonl (spans and notes), TensorBoard, W&B and trackio.

Lines are flushed as they are written, so a run that dies leaves all but its last moment. The driver reads the same
messages from memory through `messages_since`.
"""

import importlib
import importlib.util
import json
import math
import pathlib
import time
from collections import defaultdict
from typing import Any, TextIO

from configs.load import ConfigurationError
from configs.schema import LoggingConfig
from workers.worker import Timed

FLUSH_EVERY_S = 0.5


class RunLog:
    """Writes one run's records; owned by the orchestrator."""

    def __init__(self, run_dir: pathlib.Path, config: LoggingConfig, settings: dict[str, Any], steps_done: int) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and the preflight imports this module

        self.step = 0
        self._messages: list[dict[str, Any]] = []
        self._cpu_s: dict[str, float] = {}
        self._cpu_before: dict[str, float] = {}
        if steps_done == 0:
            for name in ("events.jsonl", "samples.jsonl"):
                (run_dir / name).unlink(missing_ok=True)
        _cut_after(run_dir / "metrics.jsonl", steps_done)
        self._metrics: TextIO = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._events: TextIO = (run_dir / "events.jsonl").open("a")
        self._samples: TextIO = (run_dir / "samples.jsonl").open("a", buffering=1)
        self._flushed_s = time.monotonic()
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        self._trackers = _trackers(config, run_dir.name, settings)

    def observe(self, who: str, name: str, timed: Timed) -> None:
        """Record a finished actor call as a span."""
        self._cpu_s[who] = timed.cpu_s
        self.span(who, name, timed.start_s, timed.end_s)

    def span(self, who: str, name: str, start_s: float, end_s: float) -> None:
        self._event({"event": "span", "who": who, "name": name, "step": self.step, "start": start_s, "end": end_s})

    def phase(self, text: str) -> None:
        """What the run is doing from now on, for people."""
        self._event({"event": "phase", "text": text, "time": time.time()})
        self._messages.append({"kind": "phase", "text": text})

    def note(self, text: str) -> None:
        """Something that a person should know once."""
        self._event({"event": "note", "text": text, "time": time.time()})
        self._messages.append({"kind": "note", "text": text})

    def refit(self, report: dict[str, Any]) -> None:
        """Record what a refit moved and how long each phase took."""
        self._event({"event": "refit", "step": self.step, "time": time.time()} | report)

    def warm_start(self, step: int, steps: int, loss: float) -> None:
        self._messages.append({"kind": "warm_start", "step": step, "steps": steps, "loss": loss})

    def metrics(self, metrics: dict[str, float], steps: int) -> None:
        """Record a finished step. A value that is not finite is written as null."""
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps(plain) + "\n")
        self._messages.append({"kind": "step", "steps": steps, "metrics": plain})
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, int(metrics["step"]))
        for tracker in self._trackers:
            tracker.log(plain, step=int(metrics["step"]))

    def sample(self, prompt: str, completion: str, reward: float, answer: str) -> None:
        """Record one text sample for the report; an invalid one's reward, NaN, is written as null."""
        fields = {"step": self.step, "prompt": prompt, "completion": completion, "answer": answer}
        fields["reward"] = reward if math.isfinite(reward) else None
        self._samples.write(json.dumps(fields) + "\n")

    def take_cpu_s(self) -> float:
        """CPU seconds of all observed workers and of this process since the last call."""
        self._cpu_s["orchestrator"] = time.process_time()
        spent = sum(now - self._cpu_before.get(who, 0.0) for who, now in self._cpu_s.items())
        self._cpu_before = dict(self._cpu_s)
        return spent

    def messages_since(self, cursor: int) -> list[dict[str, Any]]:
        return self._messages[cursor:]

    def close(self) -> None:
        for file in (self._metrics, self._events, self._samples):
            file.close()
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.finish()

    def _event(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps(event) + "\n")
        if time.monotonic() - self._flushed_s > FLUSH_EVERY_S:
            self._events.flush()
            self._flushed_s = time.monotonic()


class PhaseTimes:
    """Wall seconds of one step by phase: `with times("refit"): ...`; a phase within a phase counts as the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: list[tuple[str, float]] = []

    def __call__(self, name: str) -> "PhaseTimes":
        self._started.append((name, time.perf_counter()))
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        name, start = self._started.pop()
        if not self._started:
            self.seconds[name] += time.perf_counter() - start


def _cut_after(path: pathlib.Path, steps_done: int) -> None:
    """Drop records of steps that a resumed run will do again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
        if steps_done > 0 and step <= steps_done:
            kept.append(line + "\n")
    path.write_text("".join(kept))


def _trackers(config: LoggingConfig, run_name: str, settings: dict[str, Any]) -> list[Any]:
    """W&B and trackio runs, where configured; both modules have the same init, log and finish."""
    trackers = []
    for module, project in (("wandb", config.wandb_project), ("trackio", config.trackio_project)):
        if project is not None:
            tracker = importlib.import_module(module)
            tracker.init(project=project, name=run_name, config=settings)
            trackers.append(tracker)
    return trackers


def check_trackers(config: LoggingConfig) -> None:
    """Raises ConfigurationError if a configured tracker is not installed."""
    for module, project in (("wandb", config.wandb_project), ("trackio", config.trackio_project)):
        if project is not None and importlib.util.find_spec(module) is None:
            raise ConfigurationError(f"logging.{module}_project: {module} is not installed; pip install {module}")
