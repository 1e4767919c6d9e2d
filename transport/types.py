"""What moves between rollout, rewards and training: plain data, ids never text.

A step of 2 prompts with 2 completions each becomes 2 TrajectoryGroups:

    TrajectoryGroup(
        prompt=Prompt(row=7, tokens=[6, 4, 5, 2], text="312=", answer="123"),
        trajectories=[
            Trajectory(Completion(tokens=[4, 5, 6, 1], logprobs=[-0.1, -0.7, -0.2, -0.0], finish_reason="stop",
                                  weight_version=3), reward=1.0, advantage=0.99),
            Trajectory(Completion(tokens=[6, 5, 4, 1], logprobs=[-1.2, -0.6, -0.1, -0.0], finish_reason="stop",
                                  weight_version=3), reward=0.0, advantage=-0.99),
        ],
    )

Shape suffixes: _T positions of a row, _R rows, _N predicted tokens of a microbatch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

Array = Any
"""np.ndarray on the wire, torch.Tensor inside a train worker."""


@dataclass(slots=True)
class Prompt:
    """One row of the data set, tokenised once."""

    row: int
    tokens: list[int]
    text: str
    answer: str


@dataclass(slots=True)
class Completion:
    """What an engine sampled after a prompt.

    `logprobs` are those of the distribution that was sampled from, one per token; `finish_reason` is "stop" or
    "length"; `weight_version` is the version that sampled every token, or the oldest one if engines were refitted
    meanwhile.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Where several versions sampled it: each with its number of tokens, in order."""


@dataclass(slots=True)
class Trajectory:
    """A completion with its reward; `invalid` is the reason why it must not be trained on, its reward then NaN."""

    completion: Completion
    reward: float = float("nan")
    invalid: str | None = None
    advantage: float = 0.0


@dataclass(slots=True)
class TrajectoryGroup:
    """The trajectories of one prompt, compared with each other."""

    prompt: Prompt
    trajectories: list[Trajectory] = field(default_factory=list)

    def num_tokens(self) -> int:
        """Completion tokens that will be trained on."""
        return sum(len(t.completion.tokens) for t in self.trajectories if t.invalid is None)


@dataclass(slots=True)
class Microbatch:
    """One forward pass: rows of one prompt and one or more of its completions, padded to the longest row.

    Row "p p p a a b" holds a prompt of three tokens and two completions a and b that both continue it: `segments_RT` is
    0 0 0 1 1 2 (padding -1) and `positions_RT` 0 1 2 3 4 3. Token n of the N that are predicted has the id
    `targets_N[n]`, is predicted by position `sources_N[n]` of the flattened rows, and carries its sampling logprob, its
    advantage, the reference policy's logprob and the weight version that sampled it (-1: nobody did, it was given).
    """

    tokens_RT: Array
    positions_RT: Array
    segments_RT: Array
    sources_N: Array
    targets_N: Array
    logprobs_N: Array
    advantages_N: Array
    reference_logprobs_N: Array
    versions_N: Array
    num_global_tokens: int
    """Tokens of the whole minibatch over every rank and microbatch: the denominator of the loss."""


@dataclass(slots=True)
class Metrics:
    """Sums over tokens and maxima, mergeable over microbatches, minibatches and ranks.

    `sums["entropy"] / weights["entropy"]` is the mean: weights count the tokens that a sum ran over, because some
    metrics see only a part of the tokens (logprob_diff: those sampled under the trainer's present weights).
    """

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, weight: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def maximum(self, name: str, value: float) -> None:
        known = self.maxima.get(name, value)
        self.maxima[name] = known if known >= value or math.isnan(known) else value  # a NaN stays

    def merge(self, other: "Metrics") -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.weights[name])
        for name, value in other.maxima.items():
            self.maximum(name, value)

    def flat(self) -> dict[str, float]:
        """Means under their own names, maxima under theirs; a mean over nothing is left out."""
        means = {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}
        return means | self.maxima
