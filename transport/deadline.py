"""How long the two sides of a refit wait for each other.

Both give up before the call that they run in does, so that their error, which knows who is late, is the one that is
seen. One who keeps others waiting is given up sooner, so that these still get the version in time.
"""

import time

WHOLE_SHARE = 0.9
"""Of a link's timeout: for one publish or stage."""
PATIENCE_SHARE = 0.25
"""Of a link's timeout: for one that others wait for."""
OPERATION_SHARE = 0.15
"""Of a link's timeout: for one operation of a process group, less than the patience of who waits for its members."""
SHORT_PATIENCE_S = 1.0
"""For one that was waited for in vain and not heard of since: it is on its way at once, or not at all."""


def patience_s(timeout_s: float, trusted: bool) -> float:
    """How long one may keep others waiting, on a link of that timeout."""
    return timeout_s * PATIENCE_SHARE if trusted else min(timeout_s * PATIENCE_SHARE, SHORT_PATIENCE_S)


class Deadline:
    """Begins when it is made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds that are left; 0 when it has passed."""
        return max(self._end_s - time.monotonic(), 0.0)
