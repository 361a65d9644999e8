"""The speed and memory of a preference pass over demonstrations: ours, TRL's DPOTrainer, and rows in plain torch.

    pip install -e '.[bench]'    # adds TRL with datasets, pandas and pyarrow; what is there stays as it is
    python -m benchmarks.learner_speed [--model FOLDER] [--competitors ours TRL] [--repeats 5] [--json FILE]

All do the same work: one pass of the DPO loss over preference pairs and one gradient step of a LoRA. There is
one pair for each step of a demonstration: the prompt is the whole history, the expert's action is chosen, another
rejected. Demonstrations are random tokens, 5, 10, 20 or 40 steps long, 8, 4, 2 or 1 of them a pass; or with --model an
expert's orders as that model reads them, rules and tools first, one demonstration of 6 or 10 steps a pass, without a
measurement of memory. It is checked to be the same work:
the losses of all passes agree. What is timed is forward, backward and gradient step; for ours also the building of the
trees. The reference's logprobs are made before, by all three (TRL: `precompute_ref_log_probs`).

Each competitor runs as fast as its settings permit on CPU: pairs sorted by length so that little is padded, no gradient
checkpointing, no logging, saving or evaluation. TRL's `padding_free` is switched off by TRL itself. Seconds are medians
over passes that alternate between the three in one process: CPU seconds of one thread, which are those of the clock on
an idle machine and hardly more on a busy one. Memory is measured apart, each in a process of its own: the peak of
resident memory during a pass over what was resident before it (Linux only).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.figures import forget_most_memory, memory_mib
from benchmarks.transcripts import expert_conversations, first_steps, states_of, tools_of
from learner.objectives.losses import implicit_step_loss
from learner.packing.prefix_tree import ScoredSequence, Span, pack_sequences
from learner.packing.scoring import reference, score, to_batch
from learner.packing.tree_attention import TREE_ATTENTION
from policies.chat.chat_protocol import ChatProtocol, message_action
from tools.worlds.order_desk import OrderDesk

OBSERVATION_TOKENS, ACTION_TOKENS = 32, 16
VOCAB_SIZE, PAD, END = 1000, 0, 1
TOKEN_BUDGET = 2560
BETA, LEARNING_RATE = 0.1, 1e-3
MEMORY_GOAL = 0.7
LOSS_TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------ the work


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one step: its history, the expert's action and another."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class RandomWork:
    """A small random network, and demonstrations of random tokens."""

    steps = (5, 10, 20, 40)
    pairs_per_pass, batch_size = 40, 8
    vocab_size = VOCAB_SIZE
    time_goals: Mapping[int, float] = {10: 8.0, 40: 20.0}
    words = "random Qwen2, 3 layers of 128, vocabulary 1000, float32"
    words_on_pairs = f"40 pairs a pass; {OBSERVATION_TOKENS} tokens of observation and {ACTION_TOKENS} of action a step"

    def pairs(self, num_steps: int) -> list[Pair]:
        """All steps of as many demonstrations as make a pass, shortest history first."""
        draw = random.Random(num_steps)

        def tokens(number: int) -> tuple[int, ...]:
            return tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(number))

        pairs = []
        for _ in range(self.pairs_per_pass // num_steps):
            history: tuple[int, ...] = ()
            for _ in range(num_steps):
                history += tokens(OBSERVATION_TOKENS)
                pair = Pair(history, *((*tokens(ACTION_TOKENS - 1), END) for _ in range(2)))
                pairs.append(pair)
                history += pair.chosen
        return sorted(pairs, key=lambda pair: len(pair.prompt))

    def network(self, attention: str) -> Any:
        config = Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            initializer_range=0.08,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )
        config._attn_implementation = attention
        return Qwen2ForCausalLM(config)


class RealWork:
    """A real network, and one expert who works through one order after the other, as that network reads it."""

    steps = (6, 10)
    batch_size = 1  # at two pairs of ten steps TRL was killed for memory, at 24 GB
    words_on_pairs = "a pair for each step of one expert who works through orders; rules and tools first"
    time_goals: Mapping[int, float] = {10: 10.0}

    def __init__(self, model: Path) -> None:
        self._model = model
        self.vocab_size = AutoConfig.from_pretrained(model).vocab_size
        self.words = f"{model.name}, float32"

    def pairs(self, num_steps: int) -> list[Pair]:
        """One for each of the expert's first steps. What is rejected is what it did a step before, or after the
        first."""
        world, protocol = OrderDesk(), ChatProtocol.load(self._model)
        orders = expert_conversations(world, "train", num_steps)
        conversation = first_steps([message for order in orders for message in order], num_steps)
        tools = tools_of(world, orders)
        steps = [protocol.completion_of(told, message_action(done), tools) for told, done in states_of(conversation)]
        actions = [action for _, action in steps]
        others = [actions[1], *actions[:-1]]
        return [Pair(prompt, right, other) for (prompt, right), other in zip(steps, others, strict=True)]

    def network(self, attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32, attn_implementation=attention)


Work = RandomWork | RealWork


def make_network(work: Work, attention: str) -> PeftModel:
    """In float32, with a fresh LoRA of rank 16 on all its linear layers."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    network = get_peft_model(work.network(attention), LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    assert isinstance(network, PeftModel)
    return network.train()


