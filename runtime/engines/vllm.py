"""The engine for GPUs: vLLM's AsyncLLM, with adapters that come and go while it serves. Runs on vLLM's CPU build too.

Tokens go in and out; vLLM's HTTP server, chat templates and tool parsers are not used. Every adapter version is a new
name, a new integer id and a new folder, because vLLM's prefix cache is keyed by them: an adapter that is loaded in
place would be served on the blocks of the old one. vLLM is never left to decide which adapters it holds: a full
cache would be made room in by eviction, and an evicted adapter read again in the middle of a batch, where a missing
folder kills the engine. So places are counted here, and loaded adapters are pinned.

vLLM computes in a process of its own (more with several GPUs); `SupervisedEngine` starts it again when it dies.

Not covered: quantised adapters, images; adapters on the embeddings or the output head (`lora_target_modules`).
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import safetensors
from transformers import AutoConfig

from policies.adapters.files import TENSOR_NAME, WEIGHTS_FILE
from policies.adapters.probe import tolerance_in
from policies.types import (
    Adapter,
    EngineError,
    EngineHealth,
    EngineLimits,
    FinishReason,
    SampledToken,
    SamplingParams,
)

# vLLM reads these when it is imported, here and in the process it starts. What the user has set stays as it is set.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# No choice: a forked engine would inherit this process's threads, locks and database connections.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

from vllm.config import StructuredOutputsConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError

T = TypeVar("T")

TARGET_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""vLLM's names of the linear modules that adapters may change. The output head is left out: wrapped, it is slower."""

PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
PACKED["up_proj"] = "gate_up_proj"
"""Modules of a checkpoint that vLLM computes as a part of a larger one."""

OWN_ENGINE_ARGS = frozenset(
    "model tokenizer enable_lora max_loras max_cpu_loras max_lora_rank max_num_seqs logprobs_mode "
    "enable_sleep_mode structured_outputs_config disable_log_stats".split()
)
"""Set by this engine, because its promises depend on them; most have an option of their own."""

MAX_CONTEXT_ON_CPU = 4096
MIN_KV_CACHE_BYTES = 64 << 20
NUM_CONTEXTS_IN_KV_CACHE = 8
"""On a CPU, vLLM would reserve most of the memory; this many full contexts, shared by all completions, do."""

NUM_NULL_PLACES = 1
"""vLLM's CPU kernels take place -1, "no adapter", for the last place: where a batch is mixed, the base network's rows
would be computed with the adapter that lies there (vLLM pull request 48421). The last place is taken last: one place
more than adapters stays empty for ever."""

WHOLE = 2**30
"""As a stream's interval, in tokens: after the first, all come with the last."""

SHUTDOWN_TIMEOUT_S = 10.0


@dataclass(eq=False, slots=True)
class Stream:
    """One completion on its way."""

    adapter: Adapter | None
    has_begun: bool = False
    """Its first token has come: it has a place in the batch."""


