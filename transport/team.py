"""The threads of one process that share a pass over memory: one core does not fill a host's memory bandwidth.

Torch and xxhash let go of the interpreter while they work, so plain threads serve. The team has as many members as the
process was given cores (`set_team_size`); the caller is one of them, so a team of one has no thread at all.
"""

import heapq
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")
MAX_SIZE = 4

_size = 1
_threads: ThreadPoolExecutor | None = None


def set_team_size(num_processes: int) -> None:
    """Take this process's part of the host's cores, if `num_processes` like it work there at the same time."""
    global _size, _threads
    if _threads is not None:
        _threads.shutdown()
    _size = max(1, min(len(os.sched_getaffinity(0)) // max(num_processes, 1), MAX_SIZE))
    _threads = ThreadPoolExecutor(_size - 1, thread_name_prefix="team") if _size > 1 else None


def team_size() -> int:
    return _size


def run_together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run at most `team_size()` jobs at the same time. Returns their results; raises the first error of one."""
    if _threads is None or len(jobs) < 2:
        return [job() for job in jobs]
    others = [_threads.submit(job) for job in jobs[1:]]
    try:
        first = jobs[0]()
    finally:
        wait(others)  # nobody may still write when this returns or raises
    return [first, *(other.result() for other in others)]


def deal(costs: Sequence[float], num_hands: int) -> list[list[int]]:
    """Indices of the costs, dealt so that the hands cost about the same: the dearest first, to the cheapest hand."""
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    heap: list[Any] = [(0.0, hand) for hand in range(num_hands)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        cost, hand = heapq.heappop(heap)
        hands[hand].append(index)
        heapq.heappush(heap, (cost + costs[index], hand))
    return [sorted(hand) for hand in hands]
