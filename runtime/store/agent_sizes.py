"""How much of the log is whose: what the texts and tokens of each agent's own episodes take.

Counted once at first, and after that at the cost of what is new, so that it may be asked for every few minutes in a log
of any length. Refused: a column with each step's size, which every append would pay for.

Not counted: indexes and what a row needs beside its content; demonstrations, which no retention erases.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from runtime.store.step_log import StepLog

_AT_ONCE = 2000
"""Steps of one read."""
_CONTENT = ("new_messages", "prompt_suffix", "completion_token_ids", "behavior_logprobs", "action", "tool_results")
_SIZE = " + ".join(f"coalesce(length(CAST({column} AS BLOB)), 0)" for column in _CONTENT)
_BY_AGENT = (
    f"SELECT agent, sum({_SIZE}) AS num_bytes FROM steps JOIN episodes ON episodes.id = steps.episode_id "
    "WHERE actor = 'policy' AND {which} GROUP BY agent"
)


class AgentSizes:
    """Of one log. One thread at a time counts; any may say that the count has to begin anew."""

    def __init__(self, log: StepLog) -> None:
        self._log = log
        self._num_bytes: Counter[str] = Counter()
        self._counted_to = 0
        self._is_stale = False

    def begin_anew(self) -> None:
        """Steps have gone that `subtract` was not told of."""
        self._is_stale = True

    def now(self) -> Counter[str]:
        """Bytes by agent; the server's own has the empty name."""
        if self._is_stale:
            self._num_bytes, self._counted_to, self._is_stale = Counter(), 0, False
        last = self._log.num_rows("steps")
        for low in range(self._counted_to + 1, last + 1, _AT_ONCE):
            self._num_bytes += self._sum("steps.rowid BETWEEN ? AND ?", low, min(low + _AT_ONCE - 1, last))
        self._counted_to = last  # also where it is smaller than before: numbers are given again
        return self._num_bytes

    def of_episodes(self, episode_ids: Iterable[str]) -> Counter[str]:
        """The same, of these episodes alone."""
        return self._sum("episodes.id IN (SELECT value FROM json_each(?))", json.dumps(list(episode_ids)))

    def subtract(self, gone: Counter[str]) -> None:
        """So much was erased."""
        self._num_bytes.subtract(gone)

    def _sum(self, which: str, *values: object) -> Counter[str]:
        rows = self._log.query(_BY_AGENT.format(which=which), *values)
        return Counter({row["agent"]: row["num_bytes"] for row in rows})
