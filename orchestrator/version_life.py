"""The life of weight versions on a set of engines, as a state machine without actors: who may do what when.

    engine:  JOINED -> STAGING -> STAGED -> SERVING -> STAGING ...      any -> QUARANTINED -> STAGING      any -> (left)

Invariants: an engine serves whole versions only, each newer than the last; a half of the buffers is not written while
anybody that serves reads it; a quarantined engine serves nothing until it has committed a newer version.
WeightSync asks here before every call that it makes.
"""

import enum
from dataclasses import dataclass

NUM_HALVES = 2


class State(enum.Enum):
    JOINED = "joined"
    STAGING = "staging"
    STAGED = "staged"
    SERVING = "serving"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class EngineLife:
    """`serving` is the version that requests are answered with (None: none), `target` the one that is on its way."""

    state: State = State.JOINED
    serving: int | None = None
    target: int | None = None
    newest: int | None = None
    """The newest version it ever served."""
    reason: str = ""
    """Why it is quarantined."""


class VersionLife:
    """Engines by number, and the newest version that can be staged (None: none, or it is being written)."""

    def __init__(self) -> None:
        self.engines: dict[int, EngineLife] = {}
        self.readable: int | None = None
        self.meets = False
        """Whether the transport's two sides meet: engines then stage a version while it is written, else afterwards."""
        self._newest = -1

    def join(self, engine: int) -> None:
        assert engine not in self.engines, f"engine {engine} is here already"
        self.engines[engine] = EngineLife()

    def leave(self, engine: int) -> None:
        del self.engines[engine]

    def serving(self) -> list[int]:
        """The engines that may be given work."""
        return [number for number, engine in self.engines.items() if engine.serving is not None]

    def quarantined(self) -> dict[int, str]:
        return {number: e.reason for number, e in self.engines.items() if e.state is State.QUARANTINED}

    def begin_publish(self, version: int) -> None:
        """Train ranks start to write `version`: what was readable in its half is not any more."""
        assert version > self._newest, f"version {version} after {self._newest}"
        for number, engine in self.engines.items():
            assert engine.target is None, f"engine {number} has version {engine.target} {engine.state.value}"
            assert engine.serving is None or (version - engine.serving) % NUM_HALVES, (
                f"engine {number} serves version {engine.serving} from the half that {version} goes to"
            )
        self._newest, self.readable = version, None

    def published(self, version: int) -> None:
        assert version == self._newest, f"version {version} was not the last to begin"
        self.readable = version

    def begin_stage(self, engine: int, version: int) -> None:
        """An engine is told to bring `version` to itself."""
        life = self.engines[engine]
        assert version == self._newest and life.target is None and (life.newest is None or version > life.newest)
        assert self.meets or version == self.readable, f"version {version} is still being written"
        life.state, life.target = State.STAGING, version

    def staged(self, engine: int, version: int) -> None:
        life = self.engines[engine]
        assert life.state is State.STAGING and life.target == version
        life.state = State.STAGED

    def committed(self, engine: int, version: int) -> None:
        life = self.engines[engine]
        assert life.state is State.STAGED and life.target == version == self.readable
        life.state, life.serving, life.newest, life.target, life.reason = State.SERVING, version, version, None, ""

    def fail(self, engine: int, reason: str) -> None:
        """Whatever it was doing, it serves nothing from now on."""
        life = self.engines[engine]
        life.state, life.serving, life.target, life.reason = State.QUARANTINED, None, None, reason
