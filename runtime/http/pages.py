"""Pages of episodes, as the lists of /v1/episodes and /v1/demonstrations show them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from runtime.store.episodes import Episode


def episode_page(found: list[Episode], limit: int) -> dict[str, Any]:
    """One page of a list; `found` holds one episode more than the limit where there are more pages."""
    page = found[:limit]
    return {
        "object": "list",
        "data": [shown_episode(episode) for episode in page],
        "has_more": len(found) > limit,
        "last_id": page[-1].id if page else None,
    }


def shown_episode(episode: Episode) -> dict[str, Any]:
    """An episode as clients see it, without its steps."""
    return {"object": "episode", **asdict(episode)}
