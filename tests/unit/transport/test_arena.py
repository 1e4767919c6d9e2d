import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.arena import ALIGNMENT_BYTES, Arena, Slot, slots_for
from transport.layout import Box, Layout, Shard
from transport.names import engine_layout
from transport.plan import PlanError

CPU = torch.device("cpu")
Shape = tuple[int, ...]


def shard(name: str, shape: Shape, rank: int = 0, start: int = 0, storage: str | None = None) -> Shard:
    origin = (0,) * len(shape)
    return Shard(name, Box((start, *origin[1:]), shape), rank, storage or name, origin)


def layout(shapes: dict[str, Shape], shards: list[Shard], dtype: str = "float32") -> Layout:
    return Layout(shapes, shards, {one.storage: dtype for one in shards})


def test_slots_follow_each_other_at_multiples_of_64_bytes_in_the_engines_dtype():
    shapes = {"a": (3, 5), "b": (40,), "c": (1,)}
    shards = [shard(name, shape) for name, shape in shapes.items()]
    (slots,) = slots_for(layout(shapes, shards), layout(shapes, shards, "bfloat16"))
    # a: 15 x 2 = 30 bytes -> 64; b: 40 x 2 = 80 -> 128; c from 64 + 128 on.
    assert slots == [
        Slot("a", (3, 5), "bfloat16", 0),
        Slot("b", (40,), "bfloat16", 64),
        Slot("c", (1,), "bfloat16", 192),
    ]
    assert [slot.num_bytes for slot in slots] == [30, 80, 2]


def test_each_train_rank_has_slots_for_its_own_shards():
    source = layout(
        {"w": (5, 2), "b": (1,)}, [shard("w", (3, 2), 0), shard("w", (2, 2), 1, start=3), shard("b", (1,), 0)]
    )
    destination = layout({"w": (5, 2), "b": (1,)}, [shard("w", (5, 2)), shard("b", (1,))])
    assert slots_for(source, destination) == [
        [Slot("w", (3, 2), "float32", 0), Slot("b", (1,), "float32", 64)],
        [Slot("w", (2, 2), "float32", 0)],
    ]


def test_every_engine_computes_the_same_slots():
    trainer = {"model.embed_tokens.weight": (6, 4), "l.q_proj.weight": (4, 4), "l.k_proj.weight": (2, 4)}
    source = layout(trainer, [shard(name, shape) for name, shape in trainer.items()])
    parameters = {
        "lm_head.weight": ((8, 4), "bfloat16"),
        "l.qk_proj.weight": ((6, 4), "float32"),
        "model.embed_tokens.weight": ((8, 4), "bfloat16"),
    }
    packed = {"qk_proj": ["q_proj", "k_proj"]}
    slots = [
        slots_for(source, engine_layout(order, packed, trainer, rank))
        for rank, order in enumerate((parameters, dict(reversed(parameters.items()))))
    ]
    assert slots[0] == slots[1]
    assert [slot.dtype for slot in slots[0][0]] == ["bfloat16", "float32", "float32"]


def test_a_trainer_tensor_that_the_engine_lacks_is_refused_by_name():
    source = layout({"a": (2,), "b": (2,)}, [shard("a", (2,)), shard("b", (2,))])
    with pytest.raises(PlanError, match="b: the engine has no such tensor"):
        slots_for(source, layout({"a": (2,)}, [shard("a", (2,))]))


def test_one_tensor_wanted_in_two_dtypes_is_refused_by_name():
    source = layout({"a": (2,)}, [shard("a", (2,))])
    wanted = [shard("a", (2,)), shard("a", (2,), storage="head")]
    with pytest.raises(PlanError, match="a: the engine wants it as float32 and as bfloat16"):
        slots_for(source, Layout({"a": (2,)}, wanted, {"a": "float32", "head": "bfloat16"}))


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=3), st.sampled_from(["float32", "bfloat16"])), max_size=6)
)
@settings(max_examples=50, deadline=None)
def test_views_are_aligned_and_never_overlap(tensors: list[tuple[list[int], str]]):
    shapes = {f"w{index}": tuple(sizes) for index, (sizes, _) in enumerate(tensors)}
    shards = [shard(name, shape) for name, shape in shapes.items()]
    dtypes = {f"w{index}": dtype for index, (_, dtype) in enumerate(tensors)}
    slots = slots_for(layout(shapes, shards), Layout(shapes, shards, dtypes))[0] if shards else []
    arena = Arena(slots, CPU)
    assert arena.flat.data_ptr() % mmap.PAGESIZE == 0
    assert arena.flat.numel() % mmap.PAGESIZE == 0
    assert arena.num_bytes == sum(view.nbytes for view in arena.views.values())
    for number, view in enumerate(arena.views.values(), start=1):
        assert view.data_ptr() % ALIGNMENT_BYTES == 0
        view.fill_(number)
    for number, (name, view) in enumerate(arena.views.items(), start=1):
        assert view.shape == shapes[name]
        assert view.dtype == getattr(torch, dtypes[name])
        assert (view == number).all()
    # Each view's bytes lie in the buffer: clearing it clears them all.
    arena.flat.zero_()
    assert not any(view.any() for view in arena.views.values())


def test_packing_casts_to_the_engines_dtype():
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-7, -3.14159265])
    arena = Arena([Slot("half", (4,), "bfloat16", 0), Slot("full", (4,), "float32", 64)], CPU)
    torch._foreach_copy_([arena.views["half"], arena.views["full"]], [values, values])
    # bfloat16 has 8 significant bits: 1 + 2**-8 is a tie and goes to the even 1.0; pi is 3.140625.
    assert arena.views["half"].tolist() == [1.0, 1.0, 1.0078125, -3.140625]
    torch.testing.assert_close(arena.views["full"], values, rtol=0, atol=0)


def test_the_bytes_of_one_side_mean_the_same_on_the_other():
    slots = [Slot("a", (2, 3), "bfloat16", 0), Slot("b", (5,), "float32", 64)]
    written, landed = Arena(slots, CPU), Arena(slots, CPU)
    for view in written.views.values():
        view.copy_(torch.arange(view.numel()).reshape(view.shape))
    landed.flat.copy_(written.flat)
    for name in ("a", "b"):
        assert torch.equal(landed.views[name], written.views[name])


def test_a_rank_without_shards_has_an_empty_page():
    arena = Arena([], CPU)
    assert (arena.num_bytes, arena.flat.numel(), arena.views) == (0, mmap.PAGESIZE, {})
