"""Nodes that choose their blocks by themselves: they go where they are needed, and nobody notices."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.config import StartError
from node.coordinator.submission import JobError, JobRequest
from node.engine.device import Device
from node.engine.interface import REFERENCE, Variant
from node.links.outbound_link import SessionRefused
from node.models.errors import ModelError
from node.stages import span_supervisor
from node.stages.block_placement import FAILED_MOVE_S
from node.stages.memory_admission import span_bytes_for
from node.stages.stage_server import WITHDRAWAL_S
from node.swarm.directory import LOADING_S
from protocol.identity import BlockRange
from tests.support.job_peers import FakeLibrary, Peer, Swarm, an_opening, open_swarm
from tests.unit.coordinator.test_jobs import PROMPT, right_tokens


def spans_of(peer: Peer) -> list[str]:
    """What others hear that a peer serves."""
    return [str(span.blocks) for span in peer.stages.served_spans()]


async def thirds_and_a_spare(swarm: Swarm) -> tuple[list[Peer], Peer]:
    """Three peers that have a third of the blocks each, and one more that has some of theirs."""
    peers = []
    for _ in range(4):
        peers.append(await swarm.join_where_needed(3))
        await trio.sleep(5)
    assert sorted(spans_of(peer)[0] for peer in peers[:3]) == ["0-3", "3-6", "6-9"]
    return peers[:3], peers[3]


async def test_uncovered_blocks_are_taken_by_spare_node_without_losing_job(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        thirds, spare = await thirds_and_a_spare(swarm)
        coordinator = await swarm.join((0, 9), step_s=0.5)  # has all blocks, and is slow with them
        await swarm.settle()
        lost = thirds[2]
        hole = spans_of(lost)
        results = []

        async def run_a_long_job() -> None:
            request = JobRequest(model="fake", prompt=PROMPT, max_tokens=300)
            results.append((await coordinator.run(request)).token_ids)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_a_long_job)
            await trio.sleep(1)
            swarm.hub.kill(lost.id)
            left = (*thirds[:2], spare)
            with trio.fail_after(90):
                while hole not in map(spans_of, left):
                    await trio.sleep(0.5)
        assert results == [right_tokens(300)]
        await trio.sleep(120)
        assert sorted(len(peer.engines) for peer in left) == [1, 1, 2], "once it is filled, nobody moves"
        assert sorted(map(spans_of, left)) == [["0-3"], ["3-6"], ["6-9"]]


class CutEveryFour(FakeLibrary):
    """Has a model of nine blocks that may be cut before the fifth and the last one only."""

    granularity = 4


async def test_nodes_take_blocks_between_the_places_where_the_model_may_be_cut(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peers = []
        for held in (4, 6, 2):
            peers.append(await swarm.join_where_needed(held, CutEveryFour()))
            await trio.sleep(5)
        assert sorted(spans_of(peer)[0] for peer in peers) == ["0-4", "4-9", "8-9"]
        swarm.hub.kill(next(peer for peer in peers if spans_of(peer) == ["0-4"]).id)
        spare = await swarm.join_where_needed(4, CutEveryFour())
        await trio.sleep(90)
        assert spans_of(spare) == ["0-4"]


async def test_span_that_the_model_must_not_be_cut_to_is_refused(virtual_clock: MockClock) -> None:
    line = "cannot serve fake:3-9: the model can be cut at multiples of 4 blocks only.*: serve 4-9 or 0-9"
    with pytest.RaisesGroup(pytest.RaisesExc(StartError, match=line), flatten_subgroups=True):
        async with open_swarm() as swarm:
            await swarm.join_where_needed(9, CutEveryFour(), blocks=BlockRange(3, 9))


GPUS = [Device(f"cuda:{number}", 1 << 40) for number in range(2)]


async def test_span_is_split_over_the_gpus_of_a_node(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join_where_needed(5, blocks=BlockRange(0, 9), devices=GPUS)
        parts = [(str(engine.info.blocks), engine.info.device) for engine in peer.engines]
        assert parts in ([("0-4", "cuda:0"), ("4-9", "cuda:1")], [("0-5", "cuda:0"), ("5-9", "cuda:1")])
        await swarm.settle()
        request = JobRequest(model="fake", prompt=PROMPT, max_tokens=20)
        result = await peer.run(request)
        assert result.token_ids == right_tokens(20)
        assert all(engine.statistics().steps for engine in peer.engines)


async def test_node_that_chooses_its_blocks_fills_all_its_gpus(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peers = [await swarm.join_where_needed(3, devices=GPUS)]
        await trio.sleep(5)
        peers.append(await swarm.join_where_needed(3))
        assert sorted(spans_of(peers[0]) + spans_of(peers[1])) == ["0-3", "3-6", "6-9"]
        assert [engine.info.device for engine in peers[0].engines] == ["cuda:0", "cuda:1"]
        swarm.hub.kill(peers[1].id)
        spare = await swarm.join_where_needed(3)
        assert spans_of(spare) == spans_of(peers[1])


async def test_one_exact_variant_is_built_in_advance(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer = await swarm.join_where_needed(3)
        assert peer.engines[0].variants() == {REFERENCE}, "nobody waits for it"
        await trio.sleep(60)
        assert peer.engines[0].variants() == {REFERENCE, Variant("onnxruntime", "fp32")}


async def test_withdrawn_span_is_not_announced_and_drains(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        server, coordinator = await swarm.join((0, 9), step_s=0.1), await swarm.join()
        await swarm.settle()
        [span] = server.stages.spans()
        results = []

        async def run() -> None:
            request = JobRequest(model="fake", prompt=PROMPT, max_tokens=300)
            results.append((await coordinator.run(request)).token_ids)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(1)
            assert span.sessions
            server.stages.withdraw_span(span)
            assert spans_of(server) == []
            link = await coordinator.stages.link_pool.link_to(server.id)
            # Who has not heard so yet is not to suffer; later nobody may keep it from going.
            late = replace(an_opening(server), positions=8)
            await link.open(late)
            await link.close(late.session)
            nursery.start_soon(server.stages.drain_span, span)
            await trio.sleep(WITHDRAWAL_S + 0.1)
            assert span.sessions
            with pytest.raises(SessionRefused, match="not served here"):
                await link.open(late)
        assert not span.sessions
        assert results == [right_tokens(300)]


async def test_draft_model_starts_in_background_and_restarts_after_crash(virtual_clock: MockClock) -> None:
    guessed = JobRequest(model="fake", prompt=PROMPT, max_tokens=40, method="speculation=draft-8")
    async with open_swarm() as swarm:
        peer = await swarm.join_where_needed(9, draft="numbers")
        assert spans_of(peer) == ["0-9"], "nobody waits for who only saves time"
        for _ in range(2):
            await trio.sleep(20)
            result = await peer.run(guessed)
            assert result.token_ids == right_tokens(40)
            assert result.usage.accepted_draft_tokens > 20
            next(each for each in reversed(peer.engines) if Variant("onnxruntime", "int8") in each.variants()).crash()
            await trio.sleep(0.1)
            with pytest.raises(JobError, match="not ready") as caught:
                await peer.run(guessed)
            assert caught.value.retry_after_s


async def test_draft_model_with_other_tokenizer_is_refused(virtual_clock: MockClock) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(StartError, match="cannot be used with fake: tokenizers differ"), flatten_subgroups=True
    ):
        async with open_swarm() as swarm:
            await swarm.join_where_needed(9, draft="letters")


class FailsToMove(FakeLibrary):
    """Gives the blocks asked for first, and no others."""

    def __init__(self) -> None:
        self.asked: list[BlockRange] = []

    async def weights(self, manifest: object, blocks: BlockRange, **options: object) -> Any:
        self.asked.append(blocks)
        if len(self.asked) > 1:
            raise ModelError("the disk is full")
        return await super().weights(manifest, blocks, **options)


async def thirds_and_a_spare_with_a_hole(swarm: Swarm, libraries: Sequence[FakeLibrary]) -> list[Peer]:
    """Four peers of which two have the first third; the one with the last third has just died."""
    peers = []
    for library in libraries:
        peers.append(await swarm.join_where_needed(3, library))
        await trio.sleep(5)
    assert [spans_of(peer) for peer in peers] == [["0-3"], ["3-6"], ["6-9"], ["0-3"]]
    await trio.sleep(60)
    swarm.hub.kill(peers[2].id)
    return peers


async def test_failed_move_keeps_old_blocks_and_is_tried_again_after_a_while(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        libraries = [FailsToMove() for _ in range(4)]
        peers = await thirds_and_a_spare_with_a_hole(swarm, libraries)

        def asked_for() -> list[list[str]]:
            return [[str(blocks) for blocks in library.asked] for library in libraries]

        await trio.sleep(200)
        assert [spans_of(peer) for peer in peers] == [["0-3"], ["3-6"], ["6-9"], ["0-3"]]
        assert asked_for() == [["0-3", "6-9"], ["3-6"], ["6-9"], ["0-3", "6-9"]], "each that can move tries it once"
        said = [peer.placements.current().placements for peer in peers]
        assert [str(each.blocks) for (each,) in said] == ["0-3", "3-6", "6-9", "0-3"], "others know where it stays"
        assert [each.movable for (each,) in said] == [False, True, True, False], "and that it does"
        await trio.sleep(FAILED_MOVE_S)
        assert asked_for() == [["0-3", "6-9", "6-9"], ["3-6"], ["6-9"], ["0-3", "6-9", "6-9"]]


@pytest.mark.parametrize("failing", [0, 3])
async def test_hole_that_one_node_fails_to_fill_is_filled_by_another(virtual_clock: MockClock, failing: int) -> None:
    async with open_swarm() as swarm:
        libraries = [FailsToMove() if number == failing else FakeLibrary() for number in range(4)]
        peers = await thirds_and_a_spare_with_a_hole(swarm, libraries)
        await trio.sleep(120)
        assert spans_of(peers[failing]) == ["0-3"]
        assert spans_of(peers[3 - failing]) == ["6-9"]


@pytest.mark.parametrize(("free", "moves"), [(1.4, True), (1.0, False)])
async def test_span_on_a_gpu_moves_where_the_new_blocks_fit_beside_what_it_has_taken(
    virtual_clock: MockClock, monkeypatch: pytest.MonkeyPatch, free: float, moves: bool
) -> None:
    """A GPU's memory is taken at once: as much as the first blocks have is rarely free beside them."""
    manifest = await LargeBlocks().manifest("fake")
    needed_bytes = span_bytes_for(manifest, BlockRange(8, 9), "cuda:0")
    memory_bytes = span_bytes_for(manifest, BlockRange(0, 2), "cuda:0") - (2 << 20)

    async def find_gpu(name: str) -> Device:
        await trio.lowlevel.checkpoint()
        return Device(name, int(free * needed_bytes))

    monkeypatch.setattr(span_supervisor, "find_device", find_gpu)
    async with open_swarm() as swarm:
        others = []
        for blocks in (BlockRange(0, 8), BlockRange(8, 9)):
            others.append(await swarm.join_where_needed(8, blocks=blocks))
        gpu = [Device("cuda:0", 1 << 40)]
        spare = await swarm.join_where_needed(1, LargeBlocks(), devices=gpu, memory_bytes=memory_bytes)
        (first,) = spans_of(spare)
        assert first != "8-9"
        swarm.hub.kill(others[1].id)
        await trio.sleep(300)
        assert spans_of(spare) == ["8-9" if moves else first]


