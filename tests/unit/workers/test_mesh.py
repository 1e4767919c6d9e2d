import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from transport import layout
from transport.layout import Box, Layout, Placement, merge, share
from transport.plan import PlanError, plan_transfer
from workers.mesh import placement_of

Shape = tuple[int, ...]
Build = Callable[[DeviceMesh], torch.nn.Module]
"""What a rank makes on its mesh: a module whose parameters are placed by torch's own means."""


@contextlib.contextmanager
def on_rank(rank: int, sizes: Shape, names: tuple[str, ...]) -> Iterator[DeviceMesh]:
    """The mesh as this rank sees it; no other rank needs to exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(sizes))
    _clear_sharding_prop_cache()  # it remembers meshes, and those their ranks
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


@dataclass
class Held:
    """One parameter on every rank in turn: what it is said to hold, its local tensor, and torch's placements."""

    full: torch.Tensor
    said: list[Placement]
    local: list[torch.Tensor]
    placements: str = ""

    def boxes(self) -> list[Box | None]:
        return [placement.shards[0].box if placement.shards else None for placement in self.said]


def hold(sizes: Shape, names: tuple[str, ...], build: Build) -> dict[str, Held]:
    """Make the module on every rank of the mesh in turn."""
    held: dict[str, Held] = {}
    for rank in range(math.prod(sizes)):
        with on_rank(rank, sizes, names) as mesh:
            for name, parameter in build(mesh).named_parameters():
                assert isinstance(parameter, DTensor)
                one = held.setdefault(name, Held(counted(tuple(parameter.shape)), [], [], str(parameter.placements)))
                one.said.append(placement_of(name, parameter, rank))
                one.local.append(parameter.to_local().detach().clone())
    return held


def counted(shape: Shape) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


class Parameters(torch.nn.Module):
    """Parameters that count their elements, under the names of the keywords."""

    def __init__(self, **shapes: Shape) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(counted(shape)))


def linear(rows: int, columns: int) -> torch.nn.Linear:
    module = torch.nn.Linear(columns, rows)
    module.weight.data, module.bias.data = counted((rows, columns)), counted((rows,))
    return module


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, start + length) for start, length in zip(box.start, box.shape, strict=True))]


def check(held: Held, replicas: int) -> None:
    """Every rank's local tensor is exactly its box of the full one, and together they hold each element so often."""
    count = torch.zeros(held.full.shape)
    for rank, (said, local) in enumerate(zip(held.said, held.local, strict=True)):
        assert (said.shape, said.storage, said.dtype) == (tuple(held.full.shape), said.tensor, "float32")
        if not said.shards:
            assert local.numel() == 0
            continue
        (shard,) = said.shards
        assert (shard.rank, shard.offset) == (rank, (0,) * held.full.ndim)
        assert torch.equal(local, part(held.full, shard.box)), f"{held.placements}, rank {rank}: {shard.box}"
        part(count, shard.box).add_(1)
    assert (count == replicas).all()


# By hand.


def fsdp(rows: int, columns: int) -> Build:
    return lambda mesh: fully_shard(linear(rows, columns), mesh=mesh)


def test_seven_rows_over_three_ranks_are_3_3_and_1():
    held = hold((3,), ("dp",), fsdp(7, 2))
    assert held["weight"].boxes() == [Box((0, 0), (3, 2)), Box((3, 0), (3, 2)), Box((6, 0), (1, 2))]
    assert held["bias"].boxes() == [Box((0,), (3,)), Box((3,), (3,)), Box((6,), (1,))]
    for one in held.values():
        check(one, replicas=1)


def test_five_rows_over_four_ranks_leave_the_last_rank_without_any():
    # Chunks of ceil(5 / 4) = 2 rows: 2, 2, 1 and none.
    held = hold((4,), ("dp",), fsdp(5, 3))["weight"]
    assert held.boxes() == [Box((0, 0), (2, 3)), Box((2, 0), (2, 3)), Box((4, 0), (1, 3)), None]
    check(held, replicas=1)


def tensor_parallel(first: tuple[int, int], rows: int) -> Build:
    """Two linear layers, the first cut by output rows, the second by input columns, under FSDP over the other axes."""

    def build(mesh: DeviceMesh) -> torch.nn.Module:
        module = torch.nn.Sequential(linear(*first), linear(rows, first[0]))
        styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(module, mesh["tp"], styles, src_data_rank=None)
        assert mesh.mesh_dim_names is not None
        data_axes = tuple(name for name in mesh.mesh_dim_names if name != "tp")
        return fully_shard(module, mesh=mesh[data_axes])

    return build


