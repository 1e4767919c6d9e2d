"""Scores completions with the user's reward function, out of reach of what that function may do.

    EnvironmentWorker.score --samples--> pipe --> workers.reward_process --answers--> pipe --> score

The reward runs in one long-lived child process per worker. Invariant: every sample of a batch gets an answer within
`timeout_s` of the one before it, either a finite reward or NaN with the reason, and a sample that loops, raises, exits
or crashes costs only itself: the child is killed, a new one is started, and the rest of the batch goes on.
The orchestrator launches the worker as an actor and calls `score`, from one thread; `recipes.rewards.resolve` starts
a RewardProcess to see whether a reward can be used. Nothing is ever pickled.

Reasons, counted by what stands before the first colon: `timeout`, `exception: ValueError: message`, `exit` (the
process died), `nan` (NaN or infinite), `type: str is not a number`.
"""

import os
import pathlib
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from workers.worker import Worker

Answer = tuple[float, str | None]
"""A reward and None, or NaN and the reason."""

MAX_FRAME_BYTES = 64 << 20
"""Largest message between a worker and its reward process: one sample, or one answer."""

START_TIMEOUT_S = 120.0
"""Longest start of a reward process: Python, and whatever the user's module imports."""

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Sample:
    """What a reward function sees: `Sample("7413=", "1347", "1347", "stop", [4, 6, 7, 10, 1])`.

    `finish_reason` is "stop" or "length"; `tokens` are the completion's ids, the end-of-sequence token included.
    """

    prompt: str
    completion: str
    answer: str
    finish_reason: str
    tokens: list[int]


class RewardProcessError(RuntimeError):
    """The reward's process did not come up; the message says why."""


class EnvironmentWorker(Worker):
    """One reward function and the process that runs it.

    Args:
        reward: "package.module:function", as `recipes.rewards.resolve` returns it.
        timeout_s: longest time of one sample.
        tokenizer_path: Hugging Face folder or hub id; if given, completions arrive as tokens and are decoded here.

    Raises:
        RewardProcessError: the reward cannot be imported here.
    """

    def __init__(self, rank: int, world_size: int, reward: str, timeout_s: float, tokenizer_path: str | None) -> None:
        self._reward = reward
        self._timeout_s = timeout_s
        self._tokenizer = _load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
        self._process: RewardProcess | None = RewardProcess(reward)

    def score(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One {"reward": float, "invalid": None or reason} per sample, in order; an invalid sample's reward is NaN.

        Args:
            samples: the fields of Sample; with a tokenizer, `completion` is not looked at and may be missing.

        Raises:
            RewardProcessError: a new process was needed and did not come up.
            msgspec.ValidationError: a field is missing or has another type than Sample's.
            ValueError: one sample is larger than MAX_FRAME_BYTES.
        """
        frames = [_frame(msgspec.msgpack.encode(sample)) for sample in self._decoded(samples)]
        answers: list[Answer] = []
        try:
            while len(answers) < len(frames):
                if self._process is None:
                    self._process = RewardProcess(self._reward)
                answers += self._process.score(frames[len(answers) :], self._timeout_s)
                if len(answers) < len(frames):
                    answers.append((float("nan"), self._process.failure))
                    self.close()
        except BaseException:
            # Answers of this batch may still be in the pipe; the next batch must not read them.
            self.close()
            raise
        return [{"reward": reward, "invalid": invalid} for reward, invalid in answers]

    def close(self) -> None:
        """End the reward's process and its children; the next `score` would start a new one."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _decoded(self, samples: list[dict[str, Any]]) -> list[Sample]:
        if self._tokenizer is None:
            return [msgspec.convert(sample, Sample) for sample in samples]
        texts = self._tokenizer.batch_decode([sample["tokens"] for sample in samples], skip_special_tokens=True)
        complete = (sample | {"completion": text} for sample, text in zip(samples, texts, strict=True))
        return [msgspec.convert(sample, Sample) for sample in complete]


class RewardProcess:
    """A running `workers.reward_process` and the parent's ends of its pipes; use once, kill, and start another.

    Raises:
        RewardProcessError: the reward cannot be imported or called, or the process did not answer in START_TIMEOUT_S.
    """

    def __init__(self, reward: str) -> None:
        self.failure = ""
        """After a short `score`: why the next sample has no answer, "timeout" or "exit"."""
        lifeline, held = os.pipe()
        self._lifeline = os.fdopen(held, "wb")
        self._received = bytearray()
        self._outgoing = memoryview(b"")
        path = os.pathsep.join(entry or str(pathlib.Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "workers.reward_process", reward, str(lifeline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(lifeline,),
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        os.close(lifeline)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._samples, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._samples.fileno(), False)
        try:
            self._await_ready(reward)
        except BaseException:
            self.kill()
            raise

    def score(self, frames: Sequence[bytes], timeout_s: float) -> list[Answer]:
        """The answers to the samples in `frames`; fewer if the process hung or died, and then `failure` says which."""
        self._outgoing = memoryview(b"".join(frames))
        answers: list[Answer] = []
        for _ in frames:
            body = self._next_body(time.monotonic() + timeout_s)
            if body is None:
                break
            try:
                answers.append(msgspec.msgpack.decode(body, type=Answer))
            except msgspec.DecodeError:
                self.failure = "exit"
                break
        return answers

    def kill(self) -> None:
        """End the process and what it has started, and wait for its end. May be called twice."""
        if self._process.returncode is None:
            # Not reaped yet, so its id, which is also its group's, cannot belong to anyone else.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._samples, self._answers, self._lifeline):
            stream.close()

    def _await_ready(self, reward: str) -> None:
        body = self._next_body(time.monotonic() + START_TIMEOUT_S)
        if body is not None:
            problem = msgspec.msgpack.decode(body, type=str | None)
        elif self.failure == "exit":
            problem = f"the process that imports it ended with status {self._process.wait(START_TIMEOUT_S)}"
        else:
            problem = f"the process that imports it was not ready after {START_TIMEOUT_S:.0f} s"
        if problem is not None:
            raise RewardProcessError(f"reward {reward}: {problem}")

    def _next_body(self, deadline: float) -> bytes | None:
        """The next message of the process; None, with `failure` set, if it ends or the deadline passes first."""
        while True:
            num_received = len(self._received)
            end = 4 + struct.unpack_from("!I", self._received)[0] if num_received >= 4 else 4
            if end > 4 + MAX_FRAME_BYTES:
                self.failure = "exit"
                return None
            if num_received >= max(end, 5):
                body = bytes(self._received[4:end])
                del self._received[:end]
                return body
            if not self._exchange(deadline):
                return None

    def _exchange(self, deadline: float) -> bool:
        """Write and read what can be, waiting for either; False, with `failure` set, if that is all."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if self._outgoing:
            poll.register(self._samples, select.POLLOUT)
        ready = [descriptor for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if self._samples.fileno() in ready:
            try:
                self._outgoing = self._outgoing[self._samples.write(self._outgoing) or 0 :]
            except BrokenPipeError:
                self._outgoing = memoryview(b"")
        if self._answers.fileno() in ready:
            data = self._answers.read(_READ_BYTES)
            if not data:
                self.failure = "exit"
                return False
            self._received += data
        elif time.monotonic() >= deadline:
            self.failure = "timeout"
            return False
        return True


def _frame(body: bytes) -> bytes:
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a sample may have at most {MAX_FRAME_BYTES} bytes, got {len(body)}")
    return struct.pack("!I", len(body)) + body


def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