class VllmEngine:
    """The `Engine` protocol of policies/types.py on vLLM. Made by `start`."""

    def __init__(self, llm: AsyncLLM, limits: EngineLimits, target_modules: Sequence[str]) -> None:
        self._llm = llm
        self._limits = limits
        self._target_modules = frozenset(target_modules)
        self._adapters: dict[str, Adapter] = {}
        self._loading: set[str] = set()
        self._streams: set[Stream] = set()
        self._is_closed = False

    @classmethod
    async def start(
        cls,
        model: str | Path,
        tell_stage: Callable[[str], object] = lambda _: None,
        *,
        tokenizer: str | Path | None = None,
        max_batch_size: int = 32,
        max_adapters: int = 4,
        max_rank: int = 64,
        max_context_tokens: int | None = None,
        num_threads: int | None = None,
        gpu_memory_fraction: float | None = None,
        engine_args: Mapping[str, str] | None = None,
    ) -> VllmEngine:
        """Start vLLM's process, load the network and let it answer once, so that no user waits for a first compile.

        `model` is a folder or hub name; `tokenizer` one more, where the model's own folder has none. `max_adapters`
        lie in the engine at a time. `num_threads` count on a CPU only, `gpu_memory_fraction` on GPUs only.
        `engine_args` are passed on to vLLM (`tensor_parallel_size`: `2`), by the names and in the spelling of its
        command line, and go before all these. `tell_stage` is told what is being done. Takes 20 s and more, in which
        the event loop is free. Raises EngineError where vLLM cannot start, ValueError for a wrong argument.
        """
        settings = own_engine_args(
            str(model), tokenizer, max_batch_size, max_adapters, max_rank, max_context_tokens, num_threads
        )
        if gpu_memory_fraction is not None:
            settings["gpu_memory_utilization"] = gpu_memory_fraction
        args = parse_engine_args(settings, engine_args or {})
        tell_stage("vLLM's process starts and loads the network")
        try:
            llm = await asyncio.to_thread(start_llm, args)
        except Exception as error:
            raise EngineError(f"vLLM cannot start with {model}: {error}") from error
        config = llm.vllm_config
        limits = EngineLimits(
            max_context_tokens=config.model_config.max_model_len,
            max_adapters=max_adapters,
            max_rank=config.lora_config.max_lora_rank,
            vocab_size=config.model_config.get_vocab_size(),
            supports_grammar=llm.tokenizer is not None,
            logprob_tolerance=tolerance_in(config.model_config.dtype),
            supports_penalties=True,
        )
        engine = cls(llm, limits, config.lora_config.target_modules or TARGET_MODULES)
        tell_stage("it answers once, so that no user waits for a first compile")
        try:
            await engine._warm_up()
        except BaseException:
            await engine.close()  # else its process would hold the GPU, and nobody knew of it
            raise
        return engine

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of vLLM's own processes on this machine."""
        manager = self._llm.engine_core.resources.engine_manager
        return tuple(process.pid for process in manager.processes)

    # ------------------------------------------------------------------------------------------- completions

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, whole: bool = False
    ) -> AsyncIterator[SampledToken]:
        """See `Engine.generate`. Under a grammar the tokenizer's own end token ends a completion too."""
        self._check(prompt_token_ids, sampling, adapter)
        outputs = self._llm.generate(
            tokens_input(list(prompt_token_ids)),
            self._vllm_sampling(sampling, WHOLE if whole else None),
            request_id=uuid.uuid4().hex,
            lora_request=None if adapter is None else lora_request(adapter),
        )
        stream = Stream(adapter)
        self._streams.add(stream)
        try:
            async for output in outputs:
                stream.has_begun = True
                for token in sampled_tokens(output.outputs[0], sampling.num_top_logprobs):
                    yield token
        except EngineError:
            raise
        except Exception as error:
            raise self._engine_error(error) from error
        finally:
            await outputs.aclose()  # aborts it, where it has not ended; awaited, so that an unload comes after it
            self._streams.remove(stream)

    def _check(self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None) -> None:
        self._check_alive()
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
            raise EngineError("this model has no tokenizer, which a grammar needs")
        self._check_loaded(adapter)

    def _vllm_sampling(self, sampling: SamplingParams, stream_interval: int | None) -> VllmSamplingParams:
        stop_token_ids, structured_outputs = list(sampling.stop_token_ids), None
        if sampling.grammar is not None:
            structured_outputs = StructuredOutputsParams(grammar=sampling.grammar)
            stop_token_ids.append(self._llm.tokenizer.eos_token_id)  # the one end that vLLM's masks know
        try:
            return VllmSamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                frequency_penalty=sampling.frequency_penalty,
                presence_penalty=sampling.presence_penalty,
                logit_bias=dict(sampling.logit_bias) or None,
                seed=None if sampling.seed is None else sampling.seed % 2**63,  # vLLM takes -1 for "no seed"
                stop_token_ids=stop_token_ids,
                ignore_eos=True,  # what ends a completion is said by the caller
                logprobs=sampling.num_top_logprobs,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                stream_interval=stream_interval,
                structured_outputs=structured_outputs,
            )
        except Exception as error:  # vLLM's own, of no common kind
            raise EngineError(f"vLLM cannot sample like this: {error}") from error

    async def _warm_up(self) -> None:
        """Pay for what a first request would pay for: kernels of the samplers, and a tokenizer made for grammars."""
        plain = SamplingParams(max_tokens=4, temperature=0.9, top_p=0.9, top_k=8, seed=0, num_top_logprobs=20)
        bound = [SamplingParams(max_tokens=4, grammar="start: /[a-z]*/")] if self._limits.supports_grammar else []
        for sampling in (plain, *bound):
            async for _ in self.generate([0, 0, 0], sampling, None):
                pass

    # ---------------------------------------------------------------------------------------------- adapters

    async def load_adapter(self, adapter: Adapter) -> None:
        """See `Engine.load_adapter`. A load that has begun is ended, also where its caller goes away."""
        self._check_alive()
        self._check_room(adapter)
        self._loading.add(adapter.name)
        await asyncio.shield(asyncio.create_task(self._load(adapter)))

    async def _load(self, adapter: Adapter) -> None:
        try:
            await asyncio.to_thread(require_target_modules, adapter, self._target_modules)
            await self._ask(self._llm.add_lora(lora_request(adapter)))
            await self._ask(self._llm.pin_lora(adapter.version))
            self._adapters[adapter.name] = adapter
        finally:
            self._loading.discard(adapter.name)

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See `Engine.unload_adapter`."""
        self._check_alive()
        self._check_loaded(adapter)
        if num_users := sum(stream.adapter == adapter for stream in self._streams):
            raise EngineError(f"adapter {adapter.name} is in use by {num_users} completions")
        del self._adapters[adapter.name]  # first, so that no completion begins on it meanwhile
        self._loading.add(adapter.name)  # its place is free when vLLM has let go of it
        await asyncio.shield(asyncio.create_task(self._unload(adapter)))

    async def _unload(self, adapter: Adapter) -> None:
        try:
            await self._ask(self._llm.remove_lora(adapter.version))
        finally:
            self._loading.discard(adapter.name)

    def loaded_adapters(self) -> tuple[Adapter, ...]:
        return tuple(self._adapters.values())

    def _check_loaded(self, adapter: Adapter | None) -> None:
        if adapter is not None and self._adapters.get(adapter.name) != adapter:
            raise EngineError(f"adapter {adapter.name} is not loaded; loaded are {sorted(self._adapters)}")

    def _check_room(self, adapter: Adapter) -> None:
        taken = {*self._adapters, *self._loading}
        if adapter.name in taken:
            raise EngineError(f"adapter {adapter.name} is loaded already")
        if any(adapter.version == other.version for other in self._adapters.values()):
            raise EngineError(f"version {adapter.version} is loaded already, as another adapter than {adapter.name}")
        if len(taken) >= self._limits.max_adapters:
            raise EngineError(f"all {self._limits.max_adapters} places for adapters are taken: {sorted(taken)}")

    # ------------------------------------------------------------------------------------------ life and death

    def health(self) -> EngineHealth:
        num_running = sum(stream.has_begun for stream in self._streams)
        problem = self._problem()
        return EngineHealth(not problem, num_running, len(self._streams) - num_running, problem)

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        # vLLM's own shutdown leaves running completions waiting for ever.
        self._llm.output_processor.propagate_error(EngineDeadError())
        await asyncio.to_thread(self._llm.shutdown, SHUTDOWN_TIMEOUT_S)

    def _problem(self) -> str:
        if self._is_closed:
            return "the engine is closed"
        return "vLLM's process has died" if self._llm.errored else ""

    def _check_alive(self) -> None:
        if problem := self._problem():
            raise EngineError(problem)

    async def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        """Wait for vLLM's process to do something. Where it dies meanwhile, vLLM alone would wait for ever."""
        answer = asyncio.ensure_future(call)
        await asyncio.wait({answer, self._llm.output_handler}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            raise EngineError(self._problem() or "vLLM's process does not answer")
        try:
            return answer.result()
        except Exception as error:
            raise self._engine_error(error) from error

    def _engine_error(self, error: Exception) -> EngineError:
        return EngineError(self._problem() or str(error.__cause__ or error) or repr(error))


# ------------------------------------------------------------------------------------------ to and from vLLM


def lora_request(adapter: Adapter) -> LoRARequest:
    return LoRARequest(adapter.name, adapter.version, str(adapter.path))


def sampled_tokens(completion: CompletionOutput, num_top_logprobs: int) -> Iterator[SampledToken]:
    """The tokens of one output; vLLM may put several into it. Raises EngineError where it gave the completion up."""
    reason = completion.finish_reason
    if reason not in (None, "stop", "length"):
        raise EngineError(f"vLLM ended the completion: {reason}")
    flat, last = completion.logprobs, len(completion.token_ids) - 1
    for place, token_id in enumerate(completion.token_ids):
        first, end = flat.start_indices[place], flat.end_indices[place]
        yield SampledToken(
            token_id,
            flat.logprobs[first],  # the sampled token's comes first, the likeliest tokens' behind it
            likeliest(flat, first, end, num_top_logprobs) if num_top_logprobs else (),
            FinishReason(reason) if reason is not None and place == last else None,
        )


def likeliest(flat: FlatLogprobs, first: int, end: int, num: int) -> tuple[tuple[int, float], ...]:
    """The best of what vLLM reports: the sampled token may be there twice, and a grammar leaves infinities."""
    pairs = dict(zip(flat.token_ids[first:end], flat.logprobs[first:end], strict=True)).items()
    return tuple(sorted((pair for pair in pairs if math.isfinite(pair[1])), key=lambda pair: -pair[1])[:num])


def require_target_modules(adapter: Adapter, target_modules: frozenset[str]) -> None:
    """Refuse what vLLM would leave out without a word. Raises EngineError."""
    try:
        with safetensors.safe_open(adapter.path / WEIGHTS_FILE, framework="np") as weights:
            matches = [TENSOR_NAME.fullmatch(name) for name in weights.keys()]  # noqa: SIM118 (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise EngineError(f"the weights of adapter {adapter.name} cannot be read: {error}") from error
    modules = {match["module"].rpartition(".")[2] for match in matches if match is not None}
    if unserved := sorted(name for name in modules if not {name, PACKED.get(name)} & target_modules):
        raise EngineError(f"adapter {adapter.name} changes {unserved}; vLLM serves only {sorted(target_modules)}")


# ------------------------------------------------------------------------------------------------ settings


def own_engine_args(
    model: str,
    tokenizer: str | Path | None,
    max_batch_size: int,
    max_adapters: int,
    max_rank: int,
    max_context_tokens: int | None,
    num_threads: int | None,
) -> dict[str, Any]:
    """vLLM's arguments as this engine wants them. Sets the environment of vLLM's process."""
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if max_rank > max(get_args(MaxLoRARanks)):
        raise ValueError(f"vLLM takes adapters up to rank {max(get_args(MaxLoRARanks))}, not {max_rank}")
    num_places = max_adapters + NUM_NULL_PLACES if current_platform.is_cpu() else max_adapters
    args: dict[str, Any] = {
        "model": model,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "tokenizer_mode": "hf",  # grammars cannot be made with Mistral's own, which vLLM prefers
        "max_num_seqs": max_batch_size,
        "max_model_len": max_context_tokens or -1,  # -1: as long as the memory allows
        "enable_lora": True,
        "max_loras": num_places,
        "max_cpu_loras": num_places,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= max_rank),
        "lora_target_modules": list(TARGET_MODULES),
        "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),  # our grammars are llguidance's
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    return {**args, **cpu_args(model, max_context_tokens, num_threads)} if current_platform.is_cpu() else args


def cpu_args(model: str, max_context_tokens: int | None, num_threads: int | None) -> dict[str, Any]:
    # More threads than idle cores spin and wait for each other: half the cores, unless told.
    os.environ["OMP_NUM_THREADS"] = str(num_threads or os.environ.get("OMP_NUM_THREADS") or default_num_threads())
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the first logprobs would be compiled for half a minute
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process less, which would poll without rest
    config = AutoConfig.from_pretrained(model).get_text_config()
    context = max_context_tokens or min(config.max_position_embeddings, MAX_CONTEXT_ON_CPU)
    return {
        "dtype": str(config.dtype or "auto").removeprefix("torch."),  # by itself, vLLM would halve 32 bits to 16
        "enforce_eager": True,
        "block_size": 32,  # the default of 128 finds few shared prefixes
        "max_model_len": context,
        "kv_cache_memory_bytes": max(MIN_KV_CACHE_BYTES, NUM_CONTEXTS_IN_KV_CACHE * context * kv_bytes(config)),
    }


def default_num_threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


def kv_bytes(config: Any) -> int:
    """Bytes of keys and values that a token takes, in 16 or 32 bits as the network's weights."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * num_heads * head_dim * getattr(config.dtype, "itemsize", 4)


def parse_engine_args(ours: Mapping[str, Any], users: Mapping[str, str]) -> AsyncEngineArgs:
    """Our arguments, overridden by the user's, which vLLM's own command line parser reads.

    Raises ValueError for an argument that vLLM does not have, or that is not the user's to set.
    """
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    parser.set_defaults(**ours)
    options = {action.dest: action for action in parser._actions}
    words: list[str] = []
    for name, value in users.items():
        option = options.get(name.replace("-", "_"))
        if option is None or option.dest in OWN_ENGINE_ARGS:
            raise ValueError(f"{name} is not an argument of vLLM" if option is None else f"{name} is set by the server")
        words += as_words(option.option_strings, option.nargs, value)
    try:
        return AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    except (Exception, SystemExit) as error:
        raise ValueError(f"vLLM does not take {dict(users)}: {error}") from error


def as_words(spellings: Sequence[str], num_values: int | str | None, value: str) -> list[str]:
    """One argument as it stands on a command line."""
    if num_values == 0:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{spellings[0].lstrip('-')} is true or false, not {value!r}")
        wanted = value.lower() == "true"
        return [next(word for word in spellings if word.startswith("--no-") != wanted)]
    return [spellings[0], *value.split()] if num_values in ("+", "*") else [f"{spellings[0]}={value}"]


# --------------------------------------------------------------------------------------- in vLLM's process


def run_engine_process(*args: Any, **kwargs: Any) -> None:
    """Where vLLM's process begins. It ends with the server, however that ends: an orphan would hold the GPU."""
    os.setsid()  # Ctrl-C is for the server, which ends its requests before its engine
    threading.Thread(target=die_with_parent, daemon=True).start()
    exit_code: Any = 1
    try:
        EngineCoreProc.run_engine_core(*args, **kwargs)
        exit_code = 0
    except SystemExit as end:  # how vLLM ends when it was asked to
        exit_code = end.code or 0
    finally:
        logging.shutdown()
        os._exit(exit_code)  # all resources are free by now; the interpreter would take seconds more to end


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


class ClosedByUs(AsyncLLM):
    """vLLM's client without its own end by garbage collection, which fails noisily when the interpreter ends."""

    def __del__(self) -> None:
        pass


def start_llm(args: AsyncEngineArgs) -> AsyncLLM:
    """vLLM with its process made to begin in `run_engine_process`."""
    original = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(run_engine_process)
    try:
        return ClosedByUs.from_engine_args(args)
    finally:
        EngineCoreProc.run_engine_core = original
