"""Episodes at the order desk without a server."""

from __future__ import annotations

from benchmarks.lockstep import load_policy
from benchmarks.rollouts import Rollouts
from policies.chat.chat_protocol import ChatProtocol
from tools.worlds.order_desk import OrderDesk

__all__ = ["WORLD", "Desk", "load_policy"]

WORLD = OrderDesk()


class Desk(Rollouts):
    """The order desk as one chat protocol sees it."""

    def __init__(self, protocol: ChatProtocol) -> None:
        super().__init__(WORLD, protocol)
