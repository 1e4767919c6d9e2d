from collections.abc import Mapping

import numpy as np
import pytest

from transport.layout import Box, Layout, Placement, Shard, merge, share
from transport.names import Cut, EngineParameter, check_complete, engine_layout
from transport.plan import PlanError, plan_transfer

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0."
NOBODY = -1.0
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, np.ndarray]
Engine = Mapping[str, EngineParameter]


def whole(shapes: Shapes) -> dict[str, EngineParameter]:
    return {name: EngineParameter(shape, "bfloat16") for name, shape in shapes.items()}


def region(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))


def random_tensors(shapes: Shapes) -> Tensors:
    generator = np.random.default_rng(0)
    return {name: generator.random(shape) for name, shape in shapes.items()}


def held_by_one(shapes: Shapes) -> Layout:
    return [
        Placement(name, shape, name, "float32", (Shard(0, Box((0,) * len(shape), shape), (0,) * len(shape)),))
        for name, shape in shapes.items()
    ]


def carry(source: Layout, tensors: Tensors, ranks: list[Engine]) -> list[Tensors]:
    """Refit engine ranks by the planned copies; each element must be written at most once. Returns what landed."""
    shapes = {placement.tensor: placement.shape for placement in source}
    destination = merge(share(engine_layout(rank, PACKED, shapes, index)) for index, rank in enumerate(ranks))
    check_complete(destination)
    held: dict[tuple[int, str], np.ndarray] = {}
    for placement in source:
        for shard in placement.shards:
            assert shard.offset == (0,) * len(shard.offset)
            held[shard.rank, placement.storage] = tensors[placement.tensor][region(shard.box.start, shard.box.shape)]
    landed = [{name: np.full(one.shape, NOBODY) for name, one in rank.items()} for rank in ranks]
    plan = plan_transfer(source, destination)
    for source_rank, destination_rank in plan.pairs():
        for copy in plan.copies(source_rank, destination_rank):
            target = landed[destination_rank][copy.destination_storage][region(copy.destination_start, copy.shape)]
            assert (target == NOBODY).all(), f"{copy} is written twice"
            target[...] = held[source_rank, copy.source_storage][region(copy.source_start, copy.shape)]
    return landed


def refit(engine: Shapes, trainer: Shapes) -> tuple[Tensors, Tensors]:
    """An engine of one rank. Returns engine and trainer tensors."""
    sent = random_tensors(trainer)
    (landed,) = carry(held_by_one(trainer), sent, [whole(engine)])
    return landed, sent


def refusal(engine: Engine, trainer: Shapes) -> str:
    with pytest.raises(PlanError) as caught:
        engine_layout(engine, PACKED, trainer)
    return str(caught.value)


# One rank: parameters are whole.


