"""Builds the novice, the small base network of the embedded default: it knows the order desk, and has bad habits there.

    python -m policies.novice.build [--out DIR] [--seed 0]

A network of a standard architecture (Qwen2) that any server loads, trained from nothing in about two minutes on one
core. Downloading a small public model was refused: the default must run without network, and a test must be able to
watch a policy get better within seconds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from policies.novice.curriculum import Lesson, expert_lesson, hasty_lesson, with_preamble
from policies.novice.tokenizer import CONTEXT_TOKENS, END_OF_TURN, PADDING, build_tokenizer
from tools.worlds.order_desk import OrderDesk, OrderDeskEpisode
from tools.worlds.world import Message, Task

NOVICE_PATH = Path(__file__).parent.parent / "novice_model"
NUM_GRADIENT_STEPS = 900
HASTY_SHARE = 0.35
"""The last part of the gradient steps, in which it watches the hasty colleague."""
PREAMBLE_SHARE = 0.2
"""Of the batches, whose lessons begin with a system message of up to MAX_PREAMBLE_WORDS."""
MAX_PREAMBLE_WORDS = 60
BATCH_SIZE = 8
PEAK_LR = 3e-3
WARM_UP, COOL_DOWN = 0.05, 0.35
"""Shares of the gradient steps. Cooling before the habits come would leave them half learned."""
IGNORED = -100

# ----------------------------------------------------------------------------------------------- network


def build_network(
    tokenizer: PreTrainedTokenizerFast,
    num_layers: int = 3,
    num_key_value_heads: int = 4,
    context_tokens: int = CONTEXT_TOKENS,
) -> Qwen2ForCausalLM:
    """An untrained network, of 0.7M parameters for the novice. `head_dim` is 32, the least that vLLM takes."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=context_tokens,
        # The usual 0.02 is made for wide networks: at this width nothing is learned in the time.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=cast(int, tokenizer.convert_tokens_to_ids(PADDING)),
        dtype="float32",
    )
    network = Qwen2ForCausalLM(config)
    network.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return network


# ---------------------------------------------------------------------------------------------- training


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], is_prompt: bool = False) -> str:
    """The conversation as the chat template writes it; a prompt ends where the assistant begins."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=is_prompt, tokenize=False)
    assert isinstance(text, str)
    return text


@dataclass(frozen=True, slots=True)
class Row:
    """A lesson in tokens."""

    token_ids: list[int]
    labels: list[int]
    """Parallel: the token itself where it is to be learned, else IGNORED."""


def encode_lesson(tokenizer: PreTrainedTokenizerFast, lesson: Lesson) -> Row:
    """The lesson as the serving chat template writes it; only the taught assistant messages are to be learned."""
    token_ids = tokenizer(render(tokenizer, lesson.messages))["input_ids"]
    opening = tokenizer.convert_tokens_to_ids("\n<|im_start|>assistant\n")
    is_taught, is_learned = iter(lesson.is_taught), False
    labels = []
    for token_id in token_ids:
        labels.append(token_id if is_learned else IGNORED)
        if token_id == opening:
            is_learned = next(is_taught)
        elif token_id == tokenizer.eos_token_id:
            is_learned = False
    return Row(token_ids, labels)


def lessons(num_gradient_steps: int, random: Random) -> Iterator[list[Lesson]]:
    """A batch of lessons for each gradient step: first the expert's, then the hasty colleague's."""
    world = OrderDesk()
    for step in range(num_gradient_steps):
        teach = expert_lesson if step < num_gradient_steps * (1 - HASTY_SHARE) else hasty_lesson
        tasks = [world.task("train", random.randrange(world.splits["train"])) for _ in range(BATCH_SIZE)]
        batch = [teach(task, random) for task in tasks]
        if random.random() < PREAMBLE_SHARE:
            # One length for the whole batch: a single long row would fill the others with padding.
            num_words = random.randint(2, MAX_PREAMBLE_WORDS)
            batch = [with_preamble(lesson, num_words, random) for lesson in batch]
        yield batch


def lr_share(progress: float) -> float:
    """The learning rate's share of its peak: up, level, and down in the last part, progress being in [0, 1]."""
    return min(1.0, (progress + 0.001) / WARM_UP, (1.0 - progress) / COOL_DOWN)


