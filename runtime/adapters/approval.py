"""What becomes of a candidate that passed the gate: it acts, serves a share at first, or waits for somebody's yes.

A candidate that waits is no state of an adapter: it may be unloaded for a while, and the server may restart, and it
waits all the same. Its wait is rows of the registry. It ends with a yes (`approve`), a no (`refuse`), or by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.adapters.swap import Swap
from runtime.background import keep_doing
from runtime.store.adapter_registry import AdapterRegistry, AdapterState, Proposal, ProposalEvent


class PromotionMode(StrEnum):
    """What a candidate that passed the gate may do."""

    AUTO = "auto"  # it acts at once
    CANARY = "canary"  # it serves a share of the new episodes, and acts if it does well there
    ASK = "ask"  # it waits until somebody says yes
    DRY_RUN = "dry-run"  # nothing: what it would have done is noted


@dataclass(frozen=True, slots=True)
class PromotionTerms:
    """What a candidate of one agent may do."""

    mode: PromotionMode = PromotionMode.AUTO
    canary_share: float = 0.1
    """Of the new episodes, in mode CANARY."""
    expires_after_s: float = 14 * 24 * 3600.0
    """How long a candidate waits."""


@dataclass(frozen=True, slots=True)
class Approval:
    """Every promotion of a learner goes through here."""

    swap: Swap
    registry: AdapterRegistry
    terms: PromotionTerms = PromotionTerms()
    """Of every agent that has none of its own."""
    of_agents: Mapping[str, PromotionTerms] = field(default_factory=dict)

    def terms_of(self, name: str) -> PromotionTerms:
        """What holds for an adapter. Raises UnknownAdapter."""
        return self.of_agents.get(self.registry.adapter(name).agent, self.terms)

    async def propose(self, name: str, reason: str, expected_acting: str | None, key: str) -> None:
        """What a learner asks for. Raises as `Swap.promote` does."""
        terms = self.terms_of(name)
        match terms.mode:
            case PromotionMode.AUTO:
                await self.swap.promote(name, reason, expected_acting, key)
            case PromotionMode.CANARY:
                await self.swap.start_canary(name, terms.canary_share, reason, expected_acting, key)
            case PromotionMode.ASK:
                await self.swap.bring_up(name)  # what waits is known to be fit to act
                self.swap.require_acting(expected_acting, self.registry.adapter(name).agent)
                await self._note(name, ProposalEvent.PROPOSED, reason, expected_acting, key)
            case PromotionMode.DRY_RUN:
                await self.swap.refuse(name, f"a dry run promotes nothing: {reason}", key)

    async def promote(self, name: str, reason: str, expected_acting: str | None, key: str) -> None:
        """Somebody's yes, to what waits or to any other adapter.

        What waits was found to be better than what acted then: where another adapter acts by now, SwapError is raised,
        unless the caller says himself what he expects to act.
        """
        waiting = self.registry.proposal(name)
        expected = expected_acting or (waiting.expected_acting if waiting else None)
        await self.swap.promote(name, reason or (waiting.reason if waiting else ""), expected, key)
        if waiting is not None:
            await self._note(name, ProposalEvent.APPROVED, reason, expected_acting, key)

    async def refuse(self, name: str, reason: str, key: str) -> None:
        """Somebody's no."""
        waiting = self.registry.proposal(name)
        await self.swap.refuse(name, reason, key)
        if waiting is not None:
            await self._note(name, ProposalEvent.DECLINED, reason, None, key)

    def expires_at(self, proposal: Proposal) -> float:
        """Unix seconds."""
        return proposal.created_at + self.terms_of(proposal.adapter).expires_after_s

    async def expire(self, now: float) -> list[str]:
        """Refuse what has waited for too long; returns the names. `now` is Unix seconds."""
        late = [proposal for proposal in self.registry.proposals() if self.expires_at(proposal) <= now]
        for proposal in late:
            reason = f"nobody said yes within {self.terms_of(proposal.adapter).expires_after_s / 86400:g} days"
            if self.registry.state(proposal.adapter) is not AdapterState.REFUSED:
                await self.swap.refuse(proposal.adapter, reason)
            await self._note(proposal.adapter, ProposalEvent.EXPIRED, reason, None, "")
        return [proposal.adapter for proposal in late]

    async def keep_expiring(self, every_s: float = 60.0) -> None:
        """`expire`, for ever: the server's background task."""
        await keep_doing("the expiry of what waits for approval", lambda: self.expire(time.time()), every_s)

    async def _note(self, name: str, event: ProposalEvent, reason: str, expected: str | None, key: str) -> None:
        await self.swap.write(self.registry.note_proposal, name, event, reason, expected, key)