def make_optimizer(network: PeftModel) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)


# --------------------------------------------------------------------------------------------- competitors

RunPass = Callable[[], tuple[float, float]]
"""Runs one pass; returns its CPU seconds, and its mean loss before the gradient step."""


def prepare_packed(work: Work, pairs: list[Pair]) -> RunPass:
    """Ours: all rows merged into trees, one forward and backward a pack."""
    network, rows = make_network(work, TREE_ATTENTION), _rows(pairs)
    optimizer = make_optimizer(network)
    ref = torch.zeros(len(rows))
    with reference(network):
        for pack in pack_sequences(rows, TOKEN_BUDGET):
            scores = score(network, to_batch(pack, "cpu"))
            ref[list(scores.sequences)] = scores.sums()

    def run_pass() -> tuple[float, float]:
        began, total = time.process_time(), 0.0
        for pack in pack_sequences(rows, TOKEN_BUDGET):
            scores = score(network, to_batch(pack, "cpu"))
            sums, refs = scores.sums(), ref[list(scores.sequences)]
            loss = implicit_step_loss(sums[::2], refs[::2], sums[1::2], refs[1::2], beta=BETA, anchor_weight=0.0).loss
            (loss / len(pairs)).backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began, total / len(pairs)

    return run_pass


def _rows(pairs: list[Pair]) -> list[ScoredSequence]:
    """Two rows a pair, chosen first; a pair owns its rows, so packs hold whole pairs in this order."""
    return [
        ScoredSequence(pair.prompt + action, (Span(len(pair.prompt), len(pair.prompt) + len(action)),), owner=number)
        for number, pair in enumerate(pairs)
        for action in (pair.chosen, pair.rejected)
    ]


def prepare_rows(work: Work, pairs: list[Pair]) -> RunPass:
    """A row for each step and side, in padded batches, in plain torch: causal kernel, logits only at the actions."""
    network = make_network(work, "sdpa")
    optimizer = make_optimizer(network)
    batches = [pairs[start : start + work.batch_size] for start in range(0, len(pairs), work.batch_size)]
    with reference(network):
        refs = [_row_logprobs(network, batch) for batch in batches]

    def run_pass() -> tuple[float, float]:
        began, total = time.process_time(), 0.0
        for batch, ref in zip(batches, refs, strict=True):
            ratios = _row_logprobs(network, batch) - ref
            loss = -torch.nn.functional.logsigmoid(BETA * (ratios[: len(batch)] - ratios[len(batch) :])).sum()
            (loss / len(pairs)).backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began, total / len(pairs)

    return run_pass


