"""Small students: for each world a network of about a million weights that has learned from its demonstrations.

    python -m benchmarks.students multihop_qa [--out FOLDER] [--tasks 200]
    python serve.py --model FOLDER --world multihop_qa

What the novice is to the order desk a student is to a world that others wrote: it knows the trade badly, and is small
enough that a cycle takes seconds. Its words are learned from the demonstrations (byte-level BPE, and whole tokens for
the fixed parts of calls), its network is the novice's with one layer more, trained from nothing in some minutes on one
core. It reads no tool schemas, and of system prompts and observations no more than the beginning: its chat template
cuts them, so that serving cuts them alike. Where its plan names a habit, it has watched a colleague who has it
(`benchmarks/colleagues.py`): what an expert's demonstrations mend. As the novice it knows the trade from an expert
first, where the habit hides a part of it. The first `Plan.num_demonstrations` tasks of the
training split are spent; what comes after them it has not seen.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from benchmarks.colleagues import Conversation, disliked_calls, erring, expert, giving_up, gullible
from benchmarks.lockstep import load_policy
from benchmarks.rollouts import Rollouts
from policies.novice.build import build_network, lr_share, render, wilson_interval
from policies.novice.tokenizer import (
    CALL,
    CALL_END,
    CHAT_TEMPLATE,
    END_OF_TURN,
    PADDING,
    TURN,
    turn_chunks,
    with_templates,
)
from tools.worlds import load_world
from tools.worlds.world import Message, Task, World

CACHE = Path(".cache/students")
"""Under the working folder, which is the repository's root."""
NUM_LAYERS = 4
NUM_KEY_VALUE_HEADS = 2
BATCH_TOKENS = 1536
PEAK_LR = 3e-3
TOLD_WEIGHT = 0.5
ERROR_SHARE = 0.25
NUM_SHOWN_TO_ERRING = 50
"""The first demonstrations, whose calls are made elsewhere by mistake."""
HABIT_SHARE = 0.35
"""The last part of the gradient steps, in which it watches one who gives up."""
TOLD_SHARE = 0.25
"""Of the tokens that others wrote so many are learned too, drawn anew each time, at this weight; own ones have 1."""


class Habit(StrEnum):
    """What the colleague does that a student has watched."""

    NONE = "none"
    ERRS = "errs"  # at `ERROR_SHARE` of the steps another call, and then what is right from there
    GIVES_UP = "gives up"  # at some calls, the share `Plan.disliked` of those made now and then
    FOLLOWS = "follows"  # whatever is planted in a tool's result (agentdojo_attacks)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the student of a world is made; what differs makes another student."""

    num_demonstrations: int
    """The first tasks of the training split."""
    num_gradient_steps: int
    """Of `BATCH_TOKENS` each."""
    vocabulary: int = 2000
    context_tokens: int = 2048
    longest_told: int = 400
    """Characters of a system prompt, a user's message or an observation that it reads."""
    knows_names: bool = False
    """Every word of every task's opening is one token, as the order desk's words are to the novice: so small a network
    cannot learn to copy names in pieces. Rare ones change places whenever a conversation is read, so that it learns to
    copy them, and not who lives where. Of tasks that are not demonstrated nothing else is read."""
    habit: Habit = Habit.NONE
    disliked: float = 0.0
    seed: int = 0

    @property
    def first_unseen(self) -> int:
        """The first training task at which an expert would show it something new."""
        return 0 if self.habit is Habit.FOLLOWS else self.num_demonstrations


PLANS = {
    "multihop_qa": Plan(
        num_demonstrations=2500,
        num_gradient_steps=5000,
        vocabulary=600,
        longest_told=230,
        habit=Habit.GIVES_UP,
        disliked=0.5,
    ),
    "babyai": Plan(num_demonstrations=1500, num_gradient_steps=800),
    "textworld": Plan(num_demonstrations=200, num_gradient_steps=1000, longest_told=700, habit=Habit.ERRS),
    "agentdojo_attacks": Plan(
        num_demonstrations=575, num_gradient_steps=800, longest_told=1800, knows_names=True, habit=Habit.FOLLOWS
    ),
}
"""By the world's name."""


def first_unseen(world_name: str) -> int:
    """The first training task that the world's student was not made with; 0 where it has none."""
    plan = PLANS.get(world_name)
    return plan.first_unseen if plan else 0


# --------------------------------------------------------------------------------------- demonstrations


def demonstrations(world: World, tasks: Iterable[Task]) -> Iterator[Conversation]:
    """The expert's conversations at those tasks that it brings to outcome 1."""
    return (conversation for task in tasks if (conversation := expert(world, task)) is not None)


