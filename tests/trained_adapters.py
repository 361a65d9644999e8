"""A small adapter that has learned something: noise on random weights is chaos in 16 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.desk_rollouts import WORLD, Desk
from benchmarks.methods import METHODS, Run, Scene
from learner.training.probing import make_probe
from policies.adapters.base_network import read_base_network
from policies.adapters.probe import write_probe
from policies.chat.chat_protocol import ChatProtocol
from policies.novice.build import NOVICE_PATH


def trained_in_32_bits(folder: Path) -> Path:
    """An adapter of the novice, with its probe, in a folder within this one."""
    torch.set_num_threads(1)
    desk = Desk(ChatProtocol.load(NOVICE_PATH))
    Run(desk, METHODS["sft"], Scene(1, 8, "validation", 1, 2), folder).cycle(0)
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NOVICE_PATH), str(folder / "cycle-0"))
    (demonstration,) = desk.demonstrations([WORLD.task("train", 0)])
    prompts = [state.prompt for state in demonstration.states]
    write_probe(folder / "cycle-0", make_probe(network.eval(), read_base_network(NOVICE_PATH).fingerprint, prompts))
    return folder / "cycle-0"
