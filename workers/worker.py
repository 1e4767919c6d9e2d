"""What every worker actor has: one entry point that times the call, and the address of the node it runs on.

WorkerGroup calls `run` for every method, so the run's timeline needs no line of code in the workers.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(slots=True)
class Timed:
    """A method's result with when it ran, in unix seconds, and the process's CPU seconds so far."""

    result: Any
    start_s: float
    end_s: float
    cpu_s: float


class Worker:
    """Base of the actors; subclasses add public methods that take and return plain data."""

    def run(self, method: str, *args: Any) -> Timed:
        start = time.time()
        result = getattr(self, method)(*args)
        return Timed(result, start, time.time(), time.process_time())

    def describe(self) -> dict[str, Any]:
        """Process id, memory and CPU use since the start, for preflight, idle checks and error messages."""
        process = psutil.Process()
        return {"pid": os.getpid(), "rss_bytes": process.memory_info().rss, "cpu_s": time.process_time()}
