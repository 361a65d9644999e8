"""What demonstrations cover, as a table: tools, steps, tasks, lengths, and why records were refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from learner.importing.demonstrations import ImportedDemonstration

_MOST_LINES = 20
"""Of one part of the table; the rest is counted together."""


@dataclass(slots=True)
class Coverage:
    """Counts of what was read, one record after the other."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    offered: Counter[str] = field(default_factory=Counter)
    """Demonstrations in which a tool is on offer."""
    called: Counter[str] = field(default_factory=Counter)
    """Calls of a tool in what is learned."""
    tasks: Counter[str] = field(default_factory=Counter)
    """By what the user said first, or by the world's name of the task."""
    num_steps: list[int] = field(default_factory=list)
    """Learned of each demonstration."""
    num_characters: list[int] = field(default_factory=list)
    """Of each conversation."""
    num_without_tools: int = 0
    """That call tools and do not say which were on offer."""
    num_with_thinking: int = 0
    num_answers: int = 0
    """Learned steps that call nothing."""

    def add(self, demonstration: ImportedDemonstration) -> None:
        self.statuses["imported"] += 1
        self.formats[demonstration.provenance.format.value] += 1
        self.offered.update(tool["function"]["name"] for tool in demonstration.tools)
        learned = [demonstration.messages[index] for index in demonstration.learn_from]
        calls = [call["function"]["name"] for message in learned for call in message.get("tool_calls", ())]
        self.called.update(calls)
        self.num_answers += sum("tool_calls" not in message for message in learned)
        self.num_with_thinking += sum("reasoning_content" in message for message in learned)
        asked = next((m["content"] for m in demonstration.messages if m["role"] == "user"), "")
        self.tasks[demonstration.task or asked] += 1
        self.num_without_tools += demonstration.calls_without_tools
        self.num_steps.append(len(learned))
        self.num_characters.append(sum(len(str(message)) for message in demonstration.messages))

    def know(self) -> None:
        self.statuses["known"] += 1

    def refuse(self, reason: str) -> None:
        self.statuses["refused"] += 1
        self.reasons[re.sub(r"\d+", "N", reason)] += 1

    def table(self) -> str:
        """Lines of two columns, the numbers right."""
        rows: list[tuple[str, str]] = [(f"records {name}", f"{number}") for name, number in self.statuses.items()]
        rows += [(f"format {name}", f"{number}") for name, number in self.formats.most_common()]
        if self.num_steps:
            rows += [
                ("steps learned", f"{sum(self.num_steps)}"),
                ("  with a call", f"{sum(self.num_steps) - self.num_answers}"),
                ("  answers", f"{self.num_answers}"),
                ("  with thinking", f"{self.num_with_thinking}"),
                ("steps of a record, least / median / most", _spread(self.num_steps)),
                ("characters of a record, least / median / most", _spread(self.num_characters)),
                ("tasks, told apart by what the user says first", f"{len(self.tasks)}"),
            ]
        if self.num_without_tools:
            rows.append(("records that call tools and name none on offer", f"{self.num_without_tools}"))
        names = sorted({*self.offered, *self.called}, key=lambda name: (-self.called[name], name))
        tools = [(f"  {name}", f"{self.called[name]} / {self.offered[name]}") for name in names]
        rows += [("tools: calls learned / records that offer it", f"{len(names)}"), *_shortened(tools)] if names else []
        rows += _shortened([(f"refused: {reason}", f"{number}") for reason, number in self.reasons.most_common()])
        width = max((len(label) for label, _ in rows if len(label) <= 70), default=0)
        return "\n".join(f"{label:<{width}}  {number:>10}" for label, number in rows)


def _spread(numbers: Sequence[int]) -> str:
    return f"{min(numbers)} / {median(numbers):g} / {max(numbers)}"


def _shortened(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    rest = len(rows) - _MOST_LINES
    return rows if rest <= 0 else [*rows[:_MOST_LINES], (f"  and {rest} more", "")]
