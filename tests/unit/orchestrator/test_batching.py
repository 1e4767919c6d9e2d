import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.batching import Budget, Row, balance, make_microbatches, pack, split_minibatches
from transport.types import Completion, Microbatch, Prompt, Trajectory, TrajectoryGroup

Step = tuple[list[TrajectoryGroup], int, Budget]


def trajectory(tokens: list[int], first_logprob: float = 0.0, **fields: object) -> Trajectory:
    """A completion whose token n has the logprob first_logprob - n, which tells tokens apart."""
    logprobs = [first_logprob - index for index in range(len(tokens))]
    version = int(fields.pop("version", 3))  # type: ignore[call-overload]
    return Trajectory(Completion(tokens, logprobs, "stop", version), **fields)  # type: ignore[arg-type]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    tokens = st.integers(1, 99)
    groups, num_tokens = [], 0
    for index in range(draw(st.integers(0, 4))):
        trajectories = []
        for completion in draw(st.lists(st.lists(tokens, min_size=1, max_size=7), max_size=4)):
            invalid = draw(st.sampled_from([None, None, None, "timeout"]))
            fields = {"version": draw(st.integers(0, 2)), "advantage": draw(st.integers(-8, 8)) / 4, "invalid": invalid}
            trajectories.append(trajectory(completion, -1.0 - num_tokens, **fields))
            num_tokens += len(completion)
        prompt = draw(st.lists(tokens, min_size=1, max_size=5))
        groups.append(TrajectoryGroup(Prompt(index, prompt, "", ""), trajectories))
    return groups, draw(st.integers(1, 4)), Budget(draw(st.integers(1, 20)), draw(st.integers(1, 40)))


def valid(groups: list[TrajectoryGroup]) -> list[tuple[list[int], Trajectory]]:
    return [(group.prompt.tokens, one) for group in groups for one in group.trajectories if one.invalid is None]


def flat(per_rank: list[list[Microbatch]]) -> list[Microbatch]:
    return [microbatch for microbatches in per_rank for microbatch in microbatches]


@given(steps())
@settings(max_examples=150, deadline=None)
def test_every_token_of_every_valid_trajectory_is_trained_on_exactly_once(step: Step):
    groups, dp_size, budget = step
    expected = sorted(
        (-logprob, token, one.advantage, one.completion.weight_version)
        for _, one in valid(groups)
        for token, logprob in zip(one.completion.tokens, one.completion.logprobs, strict=True)
    )
    trained = []
    for batch in flat(make_microbatches(groups, dp_size, budget)):
        fields = (-batch.logprobs_N, batch.targets_N, batch.advantages_N, batch.versions_N)
        trained += list(zip(*(field.tolist() for field in fields), strict=True))
        assert len(batch.sources_N) == len(batch.reference_logprobs_N) == len(batch.targets_N)
    assert sorted(trained) == expected


@given(steps())
@settings(max_examples=150, deadline=None)
def test_every_token_is_predicted_from_its_own_prompt_and_what_came_before_it(step: Step):
    groups, dp_size, budget = step
    contexts = {
        logprob: (prompt + one.completion.tokens[:index], token)
        for prompt, one in valid(groups)
        for index, (token, logprob) in enumerate(zip(one.completion.tokens, one.completion.logprobs, strict=True))
    }
    for batch in flat(make_microbatches(groups, dp_size, budget)):
        width = batch.tokens_RT.shape[1]
        for source, target, logprob in zip(batch.sources_N, batch.targets_N, batch.logprobs_N, strict=True):
            row, position = divmod(int(source), width)
            segments = batch.segments_RT[row, : position + 1]
            seen = np.flatnonzero((segments == 0) | (segments == segments[position]))
            context = (batch.tokens_RT[row, seen].tolist(), int(target))
            assert context == contexts[float(logprob)]
            assert batch.positions_RT[row, seen].tolist() == list(range(len(seen)))


@given(steps())
@settings(max_examples=100, deadline=None)
def test_every_rank_gets_the_same_number_of_microbatches(step: Step):
    groups, dp_size, budget = step
    per_rank = make_microbatches(groups, dp_size, budget)
    assert len(per_rank) == dp_size
    assert len({len(microbatches) for microbatches in per_rank}) == 1


@given(steps())
@settings(max_examples=100, deadline=None)
def test_every_microbatch_carries_the_token_count_of_the_whole_minibatch(step: Step):
    groups, dp_size, budget = step
    batches = flat(make_microbatches(groups, dp_size, budget))
    num_tokens = sum(len(one.completion.tokens) for _, one in valid(groups))
    assert {batch.num_global_tokens for batch in batches} <= {num_tokens}
    assert sum(len(batch.targets_N) for batch in batches) == num_tokens


@given(steps())
@settings(max_examples=150, deadline=None)
def test_budgets_are_kept_unless_one_sequence_alone_exceeds_them(step: Step):
    groups, dp_size, budget = step
    for batch in flat(make_microbatches(groups, dp_size, budget)):
        num_rows, width = batch.tokens_RT.shape
        assert num_rows * width <= budget.microbatch_tokens or num_rows == 1
        for segments in batch.segments_RT:
            assert (segments >= 0).sum() <= budget.row_tokens or segments.max() <= 1


