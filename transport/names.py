"""Trainer names <-> engine names: how an engine rank's parameters are made of the trainer's tensors.

Both follow Hugging Face names; an engine fuses some along dimension 0 (q, k, v -> qkv_proj), nests MoE experts one
module deeper, pads the vocabulary, may own a tied head as a tensor of its own, and cuts nearly everything over its
tensor-parallel ranks. The engine says what a rank holds as Cuts; the layout says it in the trainer's tensors.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transport.layout import Box, Layout, Placement, Shard
from transport.plan import PlanError

EXPERTS = {".mlp.experts.routed_experts.w13_weight": ".mlp.experts.gate_up_proj",
           ".mlp.experts.routed_experts.w2_weight": ".mlp.experts.down_proj"}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's share of one section of a parameter: of its `whole` indices of `dimension`, `length` from `start` on."""

    dimension: int
    start: int
    length: int
    whole: int


@dataclass(frozen=True, slots=True)
class EngineParameter:
    """A parameter of one engine rank, and which part of the model it is.

    Cuts of one dimension are sections that lie behind each other in it; cuts of several dimensions hold together; a
    dimension without a cut is whole. Rank 1 of 2 has of 8 q heads and 2 kv heads, 16 rows each:

        EngineParameter((96, 256), "bfloat16", (Cut(0, 64, 64, 128), Cut(0, 16, 16, 32), Cut(0, 16, 16, 32)))
    """

    shape: Shape
    dtype: str
    cuts: tuple[Cut, ...] = ()
    padding: int = 0
    """Rows at the end that nothing fills: the padding of a vocabulary that is cut."""
    refusal: str = ""
    """Why a refit cannot fill this parameter."""


@dataclass(frozen=True, slots=True)
class Block:
    """`length` indices of one dimension: from `start` on in the trainer's tensor, from `offset` on in the engine's."""

    start: int
    length: int
    offset: int


def engine_layout(
    parameters: Mapping[str, EngineParameter],
    packed: Mapping[str, list[str]],
    shapes: Mapping[str, Shape],
    rank: int = 0,
) -> Layout:
    """The layout of an engine rank in the trainer's names.

    Args:
        parameters: the engine rank's parameters, in its order.
        packed: vLLM's `packed_modules_mapping`, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        shapes: trainer tensor -> global shape.
        rank: what the rank is called in the layout.

    Raises:
        PlanError: naming the engine parameter that the trainer's tensors do not fill exactly.
    """
    layout = []
    for storage, parameter in parameters.items():
        if parameter.refusal:
            raise PlanError(f"{storage}: {parameter.refusal}")
        tensors = list(_parts(storage, packed, shapes))
        blocks = _cut_blocks if parameter.cuts else _whole_blocks
        for tensor, dimensions in zip(tensors, blocks(storage, parameter, tensors, shapes), strict=True):
            shards = tuple(_shard(rank, combination) for combination in itertools.product(*dimensions))
            filled = tuple(shard for shard in shards if shard.box.size > 0)
            layout.append(Placement(tensor, shapes[tensor], storage, parameter.dtype, filled))
    return layout


def _shard(rank: int, dimensions: Sequence[Block]) -> Shard:
    box = Box(tuple(block.start for block in dimensions), tuple(block.length for block in dimensions))
    return Shard(rank, box, tuple(block.offset for block in dimensions))


def _whole_blocks(
    storage: str, parameter: EngineParameter, tensors: Sequence[str], shapes: Mapping[str, Shape]
) -> Iterator[list[list[Block]]]:
    """For each tensor its blocks by dimension: they are whole and follow each other along dimension 0."""
    row = 0
    for tensor in tensors:
        part = shapes[tensor]
        if part[1:] != parameter.shape[1:]:
            raise PlanError(f"{storage}: shape {parameter.shape} cannot hold {tensor} of shape {part}")
        yield [[Block(0, length, row if dimension == 0 else 0)] for dimension, length in enumerate(part)]
        row += part[0]
    num_rows = parameter.shape[0]
    if row != num_rows and not (storage in (HEAD, EMBEDDING) and row < num_rows):
        raise PlanError(f"{storage}: {num_rows} rows in the engine, {row} in the trainer")


