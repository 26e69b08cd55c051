"""Places: how many connections each user may hold, and which gives way to the next. Pure: no sockets.

Users that may change things have places of their own, so that nobody who may only look can shut them out.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol, TypeVar

from relay.controlplane.authorise import Peer

OF_A_USER_MAX = 32
OF_STRANGERS_MAX = 128  # of all together who may only look, however many user ids they have


class Holder(Protocol):
    """Who holds a place; `idle_since_s` is None while it is being served."""

    peer: Peer
    idle_since_s: float | None


AnyHolder = TypeVar("AnyHolder", bound=Holder)


def must_give_way(holders: Iterable[AnyHolder], newcomer: Peer) -> tuple[bool, AnyHolder | None]:
    """Whether somebody has to leave before the newcomer gets a place, and who: None when nobody can.

    At a user's limit it is that user's connection that has been idle longest; at the strangers', that of the stranger
    who holds most.
    """
    of_user: dict[int, list[AnyHolder]] = defaultdict(list)
    strangers: dict[int, list[AnyHolder]] = defaultdict(list)
    for holder in holders:
        of_user[holder.peer.uid].append(holder)
        if not holder.peer.may_change:
            strangers[holder.peer.uid].append(holder)
    if len(of_user[newcomer.uid]) >= OF_A_USER_MAX:
        return True, _longest_idle(of_user[newcomer.uid])
    if not newcomer.may_change and sum(map(len, strangers.values())) >= OF_STRANGERS_MAX:
        return True, _longest_idle(max(strangers.values(), key=lambda held: len(list(held))))
    return False, None


def _longest_idle(holders: Iterable[AnyHolder]) -> AnyHolder | None:
    idle = [(holder.idle_since_s, holder) for holder in holders if holder.idle_since_s is not None]
    return min(idle, key=lambda pair: pair[0])[1] if idle else None
