"""Rewards that integration tests name by their import path."""

from workers.environment import Sample


def share_of_small_digits(sample: Sample) -> float:
    """A dense reward, so that a random model has something to learn; some samples fail in every way there is."""
    if sample.tokens[0] % 8 == 0:
        raise ValueError("it starts with a token that this reward does not know")
    if sample.tokens[0] % 8 == 1:
        return float("nan")
    return sum(3 <= token < 8 for token in sample.tokens) / len(sample.tokens)
