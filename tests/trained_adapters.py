"""A small adapter that has learned something: noise on random weights is chaos in 16 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.desk_rollouts import WORLD, Desk
from learner.data.training_data import TrainingData
from learner.objectives.build import objective_of
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.probing import make_probe
from learner.training.trainer import Trainer
from policies.adapters.base_network import read_base_network
from policies.adapters.probe import write_probe
from policies.chat.chat_protocol import ChatProtocol
from policies.novice.build import NOVICE_PATH


def trained_in_32_bits(folder: Path) -> Path:
    """An adapter of the novice, with its probe, in a folder within this one."""
    torch.set_num_threads(1)
    desk = Desk(ChatProtocol.load(NOVICE_PATH))
    demonstrations = desk.demonstrations([WORLD.task("train", index) for index in range(8)])
    options = TrainingOptions(lr=4e-3, epochs=0, min_gradient_steps=24, trajectories_per_step=2, seed=1)
    trainer = Trainer(NOVICE_PATH, None, options, device="cpu")
    trainer.train(objective_of("sft", TrainingData(tuple(demonstrations), ()), ObjectiveOptions(), None))
    trainer.network.save_pretrained(folder / "cycle-0")
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NOVICE_PATH), str(folder / "cycle-0"))
    (demonstration,) = desk.demonstrations([WORLD.task("train", 0)])
    prompts = [state.prompt for state in demonstration.states]
    write_probe(folder / "cycle-0", make_probe(network.eval(), read_base_network(NOVICE_PATH).fingerprint, prompts))
    return folder / "cycle-0"
