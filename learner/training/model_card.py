"""The README of an adapter's folder: what it is, what it was trained on, and how that went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """What an adapter was made from."""

    base: str
    """Folder or hub name of the base network."""
    base_fingerprint: str
    parent: str | None
    """The adapter that it goes on from; None: a fresh one."""
    objective: str
    num_trajectories: int
    num_sequences: int
    """Scored sequences, with the rejected sides of preferences and the policy's own actions."""
    num_gradient_steps: int
    seed: int
    diagnostics: dict[str, float]
    """Means over the last epoch."""


def model_card(opening: str, origin: Origin | None) -> str:
    """Markdown, with the front matter that hubs read; `origin` None: nothing was trained."""
    if origin is None:
        return opening
    diagnostics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(origin.diagnostics.items()))
    lines = {
        "base": f"`{origin.base}` (network {origin.base_fingerprint[:12]})",
        "parent": origin.parent or "none, a fresh LoRA",
        "objective": origin.objective,
        "trained on": f"{origin.num_sequences} sequences of {origin.num_trajectories} trajectories",
        "gradient steps": f"{origin.num_gradient_steps}, seed {origin.seed}",
        "last epoch": diagnostics or "nothing was watched",
    }
    front = f"---\nlibrary_name: peft\nbase_model: {origin.base}\n---\n"
    return (
        "\n".join([front, opening.rstrip(), "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in lines.items())])
        + "\n"
    )
