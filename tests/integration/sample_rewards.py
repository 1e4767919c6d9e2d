"""Rewards that integration tests name by their import path."""

from workers.environment import Sample


def share_of_small_digits(sample: Sample) -> float:
    """A dense reward, so that a random model has something to learn; some samples fail in every way there is."""
    if len(sample.tokens) == 3:
        raise ValueError("three tokens are not supported")
    if len(sample.tokens) == 4:
        return float("nan")
    return sum(3 <= token < 8 for token in sample.tokens) / len(sample.tokens)
