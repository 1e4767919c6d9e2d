"""The child process of an environment worker: runs one reward function, a sample at a time, for as long as it lives.

    python -P -m workers.reward_process package.module:function LIFELINE_FD     (started by workers.environment)

Every message on its two pipes is a frame: the length as four big-endian bytes, then msgpack. The child first answers
`None` (ready) or a string (the reward cannot be used, and why), then one `[reward, invalid]` for each Sample it reads.

Invariant: the user's code never touches the protocol. Before it is imported the pipes move to other descriptors; what
it reads from stdin is empty and what it prints goes to stderr. Each answer is written before the next sample starts,
so whatever a sample does to this process, the answers of those before it have left and no other one is blamed.
The child ends when its stdin closes, and, whatever it is doing, when the worker dies (`_die_with_worker`).
"""

import asyncio
import contextlib
import fcntl
import importlib
import inspect
import math
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, SupportsFloat

import msgspec

from workers.environment import MAX_FRAME_BYTES, Answer, Sample

MAX_MESSAGE_CHARACTERS = 200
"""Characters kept of an exception's message."""


def main() -> None:
    reward_path, lifeline = sys.argv[1], int(sys.argv[2])
    samples, answers = _take_pipes()
    _die_with_worker(lifeline)
    reward, problem = _load(reward_path)
    _write_frame(answers, problem)
    if reward is None:
        return
    decoder = msgspec.msgpack.Decoder(Sample)
    with asyncio.Runner() as runner:
        while (frame := _read_frame(samples)) is not None:
            _write_frame(answers, _score(reward, decoder.decode(frame), runner))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol away from stdin and stdout, to descriptors that the user's subprocesses do not inherit."""
    samples, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return os.fdopen(samples, "rb"), os.fdopen(answers, "wb")


def _die_with_worker(lifeline: int) -> None:
    """Have the kernel kill this process group when the worker's end of the lifeline closes.

    A reward that loops for ever, perhaps in C with the GIL held, never reads the end of stdin. The kernel signals the
    owner of an O_ASYNC pipe when its last writer is gone; nobody ever writes to this one.
    """
    assert os.getpgrp() == os.getpid(), "started without a session of its own, the worker's group would be killed"
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        if os.read(lifeline, 1) == b"":
            sys.exit("the environment worker ended before its reward process had started")


def _load(reward_path: str) -> tuple[Callable[[Sample], Any] | None, str | None]:
    """The reward function, or None and what is wrong with it."""
    module_name, _, function_name = reward_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001 - any failure of the user's module is theirs to read, in one line
        return None, f"importing {module_name} failed with {_describe(error)}"
    reward = getattr(module, function_name, None)
    if reward is None:
        return None, f"{module_name} ({module.__file__}) has no {function_name}"
    if not callable(reward):
        return None, f"{function_name} in {module_name} is {type(reward).__name__}, not a function"
    try:
        inspect.signature(reward).bind(None)
    except TypeError as error:
        return None, f"{function_name} in {module_name} must take one argument, the sample: {error}"
    return reward, None


def _score(reward: Callable[[Sample], Any], sample: Sample, runner: asyncio.Runner) -> Answer:
    """The reward as a finite float, or NaN and the reason."""
    try:
        value = reward(sample)
        if inspect.iscoroutine(value):
            value = runner.run(value)
        if not isinstance(value, SupportsFloat):
            return math.nan, f"type: {type(value).__name__} is not a number"
        number = float(value)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything; the reason goes back to the run
        return math.nan, f"exception: {_describe(error)}"
    return (number, None) if math.isfinite(number) else (math.nan, "nan")


def _describe(error: Exception) -> str:
    message = str(error)[:MAX_MESSAGE_CHARACTERS].encode(errors="replace").decode()
    return f"{type(error).__name__}: {message}"


def _read_frame(stream: BinaryIO) -> bytes | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    (num_bytes,) = struct.unpack("!I", header)
    assert num_bytes <= MAX_FRAME_BYTES, num_bytes
    body = stream.read(num_bytes)
    return body if len(body) == num_bytes else None


def _write_frame(stream: BinaryIO, message: Answer | str | None) -> None:
    body = msgspec.msgpack.encode(message)
    stream.write(struct.pack("!I", len(body)) + body)
    stream.flush()


if __name__ == "__main__":
    main()