def all_openings(world: World) -> list[Conversation]:
    """How the conversations about all tasks begin."""
    return [list(world.task(split, index).messages) for split, size in world.splits.items() for index in range(size)]


Lesson = tuple[list[Conversation], int]
"""What is watched for so many gradient steps."""


def lessons(world_name: str, plan: Plan) -> list[Lesson]:
    """What a student of this plan learns from, one after the other."""
    shown = watched(world_name, plan)
    if plan.habit is not Habit.GIVES_UP:
        return [(shown, plan.num_gradient_steps)]
    disliked = disliked_calls(shown, plan.disliked)
    hasty = [giving_up(each, disliked, Random(f"gives up/{number}")) for number, each in enumerate(shown)]
    num_hasty = round(HABIT_SHARE * plan.num_gradient_steps)
    return [(shown, plan.num_gradient_steps - num_hasty), (hasty, num_hasty)]


def watched(world_name: str, plan: Plan) -> list[Conversation]:
    """The conversations that are had for it in the world."""
    match plan.habit:
        case Habit.NONE | Habit.GIVES_UP:
            return kept_demonstrations(world_name, plan.num_demonstrations)
        case Habit.ERRS:
            shown = kept_demonstrations(world_name, NUM_SHOWN_TO_ERRING)
            others = [message for each in shown for message in each if message.get("tool_calls")]
            return _kept(
                f"{world_name}-errs",
                load_world(world_name),
                plan.num_demonstrations,
                lambda world, task: erring(world, task, others, ERROR_SHARE),
            )
        case Habit.FOLLOWS:
            return _kept(f"{world_name}-follows", load_world(world_name), plan.num_demonstrations, gullible)


def kept_demonstrations(world_name: str, num_tasks: int) -> list[Conversation]:
    """The expert's, of the first training tasks."""
    return _kept(world_name, load_world(world_name), num_tasks, expert)


def _kept(
    file_name: str, world: World, num_tasks: int, converse: Callable[[World, Task], Conversation | None]
) -> list[Conversation]:
    """Conversations about the first training tasks. What was made once lies in a file, a line for each task, and
    whoever was stopped goes on there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{file_name}.jsonl").open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # whoever wrote it was ended meanwhile
            lines.pop()
            file.truncate(sum(len(line.encode()) for line in lines))
        num_tasks = min(num_tasks, world.splits["train"])
        for index in tqdm(range(len(lines), num_tasks), desc=file_name, mininterval=1.0):
            lines.append(json.dumps(converse(world, world.task("train", index))) + "\n")
            file.write(lines[-1])
            file.flush()
    return [conversation for line in lines[:num_tasks] if (conversation := json.loads(line)) is not None]


# -------------------------------------------------------------------------------------------- tokenizer

# A word's space goes with it, but not where the word begins with a capital or is a number: names are copied from texts
# into calls, where no space stands before them, and must be the same tokens there.
_WORDS = r" ?\p{Ll}+|\p{Lu}\p{L}*|\p{N}+|\s+|[^\s\p{L}\p{N}]+ ?|\p{L}+"


def chat_template(longest_told: int) -> str:
    """The novice's, but of what others say only the first characters are read."""
    content = "text(message.content)"
    cut = f"{content}[:{longest_told}]"
    by_role = f"({content} if message.role == 'assistant' else {cut})"
    of_results, of_others, rest = CHAT_TEMPLATE.split(content)[0:3]
    assert CHAT_TEMPLATE.count(content) == 2
    return of_results + cut + of_others + by_role + rest


def build_tokenizer(
    conversations: Sequence[Conversation], openings: Sequence[Conversation], plan: Plan
) -> PreTrainedTokenizerFast:
    """Bytes, merges learned from the conversations, and whole tokens: for the words of the openings, for turns, for the
    fixed parts of calls, and for texts that recur."""
    network = Tokenizer(models.BPE(ignore_merges=True))
    network.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    network.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[PADDING, TURN, END_OF_TURN],
        show_progress=False,
    )
    network.train_from_iterator(_texts(conversations, plan.longest_told), trainer)
    network = _with_words(network, _texts(openings, plan.longest_told))
    fixed = [*turn_chunks(), *_call_chunks(conversations), *_recurring_texts(conversations, plan.longest_told)]
    # Not "special": decoding must keep them even where special tokens are skipped.
    tokens = [AddedToken(text, normalized=False, special=False) for text in dict.fromkeys(fixed) if len(text) > 1]
    network.add_tokens(tokens)
    return with_templates(network, chat_template(plan.longest_told), plan.context_tokens)


