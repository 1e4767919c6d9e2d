import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import TrainerConfig
from workers.train import learning_rate

PEAK = 0.5


def rates(schedule: str, warmup_steps: int, total_steps: int) -> list[float]:
    config = TrainerConfig.model_validate({"learning_rate": PEAK, "schedule": schedule, "warmup_steps": warmup_steps})
    return [learning_rate(config, step, total_steps) for step in range(total_steps)]


def test_a_constant_rate_is_the_peak_at_every_step():
    assert rates("constant", 0, 3) == [PEAK] * 3


def test_a_warm_up_of_four_steps_rises_by_quarters():
    assert rates("constant", 4, 6) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_linear_decay_falls_by_equal_parts():
    assert rates("linear", 0, 5) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_a_cosine_decay_is_at_half_the_peak_half_way():
    # 0.25 (1 + cos(pi p)) at p = 0, 1/4, 1/2, 3/4.
    bend = math.sqrt(2) / 2
    assert rates("cosine", 0, 4) == pytest.approx([0.5, 0.25 * (1 + bend), 0.25, 0.25 * (1 - bend)])


def test_the_decay_begins_after_the_warm_up():
    assert rates("linear", 2, 6) == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_after_the_last_step_is_0_and_stays_there(schedule: str):
    config = TrainerConfig.model_validate({"learning_rate": PEAK, "schedule": schedule})
    assert [learning_rate(config, step, 10) for step in (10, 11, 99)] == pytest.approx([0.0] * 3, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule: str):
    assert rates(schedule, 10, 4) == pytest.approx([0.05, 0.1, 0.15, 0.2])


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 40))
def test_a_rate_is_above_0_and_never_above_the_peak(schedule: str, warmup_steps: int, total_steps: int):
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in rates(schedule, warmup_steps, total_steps))
