import copy
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from configs.schema import ModelConfig
from orchestrator.batching import Budget, Row, make_microbatches, pack
from recipes.objectives import NegativeLogLikelihood
from transport.types import Completion, Microbatch, Prompt, Trajectory, TrajectoryGroup
from workers.logprobs import BLOCK_TOKENS, token_logprobs
from workers.model import Policy, attention_mask, build_model

TEMPERATURE = 0.7
VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
FULL = ["full_attention"] * 2
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(
        **SIZES, layer_types=FULL, final_logit_softcapping=2.0, attn_logit_softcapping=None, query_pre_attn_scalar=8
    ),
}
BUDGETS = [Budget(row_tokens=1, microbatch_tokens=1), Budget(row_tokens=24, microbatch_tokens=40), Budget(99, 999)]


def build(folder: pathlib.Path, config: PreTrainedConfig, **settings: Any) -> Any:
    config.save_pretrained(folder)
    return build_model(ModelConfig(**settings), str(folder), pretrained=False, seed=0)


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Any]:
    """A policy, and its model as Hugging Face has it."""
    model = build(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]())
    plain = copy.deepcopy(model)
    return Policy(model, TEMPERATURE), plain


def make_groups() -> list[TrajectoryGroup]:
    """Three prompts with 3, 1 and 2 completions of 1 to 9 tokens; each sampled logprob is the token's number."""
    generator = np.random.default_rng(5)
    groups, number = [], 0
    for row, (prompt_length, lengths) in enumerate([(4, (3, 1, 9)), (1, (5,)), (7, (2, 6))]):
        trajectories = []
        for length in lengths:
            tokens = generator.integers(2, VOCABULARY, length).tolist()
            logprobs = [float(number + index) for index in range(length)]
            trajectories.append(Trajectory(Completion(tokens, logprobs, "stop", 0), reward=0.0))
            number += length
        prompt = generator.integers(2, VOCABULARY, prompt_length).tolist()
        groups.append(TrajectoryGroup(Prompt(row, prompt, "", ""), trajectories))
    return groups