@given(steps())
@settings(max_examples=100, deadline=None)
def test_ranks_differ_by_no_more_than_the_longest_row(step: Step):
    groups, dp_size, budget = step
    per_rank = make_microbatches(groups, dp_size, budget)
    loads = [sum(int((batch.segments_RT >= 0).sum()) for batch in batches) for batches in per_rank]
    rows = [int((row >= 0).sum()) for batch in flat(per_rank) for row in batch.segments_RT]
    assert max(loads) - min(loads) <= max(rows, default=0)


def test_the_longest_row_goes_first_to_the_rank_with_the_fewest_tokens():
    rows = [Row([0] * length, []) for length in (2, 7, 3, 4)]
    # 7 -> rank 0; 4 -> rank 1; 3 -> rank 1 (4 < 7); 2 -> rank 0 (7 = 7).
    assert [[len(row) for row in rank] for rank in balance(rows, 2)] == [[7, 2], [4, 3]]


def test_a_minibatch_without_a_valid_trajectory_has_no_microbatch():
    group = TrajectoryGroup(Prompt(0, [1], "", ""), [trajectory([5], invalid="timeout")])
    assert make_microbatches([group], 3, Budget(8, 8)) == [[], [], []]
    assert make_microbatches([], 2, Budget(8, 8)) == [[], []]


def test_a_rank_without_rows_gets_a_microbatch_that_predicts_nothing():
    group = TrajectoryGroup(Prompt(0, [1], "", ""), [trajectory([5, 6])])
    (full,), (empty,) = make_microbatches([group], 2, Budget(8, 8))
    assert full.targets_N.tolist() == [5, 6]
    assert empty.tokens_RT.tolist() == [[0]]
    assert empty.segments_RT.tolist() == [[-1]]
    assert empty.sources_N.tolist() == empty.targets_N.tolist() == []
    assert empty.sources_N.dtype == full.sources_N.dtype == np.int64
    assert empty.num_global_tokens == 2


def test_a_prompt_of_three_tokens_and_two_completions_share_a_row():
    row = Row([7, 8, 9], [trajectory([1, 2], -1.0, advantage=0.5), trajectory([3], -5.0, advantage=-0.5, version=4)])
    batch = pack([row], num_global_tokens=10)
    assert batch.tokens_RT.tolist() == [[7, 8, 9, 1, 2, 3]]
    assert batch.segments_RT.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch.positions_RT.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.targets_N.tolist() == [1, 2, 3]
    assert batch.sources_N.tolist() == [2, 3, 2]
    assert batch.logprobs_N.tolist() == [-1.0, -2.0, -5.0]
    assert batch.advantages_N.tolist() == [0.5, 0.5, -0.5]
    assert batch.versions_N.tolist() == [3, 3, 4]
    assert batch.reference_logprobs_N.tolist() == [0.0, 0.0, 0.0]
    assert batch.num_global_tokens == 10


def test_a_shorter_row_is_padded_and_the_sources_count_over_whole_rows():
    batch = pack([Row([7], [trajectory([1])]), Row([8, 9], [trajectory([2, 3])])], num_global_tokens=3)
    assert batch.tokens_RT.tolist() == [[7, 1, 0, 0], [8, 9, 2, 3]]
    assert batch.segments_RT.tolist() == [[0, 1, -1, -1], [0, 0, 1, 1]]
    # Row 1 begins at flat position 4: its prompt ends at 5, its first completion token is at 6.
    assert batch.sources_N.tolist() == [0, 5, 6]
    assert batch.targets_N.tolist() == [1, 2, 3]


def test_completions_share_a_row_shortest_first_up_to_its_budget():
    group = TrajectoryGroup(
        Prompt(0, [9, 9], "", ""), [trajectory([1] * 4), trajectory([2] * 2), trajectory([3] * 3), trajectory([4] * 9)]
    )
    ((batch,),) = make_microbatches([group], 1, Budget(row_tokens=7, microbatch_tokens=100))
    # 2 + 2 + 3 = 7 fits; 4 more would not; 9 exceeds the budget alone.
    rows = [row[row > 0].tolist() for row in batch.tokens_RT]
    assert rows == [[9, 9, 1, 1, 1, 1], [9, 9, 2, 2, 3, 3, 3], [9, 9, *[4] * 9]]


def test_rows_are_cut_into_microbatches_where_the_padded_size_would_pass_the_budget():
    groups = [TrajectoryGroup(Prompt(0, [9], "", ""), [trajectory([1] * length)]) for length in (1, 2, 2, 5)]
    (batches,) = make_microbatches(groups, 1, Budget(row_tokens=1, microbatch_tokens=9))
    # Rows of 2, 3, 3 and 6 tokens: three padded to 3 make 9; a fourth padded to 6 would make 24.
    assert [batch.tokens_RT.shape for batch in batches] == [(3, 3), (1, 6)]


@pytest.mark.parametrize(("num", "sizes"), [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (5, [1, 1, 1, 1, 1])])
def test_five_groups_are_split_into_consecutive_minibatches_as_even_as_possible(num: int, sizes: list[int]):
    groups = [TrajectoryGroup(Prompt(row, [1], "", "")) for row in range(5)]
    minibatches = split_minibatches(groups, num)
    assert [len(minibatch) for minibatch in minibatches] == sizes
    assert [group for minibatch in minibatches for group in minibatch] == groups


def test_the_tokens_of_a_group_are_those_of_its_valid_completions():
    group = TrajectoryGroup(Prompt(0, [1, 2], "", ""), [trajectory([1, 2, 3]), trajectory([4], invalid="nan")])
    assert group.num_tokens() == 3