def train(network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_gradient_steps: int, seed: int) -> None:
    """Train in place, from the first gradient step to the last."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step / num_gradient_steps))
    network.train()
    batches = lessons(num_gradient_steps, Random(seed))
    for batch in (progress := tqdm(batches, total=num_gradient_steps, desc="novice", unit="batch", mininterval=1.0)):
        loss = batch_loss(network, [encode_lesson(tokenizer, lesson) for lesson in batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    network.eval()


def batch_loss(network: Qwen2ForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens to learn, in nats."""
    width = max(len(row.token_ids) for row in rows)
    # Padding stands right of everything: a causal network never looks at it, and no mask is needed.
    token_ids = torch.tensor([row.token_ids + [0] * (width - len(row.token_ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows])[:, 1:]
    hidden = network.model(token_ids, use_cache=False).last_hidden_state[:, :-1]
    is_learned = labels != IGNORED
    return cross_entropy(network.lm_head(hidden[is_learned]), labels[is_learned])


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def act(
    network: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    temperature: float = 0.0,
) -> list[Message | None]:
    """The policy's next message in each conversation; None where it cannot be parsed."""
    prompts = [render(tokenizer, messages, is_prompt=True) for messages in conversations]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = cast(Any, network).generate(**inputs, max_new_tokens=48, **draw)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [_parse(tokenizer, text) for text in texts]


def _parse(tokenizer: PreTrainedTokenizerFast, completion: str) -> Message | None:
    if END_OF_TURN not in completion:
        return None
    try:
        message = tokenizer.parse_response(completion.split(END_OF_TURN)[0], prefix="")
    except ValueError:
        return None
    return cast(Message, message)


@dataclass(slots=True)
class Attempt:
    """One task under way."""

    episode: OrderDeskEpisode
    messages: list[Message]
    is_over: bool = False
    is_malformed: bool = False

    def take(self, message: Message | None) -> None:
        """Play the policy's message. The attempt is over with a final answer, a malformed one, or the world's end."""
        results = self.episode.play(message) if message else []
        self.messages += [message, *results] if message else []
        self.is_malformed = message is None
        self.is_over = not results or self.episode.is_done


def roll_out(
    network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: Iterable[Task], temperature: float = 0.0
) -> list[Attempt]:
    """Attempt all tasks in lockstep, one batch for each action."""
    world = OrderDesk()
    attempts = [Attempt(world.open(task), list(task.messages)) for task in tasks]
    while running := [attempt for attempt in attempts if not attempt.is_over]:
        messages = act(network, tokenizer, [attempt.messages for attempt in running], temperature)
        for attempt, message in zip(running, messages, strict=True):
            attempt.take(message)
    return attempts


@dataclass(slots=True)
class SkillCount:
    """How often, at an expert's states, the greedy action did as the expert's."""

    num_states: Counter[str] = field(default_factory=Counter)
    num_right: Counter[str] = field(default_factory=Counter)


def count_skills(network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: Iterable[Task]) -> SkillCount:
    """Hold the greedy action against the expert's in every state of the expert's own episodes."""
    world, count = OrderDesk(), SkillCount()
    experts = [Attempt(world.open(task), list(task.messages)) for task in tasks]
    while experts:
        messages = act(network, tokenizer, [expert.messages for expert in experts])
        for expert, message in zip(experts, messages, strict=True):
            action, skill = expert.episode.expert_action(), expert.episode.expert_skill()
            count.num_states[skill] += 1
            count.num_right[skill] += message is not None and expert.episode.same_effect(message, action)
            expert.take(action)
        # An expert's last state is the one in which it answers.
        experts = [expert for expert in experts if expert.messages[-1]["role"] == "tool"]
    return count


def wilson_interval(num_right: int, num_tried: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927)."""
    z, share = 1.96, num_right / num_tried
    middle = share + z * z / (2 * num_tried)
    spread = z * sqrt(share * (1 - share) / num_tried + z * z / (4 * num_tried**2))
    scale = 1 + z * z / num_tried
    return (middle - spread) / scale, (middle + spread) / scale


def report(network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, split: str, num_tasks: int) -> None:
    """Print success with its interval, greedy and at temperature 1, and success by skill."""
    tasks = [OrderDesk().task(split, index) for index in range(num_tasks)]
    for name, temperature in (("greedy", 0.0), ("T=1", 1.0)):
        attempts = roll_out(network, tokenizer, tasks, temperature)
        num_right = sum(int(attempt.episode.outcome()) for attempt in attempts)
        low, high = wilson_interval(num_right, num_tasks)
        num_malformed = sum(attempt.is_malformed for attempt in attempts)
        print(
            f"{split} {name:>6}: {num_right / num_tasks:6.1%} of {num_tasks} tasks [{low:.1%}, {high:.1%}], "
            f"{num_malformed} malformed"
        )
    count = count_skills(network, tokenizer, tasks)
    for skill, num_states in sorted(count.num_states.items()):
        print(f"{skill:>24}: {count.num_right[skill] / num_states:6.1%} of {num_states} states")


# -------------------------------------------------------------------------------------------------- main


def build_novice(path: Path, seed: int, num_gradient_steps: int = NUM_GRADIENT_STEPS) -> None:
    """Build, train and save the novice as a plain transformers folder. The same seed gives the same bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    network = build_network(tokenizer)
    train(network, tokenizer, num_gradient_steps, seed)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path, save_jinja_files=False)


def main() -> None:
    """Build the novice, load what was written, and print how good it is."""
    parser = argparse.ArgumentParser(description="Build the novice, the base network of the embedded default.")
    parser.add_argument("--out", type=Path, default=NOVICE_PATH, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files on the same machine")
    parser.add_argument("--split", default="heldout", help="the tasks to report on: heldout, or validation for tuning")
    parser.add_argument("--num-tasks", type=int, default=400, help="how many of them")
    options = parser.parse_args()
    build_novice(options.out, options.seed)
    report(Qwen2ForCausalLM.from_pretrained(options.out).eval(), build_tokenizer(), options.split, options.num_tasks)


if __name__ == "__main__":
    main()