def _row_logprobs(network: PeftModel, batch: list[Pair]) -> Tensor:
    """[2 * pairs]: the logprobs of the chosen actions, then of the rejected ones."""
    rows = [(pair.prompt, pair.chosen) for pair in batch] + [(pair.prompt, pair.rejected) for pair in batch]
    input_ids = pad_sequence(
        [torch.tensor(prompt + action) for prompt, action in rows], batch_first=True, padding_value=PAD
    )
    owners = torch.tensor([number for number, (_, action) in enumerate(rows) for _ in action])
    places = torch.tensor([len(prompt) + at - 1 for prompt, action in rows for at in range(len(action))])
    targets = torch.tensor([token for _, action in rows for token in action])
    causal_lm: Any = network.get_base_model()
    hidden = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state  # padding is to the right: unseen
    logprobs = causal_lm.lm_head(hidden[owners, places]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return torch.zeros(len(rows)).index_add(0, owners, logprobs)


def prepare_trl(work: Work, pairs: list[Pair]) -> RunPass:
    """TRL's DPOTrainer: one call of `train`, each epoch a pass, timed from the epoch's begin to its end.

    The trainer runs in a thread that is let go on for one epoch at a time: it cannot be stopped and resumed otherwise.
    """
    turns, results = queue.Queue[bool](), queue.Queue[tuple[float, float]]()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        trainer = _trl_trainer(work, pairs, _epoch_clock(turns, results))
    thread = threading.Thread(target=trainer.train, daemon=True)

    def run_pass() -> tuple[float, float]:
        if not thread.is_alive():
            thread.start()
        turns.put(True)
        return results.get()

    return run_pass


def _epoch_clock(turns: queue.Queue[bool], results: queue.Queue[tuple[float, float]]) -> Any:
    """A callback that waits for its turn before each epoch, and hands in the epoch's seconds and mean loss after it."""
    from transformers import TrainerCallback

    class EpochClock(TrainerCallback):
        began = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            turns.get()
            self.began = time.process_time()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.process_time() - self.began

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                results.put((self.seconds, logs["loss"]))

    return EpochClock()


def _trl_trainer(work: Work, pairs: list[Pair], callback: Any) -> Any:
    import datasets  # pyright: ignore[reportMissingImports]
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = [
        {"prompt": _text(pair.prompt) + " ", "chosen": _text(pair.chosen), "rejected": _text(pair.rejected)}
        for pair in pairs
    ]
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        num_train_epochs=10_000,  # one epoch a pass; the benchmark ends before
        per_device_train_batch_size=work.batch_size,
        gradient_accumulation_steps=len(pairs) // work.batch_size,  # one gradient step a pass, like the others
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=make_network(work, "sdpa"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(work.vocab_size, end=pairs[0].chosen[-1]),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _text(token_ids: tuple[int, ...]) -> str:
    return " ".join(map(_word, token_ids))


def _word(token: int) -> str:
    return f"<{token}>"


def _tokenizer(vocab_size: int, end: int) -> PreTrainedTokenizerFast:
    """A word a token: undoes `_text`."""
    tokenizer = Tokenizer(WordLevel({_word(token): token for token in range(vocab_size)}, unk_token=_word(PAD)))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_word(PAD), eos_token=_word(end))


COMPETITORS: dict[str, Callable[[Work, list[Pair]], RunPass]] = {
    "ours": prepare_packed,
    "TRL": prepare_trl,
    "rows": prepare_rows,
}


# ---------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True, slots=True)
class Measurement:
    """One competitor on demonstrations of one length."""

    competitor: str
    num_steps: int
    seconds: float
    """Median CPU seconds of a pass."""
    seconds_low: float
    seconds_high: float
    """The fastest and the slowest pass."""
    peak_mib: float | None
    """Peak resident memory during a pass over what was resident before; None where it was not measured."""
    losses: tuple[float, ...]
    """Mean loss of each pass, before its gradient step."""


def measure(work: Work, names: Sequence[str], num_steps: int, repeats: int, bar: tqdm[Any]) -> list[Measurement]:
    """All competitors on the same pairs, pass by pass in turn."""
    pairs = work.pairs(num_steps)
    runs = {name: COMPETITORS[name](work, pairs) for name in names}
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run_pass in runs.items():
            bar.set_description(f"{num_steps} steps, {name}")
            passes[name].append(run_pass())
            bar.update()
    return [_summary(work, name, num_steps, found) for name, found in passes.items()]


def _summary(work: Work, competitor: str, num_steps: int, passes: list[tuple[float, float]]) -> Measurement:
    seconds = [seconds for seconds, _ in passes]
    return Measurement(
        competitor,
        num_steps,
        seconds=statistics.median(seconds),
        seconds_low=min(seconds),
        seconds_high=max(seconds),
        peak_mib=_peak_in_child(competitor, num_steps) if isinstance(work, RandomWork) else None,
        losses=tuple(loss for _, loss in passes),
    )


def _peak_in_child(competitor: str, num_steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.learner_speed", "--peak", competitor, str(num_steps)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {competitor} failed:\n{child.stderr}")
    return float(child.stdout.split()[-1])


def print_peak(competitor: str, num_steps: int) -> None:
    """In a process of its own: MiB that a pass adds. A pass over short demonstrations goes before, for lazy imports."""
    prepare, work = COMPETITORS[competitor], RandomWork()
    prepare(work, work.pairs(work.steps[0]))()
    run_pass = prepare(work, work.pairs(num_steps))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back to the system, else the pass would reuse it unseen
    forget_most_memory()
    before = memory_mib()
    run_pass()
    print(memory_mib("VmHWM") - before)


def check_losses(measurements: list[Measurement]) -> float:
    """The largest relative difference between the competitors' losses. Raises where it is not the same work."""
    by_steps = {m.num_steps: m for m in measurements if m.competitor == "ours"}
    differences = [
        abs(loss - ours) / ours
        for m in measurements
        for loss, ours in zip(m.losses, by_steps[m.num_steps].losses, strict=True)
    ]
    if max(differences) > LOSS_TOLERANCE:
        raise RuntimeError(f"the losses differ by {max(differences):.1e}: the competitors do not do the same work")
    return max(differences)


# ------------------------------------------------------------------------------------------------- the table


def print_table(work: Work, measurements: list[Measurement]) -> None:
    """One line a length and competitor, and the verdict on each goal."""
    found = {(m.num_steps, m.competitor): m for m in measurements}
    print(
        f"\n{'steps':>5} {'':6}{'seconds a pass (range)':>27}{'growth':>9}{'peak MiB':>10}{'ours is':>15}{'memory':>8}"
    )
    for m in measurements:
        ours = found[m.num_steps, "ours"]
        growth = m.seconds / found[work.steps[0], m.competitor].seconds
        versus = "" if m is ours else f"{m.seconds / ours.seconds:8.1f}x faster{_share(ours, m)}"
        seconds = f"{m.seconds:.3f} ({m.seconds_low:.3f} to {m.seconds_high:.3f})"
        memory = "-" if m.peak_mib is None else f"{m.peak_mib:.0f}"
        print(f"{m.num_steps:>5} {m.competitor:6}{seconds:>27}{growth:>8.1f}x{memory:>10}{versus}")
    print(f"growth: against {work.steps[0]} steps")
    peers = {m.competitor for m in measurements}
    if "TRL" not in peers:
        return
    for num_steps, goal in work.time_goals.items():
        speedup = found[num_steps, "TRL"].seconds / found[num_steps, "ours"].seconds
        print(f"goal {goal:g}x faster than TRL at {num_steps} steps: {speedup:.1f}x, {_verdict(speedup >= goal)}")
    if isinstance(work, RandomWork):
        worst = max(_share_of_memory(found[n, "ours"], found[n, "TRL"]) for n in work.steps)
        print(f"goal {MEMORY_GOAL}x of TRL's memory: at most {worst:.2f}x, {_verdict(worst <= MEMORY_GOAL)}")


def _share(ours: Measurement, theirs: Measurement) -> str:
    return "" if ours.peak_mib is None else f"{_share_of_memory(ours, theirs):7.2f}x"


def _share_of_memory(ours: Measurement, theirs: Measurement) -> float:
    assert ours.peak_mib is not None
    assert theirs.peak_mib is not None
    return ours.peak_mib / theirs.peak_mib


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def settings(work: Work) -> dict[str, str]:
    """What the figures depend on, for the table and the file."""
    trl_version = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else "not installed"
    return {
        "network": f"{work.words}; LoRA r16 on all linear layers; AdamW",
        "pass": "preference pairs, forward, backward, one gradient step; reference made before",
        "work": work.words_on_pairs,
        "ours": f"token budget {TOKEN_BUDGET}",
        "TRL": f"{trl_version}, batch {work.batch_size} pairs sorted by length, precompute_ref_log_probs, one gradient "
        "step a pass, no gradient checkpointing, no logging within a pass, no saving",
        "rows": f"plain torch, batch {work.batch_size} pairs sorted by length, causal kernel, logits at actions only",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a real network's folder; default: a small random one")
    parser.add_argument("--competitors", nargs="+", default=list(COMPETITORS), choices=COMPETITORS)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each competitor (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the table here too")
    parser.add_argument("--peak", nargs=2, metavar=("COMPETITOR", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]))
        return
    if "TRL" in options.competitors and importlib.util.find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -e '.[bench]', or --competitors ours rows")
    work = RealWork(options.model) if options.model else RandomWork()
    measurements: list[Measurement] = []
    with tqdm(total=len(work.steps) * len(options.competitors) * options.repeats, unit="pass") as bar:
        for num_steps in work.steps:
            measurements += (found := measure(work, options.competitors, num_steps, options.repeats, bar))
            for one in found:
                tqdm.write(f"{one.competitor}, {num_steps} steps: {one.seconds:.3f} s a pass", file=sys.stderr)
    told = settings(work)
    for name, setting in told.items():
        print(f"{name}: {setting}")
    print(f"same work: the losses of all passes agree within {check_losses(measurements):.0e}")
    print_table(work, measurements)
    if options.json:
        options.json.write_text(json.dumps({"settings": told, "rows": [asdict(m) for m in measurements]}, indent=1))


if __name__ == "__main__":
    main()