def tensors(batch: Microbatch) -> Microbatch:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    arrays = {name: torch.from_numpy(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    return dataclasses.replace(batch, **arrays)


def microbatches(groups: list[TrajectoryGroup], budget: Budget) -> list[Microbatch]:
    (batches,) = make_microbatches(groups, 1, budget)
    return [tensors(batch) for batch in batches]


def logprobs_by_number(policy: Policy, groups: list[TrajectoryGroup], budget: Budget) -> torch.Tensor:
    """Logprobs of all tokens in the order of their numbers."""
    found: dict[int, float] = {}
    with torch.no_grad():
        for batch in microbatches(groups, budget):
            numbers = batch.logprobs_N.tolist()
            found |= {int(number): value for number, value in zip(numbers, policy(batch)[0].tolist(), strict=True)}
    assert sorted(found) == list(range(len(found)))
    return torch.tensor([found[number] for number in sorted(found)])


def alone(plain: Any, groups: list[TrajectoryGroup]) -> torch.Tensor:
    """The same by running each sequence by itself through the model's own forward."""
    values = []
    for group in groups:
        for trajectory in group.trajectories:
            targets = torch.tensor(trajectory.completion.tokens)
            sequence = torch.tensor([group.prompt.tokens + trajectory.completion.tokens])
            with torch.no_grad():
                logits = plain(input_ids=sequence).logits[0, len(group.prompt.tokens) - 1 : -1]
            values.append((logits / TEMPERATURE).log_softmax(-1)[torch.arange(len(targets)), targets])
    return torch.cat(values)


@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_rows_with_a_shared_prompt_give_what_each_sequence_gives_alone(
    models: tuple[Policy, Any], budget: Budget
):
    policy, plain = models
    groups = make_groups()
    torch.testing.assert_close(logprobs_by_number(policy, groups, budget), alone(plain, groups), rtol=0, atol=1e-5)


def test_a_completion_does_not_see_the_one_before_it_in_its_row(models: tuple[Policy, Any]):
    policy, _ = models
    before, after = make_groups()[:1], make_groups()[:1]
    for index in range(3):
        after[0].trajectories[0].completion.tokens[index] ^= 1
    whole = Budget(99, 999)
    assert [batch.tokens_RT.shape for batch in microbatches(before, whole)] == [(1, 17)]
    old, new = logprobs_by_number(policy, before, whole), logprobs_by_number(policy, after, whole)
    assert (old[:3] - new[:3]).abs().max() > 1e-2
    torch.testing.assert_close(new[3:], old[3:], rtol=0, atol=1e-6)


def test_a_token_does_not_see_those_after_it(models: tuple[Policy, Any]):
    policy, _ = models
    before, after = make_groups()[1:2], make_groups()[1:2]
    for group in before + after:
        group.trajectories[0].completion.logprobs = [0.0, 1.0, 2.0, 3.0, 4.0]
    after[0].trajectories[0].completion.tokens[4] ^= 1
    old, new = (logprobs_by_number(policy, groups, BUDGETS[0]) for groups in (before, after))
    assert (old[4] - new[4]).abs() > 1e-2
    torch.testing.assert_close(new[:4], old[:4], rtol=0, atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter(models: tuple[Policy, Any]):
    policy, _ = models
    (batch,) = microbatches(make_groups(), Budget(99, 999))
    padding = batch.segments_RT < 0
    assert padding.any()
    garbage = dataclasses.replace(
        batch,
        tokens_RT=torch.where(padding, 63, batch.tokens_RT),
        positions_RT=torch.where(padding, 41, batch.positions_RT),
    )
    with torch.no_grad():
        torch.testing.assert_close(policy(garbage)[0], policy(batch)[0], rtol=0, atol=1e-6)


def test_an_empty_microbatch_gives_no_logprob_and_a_gradient_of_zeros(models: tuple[Policy, Any]):
    policy, _ = models
    policy.zero_grad()
    logprobs_N, entropies_N = policy(tensors(pack([], num_global_tokens=7)))
    assert logprobs_N.shape == entropies_N.shape == (0,)
    logprobs_N.sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def gradients(policy: Policy, groups: list[TrajectoryGroup], budget: Budget) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    loss = NegativeLogLikelihood()
    for batch in microbatches(groups, budget):
        logprobs_N, _ = policy(batch)
        (loss(logprobs_N, batch)[0] / batch.num_global_tokens).backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None}


def test_the_gradient_does_not_depend_on_rows_and_microbatches(models: tuple[Policy, Any]):
    policy, _ = models
    one_by_one, some, at_once = (gradients(policy, make_groups(), budget) for budget in BUDGETS)
    for name, gradient in one_by_one.items():
        scale = gradient.abs().max().item()
        for other in (some, at_once):
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5 * scale)


def test_recomputing_layers_in_the_backward_pass_changes_no_gradient(tmp_path: pathlib.Path):
    kept, recomputed = (
        Policy(build(tmp_path, CONFIGS["qwen3"](), activation_checkpointing=flag), TEMPERATURE)
        for flag in (False, True)
    )
    expected, found = (gradients(policy, make_groups(), BUDGETS[1]) for policy in (kept, recomputed))
    assert recomputed.model.is_gradient_checkpointing
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_the_mask_of_a_prompt_of_two_with_completions_a_and_b_and_padding_by_hand():
    p, a, b, pad = 0, 1, 2, -1
    mask = attention_mask(torch.tensor([[p, p, a, b, b, pad]]))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_the_soft_cap_of_logits_bounds_every_logprob(tmp_path: pathlib.Path):
    policy = Policy(build(tmp_path, CONFIGS["gemma2"]()), 1.0)
    (batch,) = microbatches(make_groups(), Budget(99, 999))
    with torch.no_grad():
        logprobs_N, _ = policy(batch)
    # Logits lie in (-2, 2): a logprob is above -4 - ln 64.
    assert logprobs_N.min() > -4 - np.log(VOCABULARY)


def test_a_soft_cap_of_attention_is_kept_or_refused(tmp_path: pathlib.Path):
    config = Gemma2Config(**SIZES, layer_types=FULL, attn_logit_softcapping=0.1, query_pre_attn_scalar=1)
    try:
        model = build(tmp_path, config)
    except ValueError:
        return
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    found = logprobs_by_number(Policy(model, TEMPERATURE), make_groups(), BUDGETS[0])
    torch.testing.assert_close(found, alone(plain, make_groups()), rtol=0, atol=1e-4)


def mixed_qwen3(window: int) -> Qwen3Config:
    kinds = ["full_attention", "sliding_attention"]
    return Qwen3Config(**SIZES, layer_types=kinds, use_sliding_window=True, sliding_window=window)


@pytest.mark.parametrize(
    "config", [mixed_qwen3(8), MistralConfig(**SIZES, sliding_window=8)], ids=["by layer", "in every layer"]
)
def test_a_window_shorter_than_the_context_is_refused(tmp_path: pathlib.Path, config: PreTrainedConfig):
    with pytest.raises(ValueError, match="sliding-window attention is not supported"):
        build(tmp_path, config)


def test_a_window_as_long_as_the_context_is_full_attention(tmp_path: pathlib.Path):
    build(tmp_path, mixed_qwen3(64))


def test_weights_drawn_from_a_seed_are_the_same_on_every_rank(tmp_path: pathlib.Path):
    first, second = (build(tmp_path, CONFIGS["qwen3"]()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_policy_has_no_dropout(tmp_path: pathlib.Path):
    policy = Policy(build(tmp_path, Qwen3Config(**SIZES, attention_dropout=0.5)), TEMPERATURE)
    first, second = (logprobs_by_number(policy, make_groups(), BUDGETS[1]) for _ in range(2))
    assert torch.equal(first, second)


def random_logits(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits_NV = 3 * torch.randn(num_tokens, 11, generator=generator)
    return logits_NV.requires_grad_(), torch.randint(0, 11, (num_tokens,), generator=generator)


def reference_logprobs(logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> torch.Tensor:
    all_logprobs_NV = (logits_NV.double() / temperature).log_softmax(-1)
    return all_logprobs_NV[torch.arange(len(targets_N)), targets_N]


def test_logprobs_and_entropy_by_hand():
    # At temperature 2, logits 2 ln 3 and 0 have probabilities 3/4 and 1/4.
    logits_NV = torch.tensor([[2 * np.log(3.0), 0.0]])
    (logprob,), (entropy,) = token_logprobs(logits_NV, torch.tensor([1]), temperature=2.0)
    assert logprob.item() == pytest.approx(np.log(1 / 4), abs=1e-6)
    assert entropy.item() == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("num_tokens", [0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS + 77])
def test_logprobs_and_their_gradient_are_those_of_log_softmax(num_tokens: int, temperature: float):
    logits_NV, targets_N = random_logits(num_tokens)
    weights_N = torch.linspace(-1, 1, num_tokens)
    logprobs_N, entropies_N = token_logprobs(logits_NV, targets_N, temperature)
    expected_N = reference_logprobs(logits_NV, targets_N, temperature)
    torch.testing.assert_close(logprobs_N, expected_N.float(), rtol=1e-5, atol=1e-5)
    assert entropies_N.shape == (num_tokens,)
    assert not entropies_N.requires_grad
    (gradient,) = torch.autograd.grad((weights_N * logprobs_N).sum(), logits_NV)
    (expected,) = torch.autograd.grad((weights_N * expected_N).sum(), logits_NV)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_logprobs_of_bfloat16_logits_are_taken_in_float32():
    logits_NV, targets_N = random_logits(5)
    rounded_NV = logits_NV.detach().bfloat16()
    logprobs_N, _ = token_logprobs(rounded_NV, targets_N, 1.0)
    assert logprobs_N.dtype == torch.float32
    torch.testing.assert_close(logprobs_N, reference_logprobs(rounded_NV, targets_N, 1.0).float(), rtol=1e-5, atol=1e-5)


def test_a_row_can_hold_two_completions_that_are_equal(models: tuple[Policy, Any]):
    policy, _ = models
    same = [Trajectory(Completion([5, 6, 7], [0.0] * 3, "stop", 0)) for _ in range(2)]
    with torch.no_grad():
        logprobs_N, _ = policy(tensors(pack([Row([9, 8], same)], num_global_tokens=6)))
    torch.testing.assert_close(logprobs_N[:3], logprobs_N[3:], rtol=0, atol=1e-6)
