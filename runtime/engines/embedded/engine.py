"""The embedded engine: a causal network from a folder, with PEFT adapters, served in this process.

One thread runs the batch; a request that comes while others run joins them at the next token. transformers' own
continuous batching (`ContinuousBatchingManager`) was looked at first and runs on CPU, but it cannot stand here: its
seed is one for the whole batch, it reports the sampled token's logprob only and none of the likeliest tokens, it
takes no adapter per request, and it is slower than this on small networks (benchmarks/embedded_engine.py).

Not covered: quantised weights, several GPUs, sequences longer than memory allows for every slot. vLLM does those.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, load_peft_weights
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from policies.adapters.probe import tolerance_in
from policies.types import Adapter, EngineError, EngineHealth, EngineLimits, SampledToken, SamplingParams
from runtime.engines.embedded.attention import ATTENTION
from runtime.engines.embedded.batch import Batch, Outcome, Row
from runtime.engines.embedded.grammar import Grammars
from runtime.engines.embedded.lora import LoraRows, LoraWeights

logger = logging.getLogger(__name__)

MAX_PREFILL_TOKENS = 2048
"""Prompt tokens, padding included, that may hold up the running rows in one step; a longer prompt goes alone."""


@dataclass(eq=False, slots=True)
class Request(Row):
    """A row, and the coroutine that waits for its tokens."""

    loop: asyncio.AbstractEventLoop = field(kw_only=True)
    outcomes: asyncio.Queue[Outcome] = field(default_factory=asyncio.Queue, kw_only=True)
    is_cancelled: bool = field(default=False, kw_only=True)
    """Set by the coroutine when nobody reads on; the thread sees it at its next step."""


class EmbeddedEngine:
    """The `Engine` protocol of policies/types.py on transformers and PEFT."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        tokenizer: Any = None,
        device: str = "auto",
        max_batch_size: int = 32,
        max_adapters: int = 4,
        max_rank: int = 64,
        max_context_tokens: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Load the network and start the thread.

        `tokenizer` is only needed for grammars. `device` is a torch device, or `auto`: a GPU if there is one.
        `max_context_tokens` defaults to what the network was made for, at most 4096. `num_threads` are torch's.
        """
        self._network = load_network(model_path, device)
        config = self._network.config
        self._limits = EngineLimits(
            max_context_tokens=max_context_tokens or min(config.max_position_embeddings, 4096),
            max_adapters=max_adapters,
            max_rank=max_rank,
            vocab_size=config.vocab_size,
            supports_grammar=tokenizer is not None,
            logprob_tolerance=tolerance_in(self._network.dtype),
        )
        self._grammars = Grammars(tokenizer, config.vocab_size) if tokenizer is not None else None
        self._lora_rows = LoraRows(self._network)
        self._batch: Batch[Request] = Batch(
            self._network, self._lora_rows, self._grammars, max_batch_size, self._limits.max_context_tokens
        )
        self._max_batch_size = max_batch_size
        self._num_threads = num_threads
        self._adapters: dict[str, Adapter] = {}
        # What the coroutines hand to the thread; both deques and `_problem` are guarded by the condition.
        self._work = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._problem = ""
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Request, Outcome]]] = {}
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- what the coroutines call

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens that went through the network since the start."""
        return self._batch.num_prefilled_tokens

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that an earlier request's keys and values spared since the start."""
        return self._batch.num_reused_tokens

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, whole: bool = False
    ) -> AsyncIterator[SampledToken]:
        """See `Engine.generate`. A grammar that does not compile is an EngineError too."""
        self._check(prompt_token_ids, sampling, adapter)
        grammar = None
        if sampling.grammar is not None:
            assert self._grammars is not None
            grammar = await asyncio.to_thread(self._grammars.start, sampling.grammar, sampling.stop_token_ids)
        loop = asyncio.get_running_loop()
        request = Request(tuple(prompt_token_ids), sampling, adapter, grammar, loop=loop)
        self._submit(request)
        try:
            while True:
                outcome = await request.outcomes.get()
                if isinstance(outcome, EngineError):
                    raise outcome
                yield outcome
                if outcome.finish_reason is not None:
                    return
        finally:
            request.is_cancelled = True

    async def load_adapter(self, adapter: Adapter) -> None:
        """See `Engine.load_adapter`. The files are read beside the running batch; only the last move stops it."""
        self._check_room(adapter)
        weights = await asyncio.to_thread(read_adapter, adapter.path, self._network, self._limits.max_rank)
        await self._command(lambda: self._install(adapter, weights))

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See `Engine.unload_adapter`."""
        await self._command(lambda: self._remove(adapter))

    def loaded_adapters(self) -> tuple[Adapter, ...]:
        return tuple(self._adapters.values())

    def health(self) -> EngineHealth:
        with self._work:
            return EngineHealth(not self._problem, len(self._batch.rows), len(self._waiting), self._problem)

    async def close(self) -> None:
        """See `Engine.close`."""
        with self._work:
            self._problem = self._problem or "the engine is closed"
            self._work.notify()
        await asyncio.to_thread(self._thread.join)

    def _check(self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None) -> None:
        limits = self._limits
        if not prompt_token_ids:
            raise EngineError("the prompt is empty")
        if len(prompt_token_ids) >= limits.max_context_tokens:
            raise EngineError(
                f"the prompt has {len(prompt_token_ids)} tokens; the context of {limits.max_context_tokens} "
                "must also hold a completion"
            )
        for token_id in (*prompt_token_ids, *sampling.stop_token_ids):
            if not 0 <= token_id < limits.vocab_size:
                raise EngineError(f"token id {token_id} is outside the vocabulary of {limits.vocab_size}")
        if sampling.grammar is not None and not limits.supports_grammar:
            raise EngineError("this engine was made without a tokenizer, which a grammar needs")
        self._check_loaded(adapter)

    def _check_loaded(self, adapter: Adapter | None) -> None:
        if adapter is not None and self._adapters.get(adapter.name) != adapter:
            raise EngineError(f"adapter {adapter.name} is not loaded; loaded are {sorted(self._adapters)}")

    def _check_room(self, adapter: Adapter) -> None:
        if adapter.name in self._adapters:
            raise EngineError(f"adapter {adapter.name} is loaded already")
        if len(self._adapters) >= self._limits.max_adapters:
            raise EngineError(
                f"all {self._limits.max_adapters} places for adapters are taken: {sorted(self._adapters)}"
            )

    def _submit(self, request: Request) -> None:
        with self._work:
            if self._problem:
                raise EngineError(self._problem)
            self._waiting.append(request)
            self._work.notify()

    async def _command(self, action: Callable[[], None]) -> None:
        """Have the thread do something between two steps."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it will be done, also where the one who asks has gone away meanwhile
        with self._work:
            if self._problem:
                raise EngineError(self._problem)
            self._commands.append((action, done))
            self._work.notify()
        await asyncio.wrap_future(done)

    # --------------------------------------------------------------------------------- what the thread does

    def _run(self) -> None:
        try:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)  # OpenMP counts threads per calling thread
            with torch.inference_mode():
                while self._wait_for_work():
                    self._obey()
                    self._step()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._stop(f"the engine's thread died: {error!r}")
        self._stop("the engine is closed")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine is to end."""
        with self._work:
            self._work.wait_for(lambda: self._problem or self._batch.rows or self._waiting or self._commands)
            return not self._problem

    def _obey(self) -> None:
        while self._commands:
            action, done = self._commands.popleft()
            try:
                action()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._decode()
        self._deliver()

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._batch.rows if row.is_cancelled]:
            self._batch.leave(row, keep=True)
        with self._work:
            for request in [request for request in self._waiting if request.is_cancelled]:
                self._waiting.remove(request)

    def _admit(self) -> None:
        arrivals = self._next_arrivals()
        if not arrivals:
            return
        try:
            outcomes = self._batch.join(arrivals)
        except Exception as error:
            for request in arrivals:
                self._post(request, EngineError(f"computing the prompt failed: {error!r}"))
            return
        self._settle(arrivals, outcomes)

    def _next_arrivals(self) -> list[Request]:
        """Those who waited longest, as many as find a place and may be computed at once."""
        arrivals: list[Request] = []
        longest = 0
        with self._work:
            while self._waiting and len(self._batch.rows) + len(arrivals) < self._max_batch_size:
                longest = max(longest, len(self._waiting[0].prompt_token_ids))
                if arrivals and longest * (len(arrivals) + 1) > MAX_PREFILL_TOKENS:
                    break
                arrivals.append(self._waiting.popleft())
        return arrivals

    def _decode(self) -> None:
        rows = list(self._batch.rows)
        if not rows:
            return
        try:
            outcomes = self._batch.step()
        except Exception as error:
            failure = EngineError(f"a decoding step failed: {error!r}")
            outcomes = [failure] * len(rows)
        self._settle(rows, outcomes)

    def _settle(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        """Post what a step gave, and let those leave who are done or failed."""
        for request, outcome in zip(requests, outcomes, strict=True):
            self._post(request, outcome)
            if isinstance(outcome, EngineError):
                self._batch.leave(request, keep=False)
            elif outcome.finish_reason is not None:
                self._batch.leave(request, keep=True)

    def _post(self, request: Request, outcome: Outcome) -> None:
        self._outbox.setdefault(request.loop, []).append((request, outcome))

    def _deliver(self) -> None:
        """Hand a step's outcomes over: one call per event loop, however many rows ran."""
        outbox, self._outbox = self._outbox, {}
        for loop, posts in outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed, and with it everyone who waits there
                loop.call_soon_threadsafe(put_outcomes, posts)

    def _install(self, adapter: Adapter, weights: Mapping[str, LoraWeights]) -> None:
        self._check_room(adapter)
        self._lora_rows.add(adapter.name, weights)
        self._adapters[adapter.name] = adapter

    def _remove(self, adapter: Adapter) -> None:
        self._check_loaded(adapter)
        with self._work:
            users = [request for request in (*self._batch.rows, *self._waiting) if request.adapter == adapter]
        if users:
            raise EngineError(f"adapter {adapter.name} is in use by {len(users)} completions")
        del self._adapters[adapter.name]
        self._lora_rows.remove(adapter.name)
        self._batch.forget(adapter.name)

    def _stop(self, problem: str) -> None:
        """Refuse what comes from now on, and end all that is pending."""
        with self._work:
            self._problem = self._problem or problem
            requests = [*self._batch.rows, *self._waiting]
            self._waiting.clear()
            self._batch.rows.clear()
            commands = list(self._commands)
            self._commands.clear()
        for request in requests:
            self._post(request, EngineError(self._problem))
        for _, done in commands:
            done.set_exception(EngineError(self._problem))
        self._deliver()