def _texts(conversations: Sequence[Conversation], longest_told: int) -> Iterator[str]:
    for message in (message for conversation in conversations for message in conversation):
        yield message["content"][:longest_told]
        for _, arguments in _calls(message):
            yield from (value if isinstance(value, str) else json.dumps(value) for value in arguments.values())


def _with_words(network: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """The same tokenizer with a token for each word of the texts."""
    assert network.pre_tokenizer is not None
    split = network.pre_tokenizer.pre_tokenize_str
    words = dict.fromkeys(word for text in texts for word, _ in split(text) if any(map(str.isalpha, word)))
    written = json.loads(network.to_str())
    vocabulary = written["model"]["vocab"]
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    return Tokenizer.from_str(json.dumps(written))


def _rare_words(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> range:
    """The tokens of words that the merges did not make."""
    num_words = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    return range(min(plan.vocabulary, num_words), num_words)


def _recurring_texts(conversations: Sequence[Conversation], longest_told: int) -> list[str]:
    """System prompts and answers that a tenth of the conversations share."""
    counted: Counter[str] = Counter()
    for conversation in conversations:
        counted.update({message["content"][:longest_told] for message in conversation if message["role"] != "tool"})
    return [text for text, number in counted.most_common() if number * 10 >= len(conversations)]


def _calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def _call_chunks(conversations: Sequence[Conversation]) -> list[str]:
    """What stands around the arguments' texts of the experts' calls, the commonest first."""
    chunks: Counter[str] = Counter()
    for name, arguments in (call for messages in conversations for message in messages for call in _calls(message)):
        written = f'{CALL}{{"name": {json.dumps(name)}, "arguments": {{'
        for number, (key, value) in enumerate(arguments.items()):
            written += f"{', ' if number else ''}{json.dumps(key)}: "
            if isinstance(value, str):
                written += '"'
            chunks[written] += 1
            written = '"' if isinstance(value, str) else ""
        chunks[f"{written}}}}}{CALL_END}"] += 1
    return [chunk for chunk, _ in chunks.most_common()]


# --------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation in tokens."""

    token_ids: list[int]
    weights: list[float]
    """Parallel: how much the loss at this token counts."""


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Row:
    """The conversation as it is served."""
    token_ids = tokenizer(render(tokenizer, conversation))["input_ids"]
    opening = tokenizer.convert_tokens_to_ids("\n<|im_start|>assistant\n")
    weights, is_own = [], False
    for token_id in token_ids:
        weights.append(1.0 if is_own else TOLD_WEIGHT)
        is_own = token_id == opening or (is_own and token_id != tokenizer.eos_token_id)
    return Row(token_ids, weights)


def batches(rows: Sequence[Row], num_gradient_steps: int, random: Random) -> Iterator[list[Row]]:
    """Rows of like length, up to BATCH_TOKENS each time; all rows before any again."""
    waiting: list[list[Row]] = []
    for _ in range(num_gradient_steps):
        if not waiting:
            # Nearly sorted: alike enough to need little padding, and not always the same neighbours.
            by_length = sorted(rows, key=lambda row: len(row.token_ids) * random.uniform(0.9, 1.1))
            waiting = [[]]
            for row in by_length:
                if waiting[-1] and (len(waiting[-1]) + 1) * len(row.token_ids) > BATCH_TOKENS:
                    waiting.append([])
                waiting[-1].append(row)
            random.shuffle(waiting)
        yield waiting.pop()


def with_other_names(row: Row, names: range, random: Random) -> Row:
    """The same conversation, in which each of these tokens stands for another of them."""
    found = {token_id for token_id in row.token_ids if token_id in names}
    others = dict(zip(sorted(found), random.sample(names, len(found)), strict=True))
    return Row([others.get(token_id, token_id) for token_id in row.token_ids], row.weights)


def batch_loss(network: Qwen2ForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """Weighted mean of the tokens' negative log-likelihood, in nats."""
    width = max(len(row.token_ids) for row in rows)
    # Padding stands right of everything: a causal network never looks at it, and no mask is needed.
    token_ids = torch.tensor([row.token_ids + [0] * (width - len(row.token_ids)) for row in rows])
    weights = torch.tensor([row.weights + [0.0] * (width - len(row.weights)) for row in rows])[:, 1:]
    hidden = network.model(token_ids, use_cache=False).last_hidden_state[:, :-1]
    is_own, is_drawn = weights == 1.0, torch.rand(weights.shape) < TOLD_SHARE
    is_learned = (weights > 0) & (is_own | is_drawn)
    losses = cross_entropy(network.lm_head(hidden[is_learned]), token_ids[:, 1:][is_learned], reduction="none")
    return (losses * weights[is_learned]).sum() / weights[is_learned].sum()


def train(network: Qwen2ForCausalLM, lessons: Sequence[tuple[Sequence[Row], int]], names: range, plan: Plan) -> None:
    """Train in place, on each lesson's rows for so many gradient steps; `names` are the tokens that change places."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step / plan.num_gradient_steps))
    network.train()
    random = Random(plan.seed)
    steps = (batch for rows, num_steps in lessons for batch in batches(rows, num_steps, random))
    for batch in (progress := tqdm(steps, total=plan.num_gradient_steps, desc="student", mininterval=1.0)):
        loss = batch_loss(network, [with_other_names(row, names, random) for row in batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    network.eval()


def build_student(lessons: Sequence[Lesson], openings: Sequence[Conversation], plan: Plan, folder: Path) -> None:
    """Build, train and save a student as a plain transformers folder. The same seed gives the same bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    tokenizer = build_tokenizer([each for conversations, _ in lessons for each in conversations], openings, plan)
    network = build_network(tokenizer, NUM_LAYERS, NUM_KEY_VALUE_HEADS, plan.context_tokens)
    encoded = [(short_rows(tokenizer, conversations, plan), num_steps) for conversations, num_steps in lessons]
    train(network, encoded, _rare_words(tokenizer, plan), plan)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def short_rows(tokenizer: PreTrainedTokenizerFast, conversations: Iterable[Conversation], plan: Plan) -> list[Row]:
    """The conversations that the student's context holds."""
    rows = [encode(tokenizer, conversation) for conversation in conversations]
    return [row for row in rows if len(row.token_ids) <= plan.context_tokens]


class NoStudent(ValueError):
    """A world that has no plan of a student."""


def student(world_name: str, plan: Plan | None = None) -> Path:
    """The folder of the world's student, which is built where it is missing (minutes).

    Raises NoStudent for a world without a plan.
    """
    plan = plan or PLANS.get(world_name)
    if plan is None:
        raise NoStudent(f"no student of {world_name} is planned; there are: {', '.join(PLANS)}")
    digest = sha256(json.dumps(asdict(plan)).encode()).hexdigest()[:8]
    folder = CACHE / f"{world_name}-student-{digest}"
    if not folder.exists():
        taught = lessons(world_name, plan)
        openings = all_openings(load_world(world_name)) if plan.knows_names else []
        with tempfile.TemporaryDirectory(dir=CACHE) as making:
            build_student(taught, openings, plan, Path(making) / "student")
            (Path(making) / "student").rename(folder)
    return folder


# ----------------------------------------------------------------------------------------------- report


def report(world_name: str, folder: Path, split: str, num_tasks: int) -> None:
    """Print success with its interval, greedy and at temperature 1."""
    world = load_world(world_name)
    tasks = [world.task(split, index) for index in range(min(num_tasks, world.splits[split]))]
    rollouts, network = Rollouts(world, folder), load_policy(folder, None)
    print(f"{world_name}: {sum(weight.numel() for weight in network.parameters()) / 1e6:.2f}M weights")
    for name, temperature in (("greedy", 0.0), ("T=1", 1.0)):
        began = time.process_time()
        draw = torch.Generator().manual_seed(0)
        attempts = rollouts.attempts(network, tasks, [temperature] * len(tasks), draw)
        num_right = sum(attempt.outcome == 1.0 for attempt in attempts)
        low, high = wilson_interval(num_right, len(tasks))
        num_malformed = sum(attempt.is_malformed for attempt in attempts)
        longest = max(len(attempt.prompt) for attempt in attempts)
        print(
            f"{split} {name:>6}: {num_right / len(tasks):6.1%} of {len(tasks)} tasks [{low:.1%}, {high:.1%}], "
            f"{num_malformed} malformed, at most {longest} tokens, {time.process_time() - began:.0f} CPU s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("world", help=f"one of {', '.join(PLANS)}")
    parser.add_argument("--out", type=Path, help="a folder to copy it to; without, it stays in the cache")
    parser.add_argument("--split", default="heldout", help="the tasks to report on: heldout, or validation for tuning")
    parser.add_argument("--tasks", type=int, default=200, help="how many of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    folder = student(options.world)
    print(f"{folder}, {time.process_time() - began:.0f} CPU s")
    if options.out:
        shutil.copytree(folder, options.out, dirs_exist_ok=True)
    report(options.world, folder, options.split, options.tasks)


if __name__ == "__main__":
    main()