class HangsInMove(FakeLibrary):
    """Gives the blocks asked for first, and others never."""

    asked = False

    async def weights(self, manifest: object, blocks: BlockRange, **options: object) -> Any:
        if self.asked:
            await trio.sleep_forever()
        self.asked = True
        return await super().weights(manifest, blocks, **options)


async def test_hole_that_one_node_announced_and_never_filled_is_filled_by_another(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        libraries = [HangsInMove(), *(FakeLibrary() for _ in range(3))]
        peers = await thirds_and_a_spare_with_a_hole(swarm, libraries)
        await trio.sleep(LOADING_S - 60)
        announced = peers[0].placements.current().placements
        assert [str(each.blocks) for each in announced] == ["6-9"]
        assert spans_of(peers[3]) == ["0-3"], "large blocks take their time"
        await trio.sleep(150)
        assert [spans_of(peer) for peer in peers if peer is not peers[2]] == [["0-3"], ["3-6"], ["6-9"]]


class LargeBlocks(FakeLibrary):
    """Has the fake model with blocks of 64 MiB."""

    async def manifest(self, text: str, **options: object) -> Any:
        shape = await super().manifest(text, **options)
        return replace(shape, blocks=tuple(replace(each, size_bytes=64 << 20) for each in shape.blocks))


class LargeHead(FakeLibrary):
    """Has the fake model with a head as large as two blocks."""

    async def manifest(self, text: str, **options: object) -> Any:
        shape = await super().manifest(text, **options)
        return replace(shape, head=replace(shape.head, size_bytes=2 * shape.blocks[0].size_bytes))


async def test_node_with_head_takes_fewer_blocks_and_moved_there_leaves_out_those_that_do_not_fit(
    virtual_clock: MockClock,
) -> None:
    async with open_swarm() as swarm:
        library = LargeHead()
        peers = []
        for _ in range(3):
            peers.append(await swarm.join_where_needed(4, library))
            await trio.sleep(5)
        assert [spans_of(peer) for peer in peers] == [["0-4"], ["4-8"], ["7-9"]]
        spare = await swarm.join_where_needed(4, library)
        await trio.sleep(60)
        swarm.hub.kill(peers[2].id)
        await trio.sleep(120)
        assert "7-9" in [spans_of(peer)[0] for peer in (*peers[:2], spare)]


async def test_node_that_cannot_hold_a_block_says_how_much_memory_is_missing(virtual_clock: MockClock) -> None:
    line = (
        r"cannot serve fake, not even its blocks \d-\d: it needs 7\d MiB of memory .* more than it has: see --memory$"
    )
    with pytest.RaisesGroup(pytest.RaisesExc(StartError, match=line), flatten_subgroups=True):
        async with open_swarm() as swarm:
            await swarm.join_where_needed(4, LargeBlocks())


async def a_moving_peer(swarm: Swarm) -> tuple[Peer, Peer]:
    """A peer that still holds the first third while it serves the last, and the one that serves the first beside it."""
    peers = await thirds_and_a_spare_with_a_hole(swarm, [FakeLibrary() for _ in range(4)])
    both = [peers[0], peers[3]]
    with trio.fail_after(120):
        while not (moving := [peer for peer in both if len(peer.stages.spans()) == 2]):
            await trio.sleep(0.1)
    both.remove(moving[0])
    return moving[0], both[0]


@pytest.mark.parametrize(("crashing", "left"), [(0, "6-9"), (1, "0-3")])
async def test_crash_of_one_of_two_spans_during_a_move_leaves_the_other_with_its_sessions(
    virtual_clock: MockClock, crashing: int, left: str
) -> None:
    async with open_swarm() as swarm:
        peer, _ = await a_moving_peer(swarm)
        link = await swarm.peers[1].stages.link_pool.link_to(peer.id)
        healthy = peer.stages.spans()[1 - crashing]
        opening = replace(an_opening(peer), blocks=healthy.info.blocks)
        if crashing == 1:
            opening = replace(opening, sampling=None, downstream=swarm.peers[1].id)
        await link.open(opening)
        peer.engines[crashing].crash()
        await trio.sleep(1)
        assert len(healthy.sessions) == 1
        assert spans_of(peer) == [left]
        await trio.sleep(60)
        assert len(peer.engines) == 2, "nothing was loaded again"
        [placement] = peer.placements.current().placements
        assert str(placement.blocks) == left


async def test_blocks_that_others_cease_to_serve_while_they_drain_are_kept(virtual_clock: MockClock) -> None:
    async with open_swarm() as swarm:
        peer, other = await a_moving_peer(swarm)
        await trio.sleep(1)
        assert spans_of(peer) == ["6-9"], "its old blocks are withdrawn"
        [span] = other.stages.spans()
        other.stages.withdraw_span(span)
        other.membership.announce()
        await trio.sleep(WITHDRAWAL_S / 2)
        assert spans_of(peer) == ["0-3", "6-9"]
        await trio.sleep(60)
        assert spans_of(peer) == ["0-3", "6-9"]
        other.stages.restore_span(span)
        other.membership.announce()
        await trio.sleep(WITHDRAWAL_S * 2)
        assert [str(each.info.blocks) for each in peer.stages.spans()] == ["6-9"]
