"""Turn groups into microbatches: minibatches of a step, balanced over dp ranks by tokens, packed into rows.

Pure functions. Invariants: every valid trajectory is in exactly one microbatch; every rank gets the same number of
microbatches (FSDP's collectives need it; a rank with fewer gets empty ones); each carries the minibatch's global token
count, so that how tokens were split changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from transport.types import Microbatch, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits in tokens: of a row that several completions share, and of a padded microbatch."""

    row_tokens: int
    microbatch_tokens: int


@dataclass(slots=True)
class Row:
    """A prompt and completions that each continue it."""

    prompt: list[int]
    trajectories: list[Trajectory]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(t.completion.tokens) for t in self.trajectories)


def split_minibatches(groups: Sequence[TrajectoryGroup], num_minibatches: int) -> list[list[TrajectoryGroup]]:
    """Consecutive groups, as even in number as possible."""
    bounds = [len(groups) * index // num_minibatches for index in range(num_minibatches + 1)]
    return [list(groups[low:high]) for low, high in pairwise(bounds)]


def make_microbatches(groups: Sequence[TrajectoryGroup], dp_size: int, budget: Budget) -> list[list[Microbatch]]:
    """The microbatches of one minibatch for each dp rank; empty lists if no trajectory is valid."""
    num_global_tokens = sum(group.num_tokens() for group in groups)
    if num_global_tokens == 0:
        return [[] for _ in range(dp_size)]
    rows = [row for group in groups for row in _rows(group, budget.row_tokens)]
    per_rank = [_bins(rank_rows, budget.microbatch_tokens) for rank_rows in balance(rows, dp_size)]
    num_microbatches = max(len(bins) for bins in per_rank)
    return [
        [pack(rows, num_global_tokens) for rows in bins + [[]] * (num_microbatches - len(bins))] for bins in per_rank
    ]


def balance(rows: Sequence[Row], dp_size: int) -> list[list[Row]]:
    """Longest row first, each to the rank with the fewest tokens so far."""
    ranks: list[list[Row]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for row in sorted(rows, key=len, reverse=True):
        rank = loads.index(min(loads))
        ranks[rank].append(row)
        loads[rank] += len(row)
    return ranks


def pack(rows: Sequence[Row], num_global_tokens: int) -> Microbatch:
    """Lay rows out as arrays; without rows, one padding position that predicts nothing."""
    width = max((len(row) for row in rows), default=1)
    tokens, positions = np.zeros((2, max(len(rows), 1), width), dtype=np.int64)
    segments = np.full(tokens.shape, -1, dtype=np.int64)
    sources: list[np.ndarray] = []
    kept: list[Trajectory] = []
    for index, row in enumerate(rows):
        start = len(row.prompt)
        tokens[index, :start], positions[index, :start], segments[index, :start] = row.prompt, np.arange(start), 0
        for segment, trajectory in enumerate(row.trajectories, start=1):
            length = len(trajectory.completion.tokens)
            place = slice(start, start + length)
            tokens[index, place] = trajectory.completion.tokens
            positions[index, place] = np.arange(len(row.prompt), len(row.prompt) + length)
            segments[index, place] = segment
            # The prompt's last position predicts a completion's first token; each of its tokens the next.
            predicted_by = np.concatenate([[len(row.prompt) - 1], np.arange(start, start + length - 1)])
            sources.append(index * width + predicted_by)
            kept.append(trajectory)
            start += length
    lengths = [len(trajectory.completion.tokens) for trajectory in kept]
    return Microbatch(
        tokens_RT=tokens,
        positions_RT=positions,
        segments_RT=segments,
        sources_N=np.concatenate([*sources, []]).astype(np.int64),
        targets_N=np.array([token for t in kept for token in t.completion.tokens], dtype=np.int64),
        logprobs_N=np.array([value for t in kept for value in t.completion.logprobs], dtype=np.float32),
        advantages_N=np.repeat(np.array([t.advantage for t in kept], dtype=np.float32), lengths),
        reference_logprobs_N=np.zeros(sum(lengths), dtype=np.float32),
        versions_N=np.repeat(np.array([t.completion.weight_version for t in kept], dtype=np.int64), lengths),
        num_global_tokens=num_global_tokens,
    )


def _rows(group: TrajectoryGroup, row_tokens: int) -> list[Row]:
    """Completions share a row up to its budget, shortest first, so that rows of a microbatch are alike in length."""
    rows: list[Row] = []
    valid = [trajectory for trajectory in group.trajectories if trajectory.invalid is None]
    for trajectory in sorted(valid, key=lambda t: len(t.completion.tokens)):
        if not rows or len(rows[-1]) + len(trajectory.completion.tokens) > row_tokens:
            rows.append(Row(group.prompt.tokens, []))
        rows[-1].trajectories.append(trajectory)
    return rows


def _bins(rows: Sequence[Row], microbatch_tokens: int) -> list[list[Row]]:
    """Rows in order of length, cut where the padded size would pass the budget."""
    bins: list[list[Row]] = []
    for row in sorted(rows, key=len):
        # Rows come shortest first, so this row is the widest of its bin.
        if not bins or (len(bins[-1]) + 1) * len(row) > microbatch_tokens:
            bins.append([])
        bins[-1].append(row)
    return bins or [[]]
