"""Real processes for the tests of what processes do to each other; each is told what to do by function."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
from collections.abc import Callable, Iterator
from typing import Any

ANSWER_S = 20

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transport.auto"])  # torch is imported once for all of them


class Child:
    """A process that calls functions of the tests for us, in order, and keeps what they leave in `state`."""

    def __init__(self) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(state, *arguments)` there. Raises EOFError if the process died of it."""
        self._pipe.send((function, arguments))
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"no answer to {function.__name__}")
        result = self._pipe.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.join(ANSWER_S)


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    state: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            try:
                pipe.send(function(state, *arguments))
            except OSError as error:
                pipe.send(error)


def child() -> Iterator[Child]:
    """A fixture: a process that ends with the test."""
    one = Child()
    yield one
    one.kill()