def test_a_fused_qkv_with_fewer_key_heads_holds_q_then_k_then_v():
    attention = LAYER + "self_attn."
    trainer = {
        attention + "v_proj.weight": (2, 8),
        attention + "q_proj.weight": (6, 8),
        attention + "k_proj.weight": (2, 8),
    }
    landed, sent = refit({attention + "qkv_proj.weight": (10, 8)}, trainer)
    fused = [sent[attention + f"{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(landed[attention + "qkv_proj.weight"], np.concatenate(fused))


def test_k_proj_lies_below_the_rows_of_q():
    attention = LAYER + "self_attn."
    trainer = {attention + f"{part}_proj.weight": (rows, 8) for part, rows in zip("qkv", (6, 2, 2), strict=True)}
    layout = engine_layout(whole({attention + "qkv_proj.weight": (10, 8)}), PACKED, trainer)
    assert [placement.tensor for placement in layout] == list(trainer)
    assert layout[1] == Placement(
        attention + "k_proj.weight", (2, 8), attention + "qkv_proj.weight", "bfloat16",
        (Shard(0, Box((0, 0), (2, 8)), (6, 0)),),
    )  # fmt: skip


def test_biases_of_fused_projections_are_fused_like_their_weights():
    attention = LAYER + "self_attn."
    trainer = {attention + f"{part}_proj.bias": (rows,) for part, rows in zip("qkv", (6, 2, 2), strict=True)}
    landed, sent = refit({attention + "qkv_proj.bias": (10,)}, trainer)
    np.testing.assert_array_equal(landed[attention + "qkv_proj.bias"], np.concatenate(list(sent.values())))


def test_gate_and_up_are_fused_in_this_order():
    mlp = LAYER + "mlp."
    trainer = {mlp + "up_proj.weight": (5, 3), mlp + "gate_proj.weight": (5, 3)}
    landed, sent = refit({mlp + "gate_up_proj.weight": (10, 3)}, trainer)
    fused = np.concatenate([sent[mlp + "gate_proj.weight"], sent[mlp + "up_proj.weight"]])
    np.testing.assert_array_equal(landed[mlp + "gate_up_proj.weight"], fused)


def test_a_tensor_that_both_call_the_same_is_copied_even_if_its_name_is_a_fused_one():
    name = LAYER + "self_attn.qkv_proj.weight"
    landed, sent = refit({name: (10, 8)}, {name: (10, 8)})
    np.testing.assert_array_equal(landed[name], sent[name])


def test_a_head_that_the_engine_owns_and_the_trainer_ties_gets_the_embedding():
    engine = {"model.embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4)}
    landed, sent = refit(engine, {"model.embed_tokens.weight": (6, 4)})
    for name in engine:
        np.testing.assert_array_equal(landed[name], sent["model.embed_tokens.weight"])


def test_a_head_of_its_own_is_not_taken_from_the_embedding():
    shapes = {"model.embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4)}
    landed, sent = refit(shapes, shapes)
    np.testing.assert_array_equal(landed["lm_head.weight"], sent["lm_head.weight"])


def test_rows_that_pad_the_vocabulary_are_left_alone():
    trainer = {"model.embed_tokens.weight": (6, 4)}
    landed, sent = refit({"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}, trainer)
    for array in landed.values():
        np.testing.assert_array_equal(array[:6], sent["model.embed_tokens.weight"])
        assert (array[6:] == NOBODY).all()


def test_moe_experts_lie_one_module_deeper_in_the_engine():
    experts = LAYER + "mlp.experts."
    trainer = {experts + "gate_up_proj": (4, 6, 5), experts + "down_proj": (4, 5, 3)}
    engine = {experts + "routed_experts.w13_weight": (4, 6, 5), experts + "routed_experts.w2_weight": (4, 5, 3)}
    landed, sent = refit(engine, trainer)
    np.testing.assert_array_equal(landed[experts + "routed_experts.w13_weight"], sent[experts + "gate_up_proj"])
    np.testing.assert_array_equal(landed[experts + "routed_experts.w2_weight"], sent[experts + "down_proj"])


def test_an_engine_parameter_that_nothing_fills_is_refused_by_name():
    assert refusal(whole({LAYER + "mlp.scale": (1,)}), {}).startswith(f"{LAYER}mlp.scale: no tensor of the trainer")


def test_a_fused_parameter_with_a_part_missing_is_refused_by_name():
    name = LAYER + "mlp.gate_up_proj.weight"
    assert refusal(whole({name: (10, 3)}), {LAYER + "mlp.gate_proj.weight": (5, 3)}).startswith(f"{name}: no tensor")


def test_more_rows_in_the_engine_than_in_the_trainer_are_refused_outside_the_vocabulary():
    name = "model.norm.weight"
    assert refusal(whole({name: (8,)}), {name: (6,)}) == f"{name}: 8 rows in the engine, 6 in the trainer"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_fewer_rows_in_the_engine_than_in_the_trainer_are_refused(name: str):
    assert refusal(whole({name: (6,)}), {name: (8,)}) == f"{name}: 6 rows in the engine, 8 in the trainer"


def test_other_columns_are_refused_by_name():
    name = LAYER + "mlp.down_proj.weight"
    assert "shape (3, 5) cannot hold" in refusal(whole({name: (3, 5)}), {name: (3, 6)})


def test_fused_projections_with_too_many_rows_are_refused():
    attention = LAYER + "self_attn."
    trainer = {attention + f"{part}_proj.weight": (4, 8) for part in "qkv"}
    message = refusal(whole({attention + "qkv_proj.weight": (10, 8)}), trainer)
    assert message == f"{attention}qkv_proj.weight: 10 rows in the engine, 12 in the trainer"


# Several ranks: parameters are cut.


def shards(name: str, parameter: EngineParameter, trainer: Shapes) -> dict[str, list[tuple]]:
    """Tensor -> (start, shape, offset in the engine's parameter) of each piece."""
    layout = engine_layout({name: parameter}, PACKED, trainer, rank=3)
    assert all(shard.rank == 3 for placement in layout for shard in placement.shards)
    return {
        placement.tensor.rpartition("layers.0.")[2]: [(s.box.start, s.box.shape, s.offset) for s in placement.shards]
        for placement in layout
    }


def test_a_rank_of_a_fused_qkv_has_its_heads_of_each_projection_behind_each_other():
    # 4 q heads and 2 kv heads of 3 rows, 2 ranks: rank 1 has q rows 6..11 and rows 3..5 of k and of v.
    attention = LAYER + "self_attn."
    trainer = {attention + f"{part}_proj.weight": (rows, 8) for part, rows in zip("qkv", (12, 6, 6), strict=True)}
    parameter = EngineParameter((12, 8), "bfloat16", (Cut(0, 6, 6, 12), Cut(0, 3, 3, 6), Cut(0, 3, 3, 6)))
    assert shards(attention + "qkv_proj.weight", parameter, trainer) == {
        "self_attn.q_proj.weight": [((6, 0), (6, 8), (0, 0))],
        "self_attn.k_proj.weight": [((3, 0), (3, 8), (6, 0))],
        "self_attn.v_proj.weight": [((3, 0), (3, 8), (9, 0))],
    }


def test_two_ranks_that_share_a_kv_head_both_get_it():
    # 4 q heads and 1 kv head of 2 rows, 2 ranks.
    attention = LAYER + "self_attn."
    trainer = {attention + f"{part}_proj.weight": (rows, 3) for part, rows in zip("qkv", (8, 2, 2), strict=True)}
    kv = Cut(0, 0, 2, 2)
    ranks = [
        {attention + "qkv_proj.weight": EngineParameter((8, 3), "bfloat16", (Cut(0, rank * 4, 4, 8), kv, kv))}
        for rank in range(2)
    ]
    sent = random_tensors(trainer)
    landed = carry(held_by_one(trainer), sent, ranks)
    q, k, v = (sent[attention + f"{part}_proj.weight"] for part in "qkv")
    for rank in range(2):
        expected = np.concatenate([q[rank * 4 : rank * 4 + 4], k, v])
        np.testing.assert_array_equal(landed[rank][attention + "qkv_proj.weight"], expected)


def test_a_fused_tensor_that_the_trainer_keeps_fused_is_cut_section_by_section():
    # gate rows 0..5 and up rows 6..11 in one trainer tensor; rank 1 of 3 has rows 2..3 and 8..9.
    name = LAYER + "mlp.gate_up_proj.weight"
    parameter = EngineParameter((4, 5), "bfloat16", (Cut(0, 2, 2, 6), Cut(0, 2, 2, 6)))
    assert shards(name, parameter, {name: (12, 5)}) == {
        "mlp.gate_up_proj.weight": [((2, 0), (2, 5), (0, 0)), ((8, 0), (2, 5), (2, 0))]
    }


def test_a_row_parallel_rank_has_its_columns():
    name = LAYER + "mlp.down_proj.weight"
    parameter = EngineParameter((5, 4), "bfloat16", (Cut(1, 4, 4, 8),))
    assert shards(name, parameter, {name: (5, 8)}) == {"mlp.down_proj.weight": [((0, 4), (5, 4), (0, 0))]}


def test_experts_cut_by_tensor_parallelism_have_a_slice_of_gate_and_one_of_up():
    # 4 experts of intermediate size 6 and hidden size 5; rank 1 of 2: gate rows 3..5 and up rows 9..11 of each.
    experts = LAYER + "mlp.experts."
    trainer = {experts + "gate_up_proj": (4, 12, 5), experts + "down_proj": (4, 5, 6)}
    w13 = EngineParameter((4, 6, 5), "bfloat16", (Cut(1, 3, 3, 6), Cut(1, 3, 3, 6)))
    assert shards(experts + "routed_experts.w13_weight", w13, trainer) == {
        "mlp.experts.gate_up_proj": [((0, 3, 0), (4, 3, 5), (0, 0, 0)), ((0, 9, 0), (4, 3, 5), (0, 3, 0))]
    }
    w2 = EngineParameter((4, 5, 3), "bfloat16", (Cut(2, 3, 3, 6),))
    assert shards(experts + "routed_experts.w2_weight", w2, trainer) == {
        "mlp.experts.down_proj": [((0, 0, 3), (4, 5, 3), (0, 0, 0))]
    }


def test_experts_cut_by_expert_parallelism_are_a_range_of_them_and_whole():
    # 5 experts on 2 ranks: three and two.
    experts = LAYER + "mlp.experts."
    trainer = {experts + "gate_up_proj": (5, 12, 4)}
    w13 = EngineParameter((2, 12, 4), "bfloat16", (Cut(0, 3, 2, 5), Cut(1, 0, 6, 6), Cut(1, 0, 6, 6)))
    assert shards(experts + "routed_experts.w13_weight", w13, trainer) == {
        "mlp.experts.gate_up_proj": [((3, 0, 0), (2, 6, 4), (0, 0, 0)), ((3, 6, 0), (2, 6, 4), (0, 6, 0))]
    }


def test_a_rank_at_the_end_of_a_padded_vocabulary_has_fewer_real_rows():
    # 100 tokens padded to 128: ranks of 64 rows have 64 and 36 real ones.
    name = "model.embed_tokens.weight"
    trainer = {name: (100, 4)}
    ranks = [
        {"lm_head.weight": EngineParameter((64, 4), "bfloat16", (Cut(0, start, num, 100),), padding=64 - num)}
        for start, num in ((0, 64), (64, 36))
    ]
    sent = random_tensors(trainer)
    first, last = carry(held_by_one(trainer), sent, ranks)
    np.testing.assert_array_equal(first["lm_head.weight"], sent[name][:64])
    np.testing.assert_array_equal(last["lm_head.weight"][:36], sent[name][64:])
    assert (last["lm_head.weight"][36:] == NOBODY).all()


def test_a_rank_with_nothing_but_padding_gets_nothing():
    # 60 tokens padded to 128: the second rank of 64 rows has none of them.
    name = "model.embed_tokens.weight"
    ranks = [
        {name: EngineParameter((64, 4), "bfloat16", (Cut(0, start, num, 60),), padding=64 - num)}
        for start, num in ((0, 60), (60, 0))
    ]
    first, last = carry(held_by_one({name: (60, 4)}), random_tensors({name: (60, 4)}), ranks)
    assert (first[name][:60] != NOBODY).all()
    assert (last[name] == NOBODY).all()


def test_what_the_engine_says_it_cannot_cut_is_refused_by_name_and_reason():
    parameter = EngineParameter((8, 4), "uint8", refusal="a refit cannot cut weights of Fp8LinearMethod over ranks")
    message = refusal({LAYER + "mlp.down_proj.weight": parameter}, {LAYER + "mlp.down_proj.weight": (8, 4)})
    assert message == f"{LAYER}mlp.down_proj.weight: a refit cannot cut weights of Fp8LinearMethod over ranks"


def test_parts_that_do_not_tile_a_ranks_parameter_are_refused():
    name = LAYER + "mlp.down_proj.weight"
    parameter = EngineParameter((5, 6), "bfloat16", (Cut(1, 4, 4, 8),))  # padded to 6 columns
    assert refusal({name: parameter}, {name: (5, 8)}) == (
        f"{name}: its parts cover 4 of the 6 indices of dimension 1"
    )  # fmt: skip


def test_a_cut_of_another_tensor_than_the_trainers_is_refused():
    name = LAYER + "mlp.down_proj.weight"
    parameter = EngineParameter((5, 4), "bfloat16", (Cut(1, 4, 4, 8),))
    assert refusal({name: parameter}, {name: (5, 9)}) == (
        f"{name}: it is cut from a tensor of shape (5, 8), {name} has shape (5, 9)"
    )
    # A dimension that is not cut must be the trainer's, or it would be a transposed layout.
    assert "cut from a tensor of shape (5, 8)" in refusal({name: parameter}, {name: (8, 5)})


def test_more_sections_than_tensors_are_refused():
    name = LAYER + "self_attn.qkv_proj.weight"
    trainer = {LAYER + f"self_attn.{part}_proj.weight": (4, 8) for part in "qkv"}
    parameter = EngineParameter((4, 8), "bfloat16", (Cut(0, 0, 2, 4), Cut(0, 0, 2, 4)))
    assert refusal({name: parameter}, trainer) == f"{name}: 2 sections in the engine, 3 tensors in the trainer"


def test_a_cut_beyond_its_whole_is_refused():
    name = LAYER + "mlp.down_proj.weight"
    assert "is not within its whole" in refusal(
        {name: EngineParameter((5, 4), "bfloat16", (Cut(1, 6, 4, 8),))}, {name: (5, 8)}
    )


def test_rows_that_no_rank_holds_are_refused_by_name():
    # Both ranks say that they are the first of two.
    name = LAYER + "mlp.down_proj.weight"
    rank = {name: EngineParameter((5, 4), "bfloat16", (Cut(1, 0, 4, 8),))}
    with pytest.raises(PlanError, match=rf"^{name}: no engine rank holds {name} from index \(0, 4\) on, 20 elements"):
        carry(held_by_one({name: (5, 8)}), random_tensors({name: (5, 8)}), [rank, rank])
