"""What a transport is: a publisher in every train worker, a receiver in every rollout worker.

The trainer overwrites its arena, `publish`es, and hands the returned handles to the orchestrator, which carries them to
the receivers; a receiver `pull`s into its own arenas. Who may write or read when is WeightSync's to order: no arena is
written while a receiver pulls from it.
"""

from typing import Any, Protocol

from transport.arena import Arena


class Publisher(Protocol):
    def publish(self) -> Any:
        """Make the arena's present bytes readable. Returns a handle for receivers, small and serialisable."""

    def close(self) -> None: ...


class Receiver(Protocol):
    def pull(self, rank: int, handle: Any) -> None:
        """Copy the bytes that train rank `rank` published into this receiver's arena for that rank. Blocks."""

    def close(self) -> None: ...


class Transport(Protocol):
    """A factory of both ends."""

    def publisher(self, arena: Arena) -> Publisher: ...

    def receiver(self, arenas: list[Arena]) -> Receiver: ...
