import re
from dataclasses import replace
from typing import get_args

import pytest

from configs.schema import TransportConfig
from orchestrator.channels import Channel, make_transport, plan_channels
from transport.auto import Reach, Site
from transport.layout import Box, Layout, Placement, Shard
from transport.names import Cut, EngineParameter
from transport.plan import PlanError
from workers.rollout import EngineRank

SITE = Site("host", "cpu", 1, 0, b"", None)
HERE = Reach("cpu", same_host=True, can_share=True, can_read=True, host="host")
UNSHARED = Reach("cpu", same_host=True, can_share=False, can_read=True, why_not_shared="no memfd", host="host")
FAR = Reach("cpu", same_host=False, can_share=False, can_read=False, why_not_shared="other host", host="far")
PACKED = {"qkv": ["q", "k", "v"]}


def trainer(num_ranks: int = 2, **rows: int) -> Layout:
    """Matrices of 4 columns, their rows over all ranks alike; a single row is on rank 0."""
    layout = []
    for name, num in (rows or {"q": 8, "k": 4, "v": 4, "norm": 1}).items():
        each = max(num // num_ranks, 1)
        shards = tuple(
            Shard(rank, Box((rank * each, 0), (each, 4)), (0, 0)) for rank in range(num_ranks) if rank * each < num
        )
        layout.append(Placement(f"m.{name}.weight", (num, 4), f"m.{name}.weight", "float32", shards))
    return layout


def engine(dtype: str = "bfloat16", reach: Reach = HERE) -> EngineRank:
    parameters = {"m.qkv.weight": EngineParameter((16, 4), dtype), "m.norm.weight": EngineParameter((1, 4), dtype)}
    return EngineRank(parameters, PACKED, reach)


def engine_half(rank: int) -> EngineRank:
    """Rank 0 or 1 of a tensor-parallel engine: half the rows of q, k and v, all of the norm."""
    cuts = tuple(Cut(0, rank * whole // 2, whole // 2, whole) for whole in (8, 4, 4))
    parameters = {
        "m.qkv.weight": EngineParameter((8, 4), "bfloat16", cuts),
        "m.norm.weight": EngineParameter((1, 4), "bfloat16"),
    }
    return EngineRank(parameters, PACKED, HERE)


def channels(
    ranks: list[EngineRank], kind: str = "auto", source: Layout | None = None, num_sites: int = 2
) -> list[Channel]:
    config = TransportConfig.model_validate({"type": kind})
    return plan_channels(source or trainer(), [SITE] * num_sites, ranks, config, timeout_s=7.0)


def pieces(channel: Channel) -> dict[int, list[tuple[str, int, int]]]:
    """Train rank -> (tensor, its first row in the engine's parameter, number of rows), in order."""
    return {
        rank: [(p.copy.tensor, p.copy.destination_start[0], p.copy.shape[0]) for p in outlet.region.pieces]
        for rank, outlet in channel.outlets.items()
    }


def test_equal_engine_ranks_share_one_channel():
    (channel,) = channels([engine(), engine(), engine()])
    assert channel.engine_ranks == [0, 1, 2]
    assert channel.inlet.link.receiver_ranks == (0, 1, 2)
    # q lies in rows 0-7 of qkv, k in 8-11, v in 12-15: each train rank sends half of each, rank 0 the norm.
    assert pieces(channel) == {
        0: [("m.q.weight", 0, 4), ("m.k.weight", 8, 2), ("m.v.weight", 12, 2), ("m.norm.weight", 0, 1)],
        1: [("m.q.weight", 4, 4), ("m.k.weight", 10, 2), ("m.v.weight", 14, 2)],
    }


def test_the_ranks_of_two_engines_with_two_ranks_make_two_channels():
    found = channels([engine_half(0), engine_half(1), engine_half(0), engine_half(1)])
    assert [channel.engine_ranks for channel in found] == [[0, 2], [1, 3]]
    # Train rank 0 has just what engine rank 0 wants, but for the norm, which both want and only it has.
    assert pieces(found[0]) == {
        0: [("m.q.weight", 0, 4), ("m.k.weight", 4, 2), ("m.v.weight", 6, 2), ("m.norm.weight", 0, 1)]
    }
    assert pieces(found[1]) == {
        0: [("m.norm.weight", 0, 1)],
        1: [("m.q.weight", 0, 4), ("m.k.weight", 4, 2), ("m.v.weight", 6, 2)],
    }


def test_two_engines_of_different_dtypes_have_a_channel_each_in_their_own():
    found = channels([engine("bfloat16"), engine("float32"), engine("bfloat16")])
    assert [channel.engine_ranks for channel in found] == [[0, 2], [1]]
    for channel, dtype, num_bytes in zip(found, ("bfloat16", "float32"), (2, 4), strict=True):
        regions = [outlet.region for outlet in channel.outlets.values()]
        assert {piece.copy.dtype for region in regions for piece in region.pieces} == {dtype}
        assert sum(region.payload_bytes for region in regions) == (16 + 1) * 4 * num_bytes


def test_the_same_parameters_in_another_order_are_another_destination():
    turned = engine()
    turned = replace(turned, parameters=dict(reversed(turned.parameters.items())))
    assert [channel.engine_ranks for channel in channels([engine(), turned])] == [[0], [1]]


def test_equal_engine_ranks_that_different_transports_reach_are_apart():
    found = channels([engine(), engine(reach=UNSHARED), engine(), engine(reach=FAR)])
    assert [(channel.choice.type, channel.choice.reason, channel.engine_ranks) for channel in found] == [
        ("shared_memory", "", [0, 2]),
        ("nixl", "no memfd", [1]),
        ("nixl", "", [3]),
    ]


@pytest.mark.parametrize("kind", ["nixl", "collective", "object_store"])
def test_a_transport_asked_for_by_name_makes_one_channel_however_far_the_engines_are(kind: str):
    (channel,) = channels([engine(), engine(reach=FAR)], kind)
    assert (channel.choice.type, channel.choice.reason, channel.engine_ranks) == (kind, "", [0, 1])


def test_a_train_rank_that_sends_nothing_is_no_part_of_a_channel():
    (channel,) = channels([engine()], source=trainer(1), num_sites=3)
    assert channel.outlets.keys() == {0}
    assert channel.inlet.link.source_ranks == (0,)


def test_replicas_of_the_trainer_share_what_two_channels_ask_for():
    # Both train ranks hold everything, 17 rows of 4; two channels ask for all of it: neither rank sends more than half.
    whole = [replace(p, shards=tuple(Shard(rank, Box((0, 0), p.shape), (0, 0)) for rank in (0, 1))) for p in trainer(1)]
    found = channels([engine("bfloat16"), engine("float32")], source=whole)
    rows = {rank: sum(num for c in found for _, _, num in pieces(c).get(rank, [])) for rank in (0, 1)}
    assert rows == {0: 17, 1: 17}


def test_both_ends_of_a_channel_are_given_the_same_link_and_regions():
    for channel in channels([engine_half(0), engine_half(1)], "object_store"):
        assert channel.inlet.link.timeout_s == 7.0
        assert channel.inlet.link.source_ranks == tuple(sorted(channel.outlets))
        for rank, outlet in channel.outlets.items():
            assert outlet.link is channel.inlet.link
            assert outlet.region is channel.inlet.regions[rank]
            assert outlet.transport is channel.inlet.transport


def test_an_engine_rank_is_told_which_of_the_receivers_it_is():
    (channel,) = channels([engine(), engine()])
    assert [channel.inlet_of(rank).link.receiver_rank for rank in (0, 1)] == [0, 1]
    assert channel.inlet.link.receiver_rank == -1
    assert channel.inlet_of(1).regions is channel.inlet.regions


def test_names_are_fit_for_files_and_no_two_channels_have_the_same():
    names = [channel.name for _ in range(2) for channel in channels([engine("bfloat16"), engine("float32")])]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    (channel,) = channels([engine()])
    assert channel.name == channel.inlet.link.name


def test_every_transport_that_can_be_configured_can_be_made_and_says_whether_its_sides_meet():
    kinds = [kind for kind in get_args(TransportConfig.model_fields["type"].annotation) if kind != "auto"]
    made = {kind: make_transport(kind) for kind in kinds}
    assert {kind for kind, transport in made.items() if not transport.one_sided} == {"collective", "stream"}
    with pytest.raises(AssertionError, match="carrier_pigeon"):
        make_transport("carrier_pigeon")
    for kind in kinds:
        (channel,) = channels([engine()], kind)
        assert channel.one_sided == made[kind].one_sided
        assert type(channel.inlet.transport) is type(made[kind])


def test_processes_that_work_on_one_host_at_the_same_time_are_counted():
    # Two train ranks and two engine ranks on "host", one engine rank elsewhere.
    ranks = [engine(), engine(), engine(reach=replace(FAR, host="far"))]
    for kind, here, far in (("nixl", 2, 1), ("collective", 4, 1)):
        (channel,) = channels(ranks, kind)
        # One-sided: train ranks publish while no engine stages, and the reverse.
        assert [outlet.num_neighbours for outlet in channel.outlets.values()] == [here, here]
        assert channel.inlet.num_neighbours == here
        (alone,) = channels([ranks[2]], kind)
        assert alone.inlet.num_neighbours == far


def test_an_engine_parameter_without_a_source_is_refused_by_name():
    other = engine()
    other.parameters["bias"] = EngineParameter((4,), "bfloat16")
    with pytest.raises(PlanError, match=r"^bias: no tensor of the trainer fills this engine parameter"):
        channels([engine(), other])


def test_a_trainers_tensor_that_no_engine_has_is_refused_by_name():
    source = trainer(2, q=8, k=4, v=4, norm=1, gate=8)
    with pytest.raises(PlanError, match=r"^m\.gate\.weight: the engine has no such tensor, so a refit would lose it$"):
        channels([engine()], source=source)


def test_half_an_engine_is_refused_by_name():
    with pytest.raises(
        PlanError, match=r"^m\.qkv\.weight: no engine rank holds m\.q\.weight from index \(0, 0\) on, 16 "
    ):
        channels([engine_half(1), engine_half(1)])


def test_a_transport_that_does_not_reach_one_of_the_engines_is_refused():
    with pytest.raises(ValueError, match=r"^transport\.type=shared_memory: no memfd; use nixl, object_store or auto$"):
        channels([engine(), engine(reach=UNSHARED)], "shared_memory")


def test_equal_engines_do_not_make_a_trainer_write_twice():
    one, eight = (channels([engine()] * num)[0].outlets for num in (1, 8))
    assert {rank: outlet.region for rank, outlet in one.items()} == {rank: o.region for rank, o in eight.items()}
