"""Adapters of a real model, trained in seconds on some cities' weather."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cycle_stages import CITIES, transcript
from learner.objectives.objectives import Likelihood, action_sequence
from learner.options import TrainingOptions
from learner.packing.prefix_tree import ScoredSequence
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, message_action
from policies.types import TokenIds


def train(model: Path, num_gradient_steps: int, folder: Path) -> Path:
    """An adapter in the folder, with its proof."""
    protocol, prompts, sequences = ChatProtocol.load(model), list[TokenIds](), list[ScoredSequence]()
    for city in CITIES:
        shown = transcript(city)
        messages = shown["messages"]
        for place in (1, 3):
            prompt, action = protocol.completion_of(messages[:place], message_action(messages[place]), shown["tools"])
            prompts.append(prompt)
            sequences.append(action_sequence(prompt, action, (city, place)))
    trainer = Trainer(
        model, None, TrainingOptions(epochs=0, min_gradient_steps=num_gradient_steps, trajectories_per_step=2)
    )
    trainer.train(Likelihood("sft", tuple(sequences)))
    trainer.save(folder, prompts[:6], "# A test\n")
    return folder
