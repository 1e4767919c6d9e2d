import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.objectives import ClippedPolicyLoss, NegativeLogLikelihood, group_advantages, k3_divergence
from transport.types import Metrics, Microbatch

LOW, HIGH = 0.2, 0.28
LOSS = ClippedPolicyLoss(clip_low=LOW, clip_high=HIGH, kl_coef=0.0)
EPSILON = 1e-6


def microbatch(sampled: list[float], advantages: list[float], reference: list[float] | None = None) -> Microbatch:
    """A microbatch of which a loss sees the tokens' arrays only, in float64."""

    def double(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    none = torch.zeros(0, dtype=torch.int64)
    num = len(sampled)
    return Microbatch(
        none, none, none, none, none, double(sampled), double(advantages), double(reference or [0.0] * num), none, num
    )  # type: ignore[arg-type]


def evaluate(loss: ClippedPolicyLoss, logprobs: list[float], batch: Microbatch) -> tuple[float, list[float], Metrics]:
    """The summed loss, its gradient to every logprob, and the metrics."""
    logprobs_N = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    summed, metrics = loss(logprobs_N, batch)
    summed.backward()
    assert logprobs_N.grad is not None
    return summed.item(), logprobs_N.grad.tolist(), metrics


def at_ratio(ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, gradient and clip fraction of one token."""
    value, (slope,), metrics = evaluate(LOSS, [math.log(ratio) - 1.5], microbatch([-1.5], [advantage]))
    return value, slope, metrics.flat()["clip_fraction"]


def test_rewards_1_0_0_1_have_a_standard_deviation_of_0_577():
    # Mean 0.5, variance 4 x 0.25 / 3 = 1/3.
    scale = math.sqrt(1 / 3) + EPSILON
    expected = [0.5 / scale, -0.5 / scale, -0.5 / scale, 0.5 / scale]
    assert group_advantages([1.0, 0.0, 0.0, 1.0], by_std=True, epsilon=EPSILON) == pytest.approx(expected, rel=1e-12)
    assert expected[0] == pytest.approx(0.866, abs=1e-3)


def test_without_the_deviation_advantages_are_distances_to_the_mean():
    assert group_advantages([3.0, 0.0, 0.0], by_std=False, epsilon=EPSILON) == [2.0, -1.0, -1.0]


def test_an_invalid_sample_takes_no_part_and_gets_0():
    assert group_advantages([3.0, None, 1.0], by_std=False, epsilon=EPSILON) == [1.0, 0.0, -1.0]
    # Of 3 and 1: mean 2, variance 2 / 1.
    scale = math.sqrt(2) + EPSILON
    assert group_advantages([3.0, None, 1.0], by_std=True, epsilon=EPSILON) == pytest.approx([1 / scale, 0, -1 / scale])


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("rewards", [[0.5] * 4, [1.0], [None, 0.7, None], [None, None], []])
def test_nothing_to_compare_is_an_advantage_of_0(rewards: list[float | None], by_std: bool):
    assert group_advantages(rewards, by_std, EPSILON) == [0.0] * len(rewards)


@given(st.floats(-1e3, 1e3), st.integers(1, 16), st.booleans())
def test_equal_rewards_have_no_advantage_whatever_they_are(reward: float, num: int, by_std: bool):
    assert group_advantages([reward] * num, by_std, EPSILON) == pytest.approx([0.0] * num, abs=1e-6)


@given(st.lists(st.none() | st.integers(-5, 5).map(float), max_size=8), st.booleans())
def test_advantages_of_a_group_sum_to_0_and_keep_the_order_of_its_rewards(rewards: list[float | None], by_std: bool):
    advantages = group_advantages(rewards, by_std, EPSILON)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    pairs = sorted(
        (reward, advantage) for reward, advantage in zip(rewards, advantages, strict=True) if reward is not None
    )
    assert [advantage for _, advantage in pairs] == sorted(advantage for _, advantage in pairs)


# At ratio r and advantage A the loss is -min(r A, clip(r, 0.8, 1.28) A), and its slope in the logprob is -r A where the
# first term is taken, else 0.
@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "is_clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.25, 2.0, -2.5, -2.5, False),
        (1.5, 2.0, -2.56, 0.0, True),
        (0.9, 2.0, -1.8, -1.8, False),
        (0.5, 2.0, -1.0, -1.0, False),
        (1.0, -2.0, 2.0, 2.0, False),
        (1.25, -2.0, 2.5, 2.5, False),
        (1.5, -2.0, 3.0, 3.0, False),
        (0.9, -2.0, 1.8, 1.8, False),
        (0.5, -2.0, 1.6, 0.0, True),
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_clipped_loss_and_its_slope_by_hand(
    ratio: float, advantage: float, value: float, slope: float, is_clipped: bool
):
    assert at_ratio(ratio, advantage) == pytest.approx((value, slope, float(is_clipped)), abs=1e-12)


def test_the_loss_is_a_sum_over_tokens():
    batch = microbatch([-1.0, -2.0], [2.0, -3.0])
    value, slopes, metrics = evaluate(LOSS, [-1.0, -2.0], batch)
    assert value == pytest.approx(1.0)
    assert slopes == pytest.approx([-2.0, 3.0])
    assert metrics.weights == {"clip_fraction": 2, "ratio/mean": 2}


def test_before_the_first_optimiser_step_the_ratio_is_1_and_nothing_is_clipped():
    logprobs = [-0.1, -2.0, -30.0]
    _, slopes, metrics = evaluate(LOSS, logprobs, microbatch(logprobs, [1.0, -1.0, 0.5]))
    assert metrics.flat() == {"clip_fraction": 0.0, "ratio/mean": 1.0}
    assert slopes == [-1.0, 1.0, -0.5]


def test_k3_by_hand():
    # d = reference - policy = 1: e - 2; d = -1: 1/e; d = 0: 0.
    divergences = k3_divergence(torch.tensor([-2.0, -1.0, -1.0]).double(), torch.tensor([-1.0, -2.0, -1.0]).double())
    assert divergences.tolist() == pytest.approx([math.e - 2, 1 / math.e, 0.0])


def test_the_kl_term_is_weighted_added_and_reported():
    loss = ClippedPolicyLoss(LOW, HIGH, kl_coef=0.1)
    value, (slope,), metrics = evaluate(loss, [-2.0], microbatch([-2.0], [0.0], [-1.0]))
    assert value == pytest.approx(0.1 * (math.e - 2))
    # d/dp (exp(r - p) - (r - p) - 1) = 1 - exp(r - p).
    assert slope == pytest.approx(0.1 * (1 - math.e))
    assert metrics.flat()["kl"] == pytest.approx(math.e - 2)


def test_without_a_kl_weight_the_reference_is_not_looked_at():
    value, _, metrics = evaluate(LOSS, [-2.0], microbatch([-2.0], [1.0], [math.nan]))
    assert value == -1.0
    assert "kl" not in metrics.flat()


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_an_empty_microbatch_gives_0_and_a_gradient_of_zeros(kl_coef: float):
    weights = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    logprobs_N = weights.sum(dim=1)[torch.zeros(0, dtype=torch.int64)]
    summed, metrics = ClippedPolicyLoss(LOW, HIGH, kl_coef)(logprobs_N, microbatch([], []))
    summed.backward()
    assert summed.item() == 0.0
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.0, 0.0]] * 3
    assert metrics.flat() == {}


def test_an_empty_microbatch_leaves_the_metrics_of_others_alone():
    _, _, metrics = evaluate(LOSS, [-1.0], microbatch([-2.0], [1.0]))
    before = metrics.flat()
    _, empty = LOSS(torch.zeros(0), microbatch([], []))
    metrics.merge(empty)
    assert metrics.flat() == before == {"clip_fraction": 1.0, "ratio/mean": pytest.approx(math.e)}


def independent(
    logprobs: np.ndarray, batch: Microbatch, clip_low: float, clip_high: float, kl_coef: float
) -> tuple[float, np.ndarray, float]:
    """The same loss token by token and case by case: (loss, gradient, clip fraction)."""
    total, slopes, num_clipped = 0.0, np.zeros_like(logprobs), 0
    columns = (batch.logprobs_N.tolist(), batch.advantages_N.tolist(), batch.reference_logprobs_N.tolist())
    for index, (sampled, advantage, reference) in enumerate(zip(*columns, strict=True)):
        ratio = math.exp(logprobs[index] - sampled)
        if advantage > 0 and ratio > 1 + clip_high:
            total -= (1 + clip_high) * advantage
            num_clipped += 1
        elif advantage < 0 and ratio < 1 - clip_low:
            total -= (1 - clip_low) * advantage
            num_clipped += 1
        else:
            total -= ratio * advantage
            slopes[index] = -ratio * advantage
        difference = reference - logprobs[index]
        total += kl_coef * (math.expm1(difference) - difference)
        slopes[index] -= kl_coef * math.expm1(difference)
    return total, slopes, num_clipped / len(logprobs)


# Multiples of 1/1000 + 1/3000: no ratio is a bound, where the slope is a choice.
NEAR_0 = st.integers(-1500, 1500).map(lambda thousandths: (thousandths + 1 / 3) / 1000)
TOKENS = st.tuples(NEAR_0, st.integers(-40, 40).map(lambda eighths: eighths / 8), NEAR_0, st.floats(-8, -0.1))


@given(
    st.lists(TOKENS, min_size=1, max_size=20), st.sampled_from([(0.2, 0.28), (0.1, 0.1), (1.0, 3.0)]), st.floats(0, 1)
)
@settings(max_examples=100, deadline=None)
def test_the_loss_equals_an_independent_implementation(
    tokens: list[tuple[float, float, float, float]], bounds: tuple[float, float], kl_coef: float
):
    drift, advantages, to_reference, sampled = (list(column) for column in zip(*tokens, strict=True))
    logprobs = np.add(sampled, drift)
    batch = microbatch(sampled, advantages, np.add(logprobs, to_reference).tolist())
    value, slopes, metrics = evaluate(ClippedPolicyLoss(*bounds, kl_coef), logprobs.tolist(), batch)
    expected, expected_slopes, clip_fraction = independent(logprobs, batch, *bounds, kl_coef)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-9, atol=1e-9)
    assert metrics.flat()["clip_fraction"] == pytest.approx(clip_fraction)


def test_the_supervised_loss_is_minus_the_sum_of_the_logprobs():
    summed, metrics = NegativeLogLikelihood()(torch.tensor([-0.5, -1.25]), microbatch([0.0, 0.0], [0.0, 0.0]))
    assert summed.item() == 1.75
    assert metrics.flat() == {}
