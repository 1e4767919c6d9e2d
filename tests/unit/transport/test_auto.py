import os
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.transport.children import Child, child
from transport.auto import Choice, Probe, Reach, Site, choose, reach
from transport.host import host_identity

WHY = "no anonymous shared memory: [Errno 38]"
ELSEWHERE = "trainer and engine are on different hosts"
PTRACE = "; and no ptrace permission, which NIXL needs on one host"

a_child = pytest.fixture(child)
another_child = pytest.fixture(child)


def site(device: str = "cpu") -> Site:
    return Site("host", device, 1, 0, b"", None)


HERE = Reach("cpu", same_host=True, can_share=True, can_read=True)
NOT_SHARED = Reach("cpu", same_host=True, can_share=False, can_read=True, why_not_shared=WHY)
CUT_OFF = Reach("cpu", same_host=True, can_share=False, can_read=False, why_not_shared=WHY)
NO_PTRACE = Reach("cpu", same_host=True, can_share=True, can_read=False)
FAR = Reach("cpu", same_host=False, can_share=False, can_read=False, why_not_shared=ELSEWHERE)
GPU = Reach("cuda", same_host=True, can_share=True, can_read=True)
FAR_GPU = replace(FAR, device="cuda")


@pytest.mark.parametrize(
    ("engine", "device", "expected"),
    [
        (HERE, "cpu", Choice("shared_memory")),
        (NO_PTRACE, "cpu", Choice("shared_memory")),
        (NOT_SHARED, "cpu", Choice("nixl", WHY)),
        (CUT_OFF, "cpu", Choice("object_store", WHY + PTRACE)),
        (FAR, "cpu", Choice("nixl")),
        (GPU, "cuda", Choice("nixl")),
        (FAR_GPU, "cuda", Choice("nixl")),
        (HERE, "cuda", Choice("nixl")),
        (GPU, "cpu", Choice("nixl")),
    ],
)
def test_auto_takes_the_fastest_within_reach_and_says_what_was_lost(engine: Reach, device: str, expected: Choice):
    assert choose("auto", [site(device)], engine) == expected


@pytest.mark.parametrize(
    ("wanted", "engine", "device"),
    [
        ("shared_memory", HERE, "cpu"),
        ("shared_memory", NO_PTRACE, "cpu"),
        ("stream", HERE, "cpu"),
        ("stream", GPU, "cuda"),
        ("stream", replace(GPU, can_share=False, why_not_shared=WHY), "cuda"),  # CUDA hands its memory over otherwise
        *[
            (kind, engine, device)
            for kind in ("nixl", "collective", "object_store")
            for engine, device in ((HERE, "cpu"), (CUT_OFF, "cpu"), (FAR, "cpu"), (GPU, "cuda"), (FAR_GPU, "cuda"))
        ],
    ],
)
def test_a_transport_that_was_asked_for_by_name_is_taken_where_it_can_work(wanted: str, engine: Reach, device: str):
    assert choose(wanted, [site(device)], engine) == Choice(wanted)


@pytest.mark.parametrize(
    ("wanted", "engine", "device", "message"),
    [
        ("shared_memory", NOT_SHARED, "cpu", f"transport.type=shared_memory: {WHY}; use nixl, object_store or auto"),
        ("shared_memory", FAR, "cpu", f"transport.type=shared_memory: {ELSEWHERE}; use nixl, object_store or auto"),
        ("shared_memory", GPU, "cuda", "transport.type=shared_memory needs the CPU: on CUDA use nixl, or stream"),
        ("shared_memory", HERE, "cuda", "transport.type=shared_memory needs the CPU"),
        ("shared_memory", GPU, "cpu", "transport.type=shared_memory needs the CPU"),
        ("stream", NOT_SHARED, "cpu", f"transport.type=stream: {WHY}; use nixl"),
        ("stream", FAR, "cpu", f"transport.type=stream: {ELSEWHERE}; use nixl"),
        ("stream", FAR_GPU, "cuda", f"transport.type=stream: {ELSEWHERE}; use nixl"),
    ],
)
def test_a_transport_that_cannot_work_is_refused_with_the_obstacle_and_a_way_out(
    wanted: str, engine: Reach, device: str, message: str
):
    with pytest.raises(ValueError, match=r"^transport") as caught:
        choose(wanted, [site(device)], engine)
    assert str(caught.value).startswith(message)


def test_one_train_rank_on_a_gpu_is_enough_to_rule_shared_memory_out():
    assert choose("auto", [site("cpu"), site("cuda")], HERE) == Choice("nixl")


# Trying it, on real processes.


def probe(state: dict[str, Any]) -> Site:
    state["probe"] = Probe("cpu")
    return state["probe"].site


def reach_from_here(state: dict[str, Any], sites: list[Site]) -> Reach:
    return reach(sites, "cpu")


def test_the_memory_of_a_process_of_this_host_is_within_reach(a_child: Child, another_child: Child):
    sites = [a_child.call(probe), another_child.call(probe)]
    assert {one.pid for one in sites} == {a_child.process.pid, another_child.process.pid}
    assert reach(sites, "cpu") == replace(HERE, host=host_identity())
    # The other way round, too: sharing needs no more than being on one host.
    assert a_child.call(reach_from_here, [Probe("cpu").site]).can_share


def test_one_train_rank_on_another_host_puts_the_trainer_out_of_reach(a_child: Child):
    sites = [a_child.call(probe), replace(Probe("cpu").site, host="another boot/another namespace")]
    assert reach(sites, "cpu") == replace(FAR, host=host_identity())


def test_bytes_that_are_not_the_expected_ones_are_not_within_reach(a_child: Child):
    wrong = replace(a_child.call(probe), expected=b"x" * 16)
    why = f"process {a_child.process.pid} shares other bytes than expected"
    assert reach([wrong], "cpu") == Reach("cpu", True, False, False, why, host_identity())


def test_a_train_rank_that_could_share_nothing_says_why_and_may_still_be_read(a_child: Child):
    unshared = replace(a_child.call(probe), handle=None, unavailable=WHY)
    assert reach([unshared], "cpu") == replace(NOT_SHARED, host=host_identity())


def test_the_first_obstacle_of_several_train_ranks_is_reported(a_child: Child):
    mine = Probe("cpu").site
    sites = [mine, replace(mine, handle=None, unavailable="first"), replace(mine, handle=None, unavailable="second")]
    assert reach([*sites, a_child.call(probe)], "cpu").why_not_shared == "first"


def test_train_ranks_can_be_read_only_if_all_of_them_can(a_child: Child):
    there = a_child.call(probe)
    moved = replace(there, address=there.address + 1)
    assert reach([there, there], "cpu").can_read
    assert [reach(sites, "cpu").can_read for sites in ([there, moved], [moved, there])] == [False, False]


def test_a_train_rank_that_has_ended_is_out_of_reach(a_child: Child):
    gone = a_child.call(probe)
    a_child.kill()
    found = reach([gone], "cpu")
    assert (found.same_host, found.can_share, found.can_read) == (True, False, False)
    assert f"the memory of process {gone.pid} cannot be opened" in found.why_not_shared


def test_a_host_without_anonymous_memory_is_a_site_that_says_so(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    found = Probe("cpu").site
    assert (found.handle, found.unavailable) == (
        None, "no anonymous shared memory: [Errno 38] Function not implemented",
    )  # fmt: skip


def test_no_two_probes_have_the_same_bytes():
    assert Probe("cpu").site.expected != Probe("cpu").site.expected