def put_outcomes(posts: Sequence[tuple[Request, Outcome]]) -> None:
    """Runs on the event loop."""
    for request, outcome in posts:
        request.outcomes.put_nowait(outcome)


# ----------------------------------------------------------------------------------------------- reading files


def load_network(model_path: str | Path, device: str) -> PreTrainedModel:
    """The network of a local folder, ready to infer: float32 on CPU, in its own type on a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    network = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation=ATTENTION)
    nn.Module.to(network, device)
    return network.eval().requires_grad_(False)


def read_adapter(path: Path, network: PreTrainedModel, max_rank: int) -> dict[str, LoraWeights]:
    """Read a PEFT folder as LoRA weights per linear layer of the network. Raises EngineError for whatever this
    engine would not serve exactly as PEFT does.

    The files are read with PEFT's functions, but no PEFT model is built for it: that keeps the interpreter busy for a
    tenth of a second where the network is small, seconds where it has many layers, and every running completion would
    wait for it token by token.
    """
    try:
        config = plain_lora(PeftConfig.from_pretrained(str(path)))
        tensors = load_peft_weights(str(path), device="cpu")
        layers = target_layers(config, network)
        require_tensors(path, tensors, layers)
        weights = {name: lora_weights(name, layer, tensors, config, network) for name, layer in layers.items()}
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"adapter folder {path} cannot be read: {error}") from error
    rank = max((part.a.shape[0] for part in weights.values()), default=0)
    if not 0 < rank <= max_rank:
        raise EngineError(f"adapter folder {path} has rank {rank}; this engine takes 1 to {max_rank}")
    return weights


def plain_lora(config: PeftConfig) -> LoraConfig:
    """The configuration, if it is of an adapter that is nothing but low-rank pairs. Raises EngineError else."""
    if not isinstance(config, LoraConfig):
        raise EngineError(f"only LoRA adapters are served, not {config.peft_type}")
    extras = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication")
    used = [name for name in (*extras, "fan_in_fan_out", "target_parameters") if getattr(config, name, None)]
    if config.bias != "none":
        used.append("bias")
    if used:
        raise EngineError(f"only plain LoRA adapters are served, this one uses {', '.join(used)}")
    return config


def target_layers(config: LoraConfig, network: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that an adapter changes, by their path in the network."""
    layers = {name: module for name, module in network.named_modules() if check_target_module_exists(config, name)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise EngineError(f"only plain LoRA on linear layers is served, not on {name}, a {type(layer).__name__}")
    return layers  # type: ignore[return-value]


def require_tensors(path: Path, tensors: Mapping[str, torch.Tensor], layers: Iterable[str]) -> None:
    wanted = {tensor_name(layer, side) for layer in layers for side in "AB"}
    if tensors.keys() != wanted:
        missing, unexpected = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise EngineError(f"adapter folder {path}: missing {missing[:3]}, unexpected {unexpected[:3]}")


def tensor_name(layer: str, side: str) -> str:
    return f"base_model.model.{layer}.lora_{side}.weight"


def lora_weights(
    name: str, layer: nn.Linear, tensors: Mapping[str, torch.Tensor], config: LoraConfig, network: PreTrainedModel
) -> LoraWeights:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    a, b = (tensors[tensor_name(name, side)].to(network.device, network.dtype) for side in "AB")
    for tensor, shape in ((a, (rank, layer.in_features)), (b, (layer.out_features, rank))):
        if tensor.shape != shape:
            raise ValueError(f"on {name} lies a matrix of {tuple(tensor.shape)}, where {shape} belongs")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise EngineError(f"the adapter's weights on {name} are not finite")
    return LoraWeights(a, (b * scaling).T.contiguous())
