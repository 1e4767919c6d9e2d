"""Reward functions that do what a user's may do. Run in the reward process by test_environment.py."""

import asyncio
import ctypes
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from workers.environment import Sample

NOT_A_FUNCTION = 3


def one(sample: Sample) -> float:
    return 1.0


def length(sample: Sample) -> int:
    return len(sample.completion)


async def slow_length(sample: Sample) -> float:
    await asyncio.sleep(0.001)
    return float(len(sample.completion))


def two_arguments(sample: Sample, answer: str) -> float:
    return 1.0


def obey(sample: Sample) -> Any:
    """Do what the completion says."""
    return ACTIONS[sample.completion](sample) if sample.completion in ACTIONS else float(len(sample.completion))


def _raise(sample: Sample) -> float:
    raise ValueError("no such answer " + "x" * 1000)


def _raise_half_a_surrogate_pair(sample: Sample) -> float:
    raise ValueError("\ud83d")


def _loop(sample: Sample) -> float:
    while True:
        try:
            while True:
                pass
        except BaseException:  # noqa: BLE001 - what a careless retry loop does
            continue


def _loop_in_c(sample: Sample) -> float:
    """Hold the GIL inside one C call."""
    return ctypes.PyDLL(None).sleep(3600)


def _nap(sample: Sample) -> float:
    time.sleep(0.2)
    return 0.5


def _segfault(sample: Sample) -> float:
    return ctypes.string_at(0)[0]


def _print(sample: Sample) -> float:
    print("x" * 100_000)
    os.write(1, b"\x00\x00\x00\x01" * 1000)
    sys.stdout.write("not a frame")
    return 4.0


def _spawn(sample: Sample) -> float:
    """Leave a child behind and then hang; its id goes to the file that the prompt names."""
    child = subprocess.Popen(["sleep", "3600"])
    pathlib.Path(sample.prompt).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(3600)
    return 0.0


def _write_everywhere(data: bytes) -> float:
    """Write where the answers go, as only hostile code would."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, data)
        except OSError:
            continue
    return 1.0


ACTIONS = {
    "raise": _raise,
    "loop": _loop,
    "loop in c": _loop_in_c,
    "exit": lambda sample: os._exit(3),
    "sys.exit": lambda sample: sys.exit(3),
    "segfault": _segfault,
    "nan": lambda sample: math.nan,
    "infinity": lambda sample: -math.inf,
    "overflow": lambda sample: 10**400,
    "string": lambda sample: "1.0",
    "none": lambda sample: None,
    "true": lambda sample: True,
    "false": lambda sample: False,
    "nap": _nap,
    "print": _print,
    "spawn": _spawn,
    "read stdin": lambda sample: float(len(sys.stdin.read())),
    "pid": lambda sample: float(os.getpid()),
    "write an endless frame": lambda sample: _write_everywhere(b"\xff" * 64),
    "write a frame of noise": lambda sample: _write_everywhere(b"\x00\x00\x00\x01\xc1"),
    "half a surrogate pair": _raise_half_a_surrogate_pair,
}
