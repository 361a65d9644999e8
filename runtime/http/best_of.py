"""How many actions are drawn at a step, and what chooses among them: what a request asks for, and what is done where it
says nothing of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from runtime.agent.scorers import FIRST_DRAW, NOTHING_ASKED, Choosing, ChoosingAsked, ChosenBy
from runtime.http.fields import FieldRefused
from runtime.store.episodes import Purpose

NUM_HEADER = "x-stepagent-best-of"
BY_HEADER = "x-stepagent-best-of-by"


@dataclass(frozen=True, slots=True)
class ChoosingLimits:
    """What the server does by itself, and what a request may ask for."""

    default: Choosing = FIRST_DRAW
    """For served requests that say nothing of it. Practice and evaluation want the policy's own draws."""
    most: int = 8

    def chosen(
        self,
        asked: ChoosingAsked,
        purpose: Purpose,
        temperature: float,
        of_agent: ChoosingAsked = NOTHING_ASKED,
    ) -> Choosing:
        """What is done for a request: what it asks for, else what its agent's table says, else the server's own.

        Raises FieldRefused for more draws than the server makes.
        """
        num_own, by = of_agent.num_draws or self.default.num_draws, of_agent.by or self.default.by
        num_unasked = num_own if purpose is Purpose.SERVE else 1
        num_draws = num_unasked if asked.num_draws is None else asked.num_draws
        if num_draws > (most := max(self.most, num_own)):
            raise FieldRefused("best_of", f"this server draws at most {most} actions at a step (--best-of-most)")
        # At temperature 0 all draws are the same: one is made.
        return Choosing(1 if temperature == 0.0 else num_draws, asked.by or by, asked.by is None)


def asked_in_headers(headers: Headers) -> ChoosingAsked:
    """Raises FieldRefused for headers that say nothing that is known."""
    num_draws, by = headers.get(NUM_HEADER), headers.get(BY_HEADER)
    if num_draws is not None and not re.fullmatch("[1-9][0-9]{0,5}", num_draws):
        raise FieldRefused(NUM_HEADER, f"{num_draws!r} is no number of draws, 1 or more")
    if by is not None and by not in list(ChosenBy):
        raise FieldRefused(BY_HEADER, f"{by!r} is not one of {', '.join(ChosenBy)}")
    return ChoosingAsked(None if num_draws is None else int(num_draws), None if by is None else ChosenBy(by))