def test_fsdp_over_a_column_parallel_layer_cuts_what_tensor_parallelism_left():
    # 8 rows, tp 2: rows 0-3 and 4-7; dp 2 cuts each in two. Ranks in order are (dp, tp) = (0,0) (0,1) (1,0) (1,1).
    held = hold((2, 2), ("dp", "tp"), tensor_parallel((8, 3), rows=4))
    assert "_StridedShard" in held["0.weight"].placements
    assert held["0.weight"].boxes() == [Box((row, 0), (2, 3)) for row in (0, 4, 2, 6)]
    assert held["0.bias"].boxes() == [Box((row,), (2,)) for row in (0, 4, 2, 6)]
    # The second layer: columns by tp, rows by dp; its bias is whole on both tp ranks.
    assert held["1.weight"].boxes() == [Box(start, (2, 4)) for start in ((0, 0), (0, 4), (2, 0), (2, 4))]
    assert held["1.bias"].boxes() == [Box((row,), (2,)) for row in (0, 0, 2, 2)]
    for name, one in held.items():
        check(one, replicas=2 if name == "1.bias" else 1)


def test_hybrid_sharding_keeps_equal_boxes_on_every_replica():
    held = hold((2, 2), ("replicate", "shard"), fsdp(4, 2))["weight"]
    assert held.boxes() == [Box((row, 0), (2, 2)) for row in (0, 2, 0, 2)]
    check(held, replicas=2)


def experts(shape: Shape, dimension: int) -> Build:
    """Experts over the axis "ep", each then cut along `dimension` by FSDP over "dp"."""

    def build(mesh: DeviceMesh) -> torch.nn.Module:
        module = Parameters(w13=shape)
        on_ep = distribute_tensor(module.w13.data, mesh["ep"], [Shard(0)], src_data_rank=None)
        module.w13 = torch.nn.Parameter(on_ep)
        return fully_shard(module, mesh=mesh["dp"], shard_placement_fn=lambda parameter: Shard(dimension))

    return build


def test_experts_are_cut_by_expert_and_then_by_fsdp():
    # 4 experts of 6 x 2 on (dp, ep) = (2, 2): two experts per ep rank, half the rows of each per dp rank.
    held = hold((2, 2), ("dp", "ep"), experts((4, 6, 2), dimension=1))["w13"]
    assert held.boxes() == [Box(start, (2, 3, 2)) for start in ((0, 0, 0), (2, 0, 0), (0, 3, 0), (2, 3, 0))]
    check(held, replicas=1)
    # Cut by expert on both axes: one expert each.
    held = hold((2, 2), ("dp", "ep"), experts((4, 6, 2), dimension=0))["w13"]
    assert held.boxes() == [Box((expert, 0, 0), (1, 6, 2)) for expert in (0, 2, 1, 3)]
    check(held, replicas=1)


def test_a_replicated_parameter_is_whole_on_every_rank():
    def build(mesh: DeviceMesh) -> torch.nn.Module:
        module = Parameters(norm=(5,))
        module.norm = torch.nn.Parameter(distribute_tensor(module.norm.data, mesh, [Replicate()], src_data_rank=None))
        return module

    held = hold((3,), ("dp",), build)["norm"]
    assert held.boxes() == [Box((0,), (5,))] * 3
    check(held, replicas=3)


def test_a_partial_sum_is_refused_by_name_and_axis():
    with on_rank(0, (2, 2), ("dp", "tp")) as mesh:
        partial = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0), Partial()])
        with pytest.raises(PlanError, match=r"^o_proj\.weight: placement P.*sum.* on mesh axis 1 is not a shard"):
            placement_of("o_proj.weight", partial, rank=0)


def test_a_local_tensor_that_is_not_its_placement_is_refused_by_name():
    with on_rank(0, (2,), ("dp",)) as mesh:
        lying = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)], shape=torch.Size((4, 2)), stride=(2, 1))
        with pytest.raises(PlanError, match=r"^w: placements .* make a shard of \(2, 2\), it is \(3, 2\)"):
            placement_of("w", lying, rank=0)


def test_the_dtype_is_that_of_the_parameter():
    with on_rank(0, (2,), ("dp",)) as mesh:
        half = distribute_tensor(torch.ones(4, dtype=torch.bfloat16), mesh, [Shard(0)], src_data_rank=None)
        assert placement_of("w", half, rank=0).dtype == "bfloat16"


# Over random meshes and shapes.


