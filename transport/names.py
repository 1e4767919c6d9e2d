"""Trainer names <-> engine names: how an engine's fused parameters are made of the trainer's tensors.

Both follow Hugging Face names; an engine fuses some along dimension 0 (q, k, v -> qkv_proj), nests MoE experts one
module deeper, pads the vocabulary, and may own a tied head as a tensor of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transport.layout import Box, Layout, Placement, Shard
from transport.plan import PlanError

EXPERTS = {".mlp.experts.routed_experts.w13_weight": ".mlp.experts.gate_up_proj",
           ".mlp.experts.routed_experts.w2_weight": ".mlp.experts.down_proj"}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's share of one tensor: `length` indices of `dimension` from `start` on."""

    dimension: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class EngineParameter:
    """A parameter of one engine rank. `cuts` has one Cut for each tensor that it is made of; empty: they are whole."""

    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[Cut, ...] = ()


def engine_layout(
    parameters: Mapping[str, EngineParameter],
    packed: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int = 0,
) -> Layout:
    """The layout of an engine rank in the trainer's names.

    Args:
        parameters: the engine rank's parameters, in its order.
        packed: vLLM's `packed_modules_mapping`, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        shapes: trainer tensor -> global shape.
        rank: what the rank is called in the layout.

    Raises:
        PlanError: naming the engine parameter that no trainer tensor fills.
    """
    layout = []
    for storage, parameter in parameters.items():
        row = 0
        for tensor in _parts(storage, packed, shapes):
            part = shapes[tensor]
            if part[1:] != parameter.shape[1:]:
                raise PlanError(f"{storage}: shape {parameter.shape} cannot hold {tensor} of shape {part}")
            shard = Shard(rank, Box((0,) * len(part), part), (row,) + (0,) * (len(part) - 1))
            layout.append(Placement(tensor, part, storage, parameter.dtype, (shard,)))
            row += part[0]
        num_rows = parameter.shape[0]
        if row != num_rows and not (storage in (HEAD, EMBEDDING) and row < num_rows):
            raise PlanError(f"{storage}: {num_rows} rows in the engine, {row} in the trainer")
    return layout


def _parts(storage: str, packed: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The trainer's tensors that make one engine parameter, in the order of their rows."""
    for ending, name in EXPERTS.items():
        if storage.endswith(ending) and storage.removesuffix(ending) + name in shapes:
            yield storage.removesuffix(ending) + name
            return
    if storage in shapes:
        yield storage
        return
    if storage == HEAD and EMBEDDING in shapes:
        yield EMBEDDING
        return
    module, _, kind = storage.rpartition(".")
    parent, _, fused = module.rpartition(".")
    tensors = [f"{parent}.{part}.{kind}" for part in packed.get(fused, [])]
    if not tensors or any(tensor not in shapes for tensor in tensors):
        raise PlanError(
            f"{storage}: no tensor of the trainer fills this engine parameter; a refit supports unquantised models "
            "whose engine keeps Hugging Face names, fused along dimension 0"
        )
    yield from tensors