def _cut_blocks(
    storage: str, parameter: EngineParameter, tensors: Sequence[str], shapes: Mapping[str, Shape]
) -> Iterator[list[list[Block]]]:
    """For each tensor its blocks by dimension. Several tensors have a section of dimension 0 each; of a tensor that
    the trainer keeps fused, as of the experts' gate and up rows, every section is a block of its own."""
    sections: list[list[Cut]] = [[] for _ in parameter.shape]
    for cut in parameter.cuts:
        if not 0 <= cut.start <= cut.start + cut.length <= cut.whole:
            raise PlanError(f"{storage}: {cut} is not within its whole")
        sections[cut.dimension].append(cut)
    _check_extents(storage, parameter, sections)
    if len(tensors) > 1 and len(sections[0]) != len(tensors):
        raise PlanError(f"{storage}: {len(sections[0])} sections in the engine, {len(tensors)} tensors in the trainer")
    for index, tensor in enumerate(tensors):
        offset = 0 if len(tensors) == 1 else sum(cut.length for cut in sections[0][:index])
        own = [sections[0] if len(tensors) == 1 else [sections[0][index]], *sections[1:]]
        part = shapes[tensor]
        wanted = tuple(
            sum(cut.whole for cut in cuts) if cuts else length
            for cuts, length in zip(own, parameter.shape, strict=True)
        )
        if part != wanted:
            raise PlanError(f"{storage}: it is cut from a tensor of shape {wanted}, {tensor} has shape {part}")
        yield [
            _blocks(cuts, offset if dimension == 0 else 0) if cuts else [Block(0, part[dimension], 0)]
            for dimension, cuts in enumerate(own)
        ]


def _check_extents(storage: str, parameter: EngineParameter, sections: Sequence[Sequence[Cut]]) -> None:
    """The sections must tile the rank's parameter, but for the padding."""
    for dimension, cuts in enumerate(sections):
        covered = sum(cut.length for cut in cuts) + (parameter.padding if dimension == 0 else 0)
        if cuts and covered != parameter.shape[dimension]:
            raise PlanError(
                f"{storage}: its parts cover {covered} of the {parameter.shape[dimension]} indices of dimension "
                f"{dimension}"
            )


def _blocks(cuts: Sequence[Cut], offset: int) -> list[Block]:
    """Sections of one tensor, behind each other on both sides."""
    blocks, start = [], 0
    for cut in cuts:
        blocks.append(Block(start + cut.start, cut.length, offset))
        start, offset = start + cut.whole, offset + cut.length
    return blocks


def check_complete(wanted: Layout) -> None:
    """Engine ranks together must hold every element of a tensor, or a refit would lose some.

    Args:
        wanted: the merged layout of all engine ranks.

    Raises:
        PlanError: naming the engine parameter.
    """
    known: set[tuple[int, Shape]] = set()
    for placement in wanted:
        if (id(placement.shards), placement.shape) in known:
            continue
        known.add((id(placement.shards), placement.shape))
        missing = [Box((0,) * len(placement.shape), placement.shape)]
        for box in dict.fromkeys(shard.box for shard in placement.shards):
            common = [(one, one.intersect(box)) for one in missing]
            missing = [rest for one, both in common for rest in (one.subtract(both) if both else [one])]
        if missing and missing[0].size > 0:
            raise PlanError(
                f"{placement.storage}: no engine rank holds {placement.tensor} from index {missing[0].start} on, "
                f"{sum(box.size for box in missing)} elements in all"
            )


def _parts(storage: str, packed: Mapping[str, list[str]], shapes: Mapping[str, Shape]) -> Iterator[str]:
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