@st.composite
def trainers(draw: st.DrawFn) -> tuple[Shape, tuple[str, ...], Build, str]:
    """A mesh of at most 8 ranks and a module on it, uneven and with empty shards; and what it is called."""
    rows, columns, size = draw(st.integers(1, 9)), draw(st.integers(1, 6)), st.integers(1, 3)
    kind = draw(st.sampled_from(["fsdp", "hsdp", "tp", "hsdp tp", "experts"]))
    match kind:
        case "fsdp":
            return (draw(st.integers(1, 6)),), ("dp",), fsdp(rows, columns), kind
        case "hsdp":
            return (draw(size), draw(size)), ("replicate", "shard"), fsdp(rows, columns), kind
        case "tp":
            build = tensor_parallel((rows, columns), draw(st.integers(1, 7)))
            return (draw(size), draw(size)), ("dp", "tp"), build, kind
        case "hsdp tp":
            return (2, 2, 2), ("replicate", "shard", "tp"), tensor_parallel((rows, columns), 5), kind
        case _:
            return (draw(size), draw(size)), ("dp", "ep"), experts((rows, columns, 2), dimension=0), kind


@given(trainers())
@settings(max_examples=60, deadline=None)
def test_over_all_ranks_the_boxes_and_local_tensors_make_the_full_tensor(
    trainer: tuple[Shape, tuple[str, ...], Build, str],
):
    sizes, names, build, _ = trainer
    for name, held in hold(sizes, names, build).items():
        replicas = sizes[0] if names[0] == "replicate" else 1
        if name == "1.bias":  # of the layer that is cut by columns
            replicas *= sizes[-1]
        check(held, replicas)


@st.composite
def placed_tensors(draw: st.DrawFn) -> tuple[Shape, Shape, list[Shard | Replicate]]:
    """Any tensor of up to three dimensions, cut along any of them, even twice along one, on meshes of up to 8 ranks."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    sizes = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3)))
    dimensions = st.integers(0, len(shape) - 1)
    placement = st.one_of(dimensions.map(Shard), st.just(Replicate()))
    return shape, sizes, [draw(placement) for _ in sizes]


@given(placed_tensors())
@settings(max_examples=60, deadline=None)
def test_axes_cut_from_the_left_as_distribute_tensor_does(placed: tuple[Shape, Shape, list[Shard | Replicate]]):
    shape, sizes, placements = placed

    def build(mesh: DeviceMesh) -> torch.nn.Module:
        module = Parameters(w=shape)
        module.w = torch.nn.Parameter(distribute_tensor(module.w.data, mesh, placements, src_data_rank=None))
        return module

    held = hold(sizes, ("a", "b", "c")[: len(sizes)], build)["w"]
    replicas = math.prod(size for size, one in zip(sizes, placements, strict=True) if isinstance(one, Replicate))
    check(held, replicas)


def engine_layout(shapes: dict[str, Shape], dimensions: dict[str, int], num_ranks: int) -> Layout:
    """Each tensor cut along a dimension over the engine's ranks; whole on each where it has no such dimension."""
    placements = []
    for name, shape in shapes.items():
        dimension, shards = dimensions[name], []
        for rank in range(num_ranks):
            start, length = [0] * len(shape), list(shape)
            if dimension < len(shape):
                bounds = [shape[dimension] * one // num_ranks for one in (rank, rank + 1)]
                start[dimension], length[dimension] = bounds[0], bounds[1] - bounds[0]
            shards.append(layout.Shard(rank, Box(tuple(start), tuple(length)), (0,) * len(shape)))
        placements.append(Placement(name, shape, name, "float32", tuple(shards)))
    return placements


@given(trainers(), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_any_engine_is_filled_from_any_trainer_each_element_once(
    trainer: tuple[Shape, tuple[str, ...], Build, str], num_engine_ranks: int, data: st.DataObject
):
    sizes, names, build, _ = trainer
    held = hold(sizes, names, build)
    num_train_ranks = math.prod(sizes)
    source = merge(share([one.said[rank] for one in held.values()]) for rank in range(num_train_ranks))
    shapes = {name: tuple(one.full.shape) for name, one in held.items()}
    dimensions = {name: data.draw(st.integers(0, len(shape))) for name, shape in shapes.items()}
    destination = share(engine_layout(shapes, dimensions, num_engine_ranks))
    landed = {(p.tensor, shard.rank): torch.full(shard.box.shape, -1.0) for p in destination for shard in p.shards}
    plan = plan_transfer(source, destination)
    for train_rank, engine_rank in plan.pairs():
        for copy in plan.copies(train_rank, engine_rank):
            to = part(landed[copy.tensor, engine_rank], Box(copy.destination_start, copy.shape))
            assert (to == -1).all()  # nobody wrote there yet
            to.copy_(part(held[copy.tensor].local[train_rank], Box(copy.source_start, copy.shape)))
    for placement in destination:
        for shard in placement.shards:
            expected = part(held[placement.tensor].full, shard.box)
            assert torch.equal(landed[placement.tensor, shard.rank], expected)
