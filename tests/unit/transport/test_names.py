import numpy as np
import pytest

from transport.layout import Box, Layout, Shard
from transport.names import engine_layout
from transport.plan import PlanError, plan_transfer

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0."
NOBODY = -1.0
Shapes = dict[str, tuple[int, ...]]


def engine_shards(engine: Shapes, trainer: Shapes) -> Layout:
    return engine_layout({name: (shape, "bfloat16") for name, shape in engine.items()}, PACKED, trainer)


def refit(engine: Shapes, trainer: Shapes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Carry random trainer tensors over by the planned copies. Returns engine and trainer tensors."""
    generator = np.random.default_rng(0)
    sent = {name: generator.random(shape) for name, shape in trainer.items()}
    landed = {name: np.full(shape, NOBODY) for name, shape in engine.items()}
    held = [Shard(name, Box((0,) * len(shape), shape), 0, name, (0,) * len(shape)) for name, shape in trainer.items()]
    for copy in plan_transfer(Layout(trainer, held, {}), engine_shards(engine, trainer)):
        source, target = (
            tuple(slice(begin, begin + length) for begin, length in zip(start, copy.shape, strict=True))
            for start in (copy.source_start, copy.destination_start)
        )
        landed[copy.destination_storage][target] = sent[copy.source_storage][source]
    return landed, sent


def refusal(engine: Shapes, trainer: Shapes) -> str:
    with pytest.raises(PlanError) as caught:
        engine_shards(engine, trainer)
    return str(caught.value)


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
    layout = engine_shards({attention + "qkv_proj.weight": (10, 8)}, trainer)
    assert layout.shards[1] == Shard(
        attention + "k_proj.weight", Box((0, 0), (2, 8)), 0, attention + "qkv_proj.weight", (6, 0)
    )
    assert layout.shapes == trainer
    assert layout.dtypes == {attention + "qkv_proj.weight": "bfloat16"}


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
    assert refusal({LAYER + "mlp.scale": (1,)}, {}).startswith(f"{LAYER}mlp.scale: no tensor of the trainer fills")


def test_a_fused_parameter_with_a_part_missing_is_refused_by_name():
    name = LAYER + "mlp.gate_up_proj.weight"
    assert refusal({name: (10, 3)}, {LAYER + "mlp.gate_proj.weight": (5, 3)}).startswith(f"{name}: no tensor")


def test_more_rows_in_the_engine_than_in_the_trainer_are_refused_outside_the_vocabulary():
    name = "model.norm.weight"
    assert refusal({name: (8,)}, {name: (6,)}) == f"{name}: 8 rows in the engine, 6 in the trainer"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_fewer_rows_in_the_engine_than_in_the_trainer_are_refused(name: str):
    assert refusal({name: (6,)}, {name: (8,)}) == f"{name}: 6 rows in the engine, 8 in the trainer"


def test_other_columns_are_refused_by_name():
    name = LAYER + "mlp.down_proj.weight"
    assert "shape (3, 5) cannot hold" in refusal({name: (3, 5)}, {name: (3, 6)})


def test_fused_projections_with_too_many_rows_are_refused():
    attention = LAYER + "self_attn."
    trainer = {attention + f"{part}_proj.weight": (4, 8) for part in "qkv"}
    message = refusal({attention + "qkv_proj.weight": (10, 8)}, trainer)
    assert message == f"{attention}qkv_proj.weight: 10 rows in the engine, 12 in the trainer"
