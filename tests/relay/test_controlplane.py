"""The control plane's parts by themselves: who gives way to whom, and one answer for many who ask."""

import asyncio
import dataclasses
import socket

import pytest

from relay.controlplane.authorise import Access, Peer
from relay.controlplane.places import OF_A_USER_MAX, OF_STRANGERS_MAX, must_give_way
from relay.controlplane.rounds import Rounds
from relay.privileges import overflow_id

ROOT = Peer(0, may_change=True)


@dataclasses.dataclass(eq=False)
class Held:
    peer: Peer
    idle_since_s: float | None = None


def strangers(count: int, first_uid: int = 1000, each: int = OF_A_USER_MAX) -> list[Held]:
    return [Held(Peer(first_uid + number // each, may_change=False)) for number in range(count)]


def test_a_user_at_the_limit_gives_way_to_itself_the_longest_idle_first() -> None:
    held = strangers(OF_A_USER_MAX)
    newcomer = held[0].peer
    assert must_give_way(held, newcomer) == (True, None)  # all are being served
    held[3].idle_since_s, held[5].idle_since_s = 20.0, 10.0
    assert must_give_way(held, newcomer) == (True, held[5])
    assert must_give_way(held[1:], newcomer) == (False, None)


def test_strangers_together_leave_room_for_who_may_change_things() -> None:
    held = strangers(OF_STRANGERS_MAX, each=OF_A_USER_MAX - 1)
    assert must_give_way(held, ROOT) == (False, None)
    newcomer = Peer(5, may_change=False)
    assert must_give_way(held, newcomer) == (True, None)
    held[0].idle_since_s = 1.0
    assert must_give_way(held, newcomer) == (True, held[0])


def test_who_asks_during_a_round_is_served_by_the_next() -> None:
    rounds_made = 0

    async def run() -> list[int]:
        going_on = asyncio.Event()

        async def make() -> int:
            nonlocal rounds_made
            rounds_made += 1
            number = rounds_made
            await going_on.wait()
            return number

        rounds = Rounds(make)
        first = [asyncio.create_task(rounds.join()) for _ in range(100)]
        while not rounds_made:
            await asyncio.sleep(0)
        second = [asyncio.create_task(rounds.join()) for _ in range(100)]
        await asyncio.sleep(0)
        going_on.set()
        return await asyncio.gather(*first, *second)

    assert asyncio.run(run()) == [1] * 100 + [2] * 100
    assert rounds_made == 2


def test_a_failed_round_fails_for_its_own_alone() -> None:
    async def run() -> None:
        outcomes = iter([ValueError("once"), None])

        async def make() -> str:
            outcome = next(outcomes)
            if outcome is not None:
                raise outcome
            return "well"

        rounds = Rounds(make)
        with pytest.raises(ValueError, match="once"):
            await rounds.join()
        assert await rounds.join() == "well"

    asyncio.run(run())


def test_nobody_changes_nothing_even_when_the_relay_runs_as_nobody() -> None:
    """Users of another user namespace appear under that number, too."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Access(own_uid=overflow_id("uid"), trusted_gid=None)._trusted_uids == {0}
        peer = Access(own_uid=12345, trusted_gid=None).peer(ours)
    assert peer.may_change is (peer.uid == 0)
