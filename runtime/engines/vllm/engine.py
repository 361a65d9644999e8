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
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from policies.adapters.probe import tolerance_in
from policies.types import Adapter, EngineError, EngineHealth, EngineLimits, SampledToken, SamplingParams
from runtime.engines.checks import check_loaded, check_place, check_request, check_scored, check_unused
from runtime.engines.vllm.adapters import TARGET_MODULES, require_target_modules
from runtime.engines.vllm.on_cpu import ask_for_amx, has_amx, safe_block_size
from runtime.engines.vllm.outputs import sampled_tokens, scored_tokens
from runtime.engines.vllm.process import start_llm
from runtime.engines.vllm.settings import own_engine_args, parse_engine_args

T = TypeVar("T")

ALL_WITH_THE_LAST = 2**30
"""As a stream's interval, in tokens: after the first, all come with the last."""

SHUTDOWN_TIMEOUT_S = 10.0


@dataclass(eq=False, slots=True)
class RunningCompletion:
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
        self._completions: set[RunningCompletion] = set()
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
        kv_memory_bytes: int | None = None,
        num_threads: int | None = None,
        gpu_memory_fraction: float | None = None,
        engine_args: Mapping[str, str] | None = None,
    ) -> VllmEngine:
        """Start vLLM's process, load the network and let it answer once, so that no user waits for a first compile.

        `model` is a folder or hub name; `tokenizer` one more, where the model's own folder has none. `max_adapters`
        lie in the engine at a time. `kv_memory_bytes` is for keys and values; default: vLLM's choice on a GPU, some
        full contexts on a CPU. `num_threads` count on a CPU only, `gpu_memory_fraction` on GPUs only. `engine_args`
        are passed on to vLLM (`tensor_parallel_size`: `2`), by the names and in the spelling of its command line, and
        go before all these. `tell_stage` is told what is being done. Takes 20 s and more, in which the event loop is
        free. Raises EngineError where vLLM cannot start, ValueError for a wrong argument.
        """
        settings = own_engine_args(
            str(model),
            tokenizer,
            max_batch_size,
            max_adapters,
            max_rank,
            max_context_tokens,
            kv_memory_bytes,
            num_threads,
        )
        if gpu_memory_fraction is not None:
            settings["gpu_memory_utilization"] = gpu_memory_fraction
        args = parse_engine_args(settings, engine_args or {})
        if current_platform.is_cpu():
            num_processes = args.tensor_parallel_size * args.pipeline_parallel_size
            args.block_size = safe_block_size(args.block_size, num_processes, has_amx(), ask_for_amx())
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
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        """See `Engine.generate`. Under a grammar the tokenizer's own end token ends a completion too."""
        self._check_alive()
        check_request(prompt_token_ids, sampling, self._limits)
        check_loaded(adapter, self._adapters)
        outputs = self._llm.generate(
            tokens_input(list(prompt_token_ids)),
            self._vllm_sampling(sampling, None if stream else ALL_WITH_THE_LAST),
            request_id=uuid.uuid4().hex,
            lora_request=None if adapter is None else lora_request(adapter),
        )
        completion = RunningCompletion(adapter)
        self._completions.add(completion)
        try:
            async for output in outputs:
                completion.has_begun = True
                for token in sampled_tokens(output.outputs[0], sampling.num_top_logprobs):
                    yield token
        except EngineError:
            raise
        except Exception as error:
            raise self._engine_error(error) from error
        finally:
            await outputs.aclose()  # aborts it, where it has not ended; awaited, so that an unload comes after it
            self._completions.remove(completion)

    async def score(
        self, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], adapter: Adapter | None
    ) -> tuple[float, ...]:
        """See `Engine.score`. vLLM reads the whole prompt for it, without its prefix cache, and samples one token."""
        self._check_alive()
        check_scored(prompt_token_ids, completion_token_ids, self._limits)
        check_loaded(adapter, self._adapters)
        token_ids = [*prompt_token_ids, *completion_token_ids]
        outputs = self._llm.generate(
            tokens_input(token_ids),
            VllmSamplingParams(
                max_tokens=1,
                temperature=0.0,
                prompt_logprobs=0,
                detokenize=False,
                ignore_eos=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            request_id=uuid.uuid4().hex,
            lora_request=None if adapter is None else lora_request(adapter),
        )
        completion, found = RunningCompletion(adapter), None
        self._completions.add(completion)
        try:
            async for output in outputs:
                completion.has_begun = True
                found = output.prompt_logprobs or found
        except Exception as error:
            raise self._engine_error(error) from error
        finally:
            await outputs.aclose()
            self._completions.remove(completion)
        return scored_tokens(found, token_ids, len(completion_token_ids))

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
        self._check_place(adapter)
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
        check_loaded(adapter, self._adapters)
        check_unused(adapter, sum(one.adapter == adapter for one in self._completions))
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

    def _check_place(self, adapter: Adapter) -> None:
        check_place(adapter, {*self._adapters, *self._loading}, self._limits)
        if any(adapter.version == other.version for other in self._adapters.values()):
            raise EngineError(f"version {adapter.version} is loaded already, as another adapter than {adapter.name}")

    # ------------------------------------------------------------------------------------------ life and death

    def health(self) -> EngineHealth:
        num_running = sum(one.has_begun for one in self._completions)
        problem = self._problem()
        return EngineHealth(not problem, num_running, len(self._completions) - num_running, problem)

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


def lora_request(adapter: Adapter) -> LoRARequest:
    return LoRARequest(adapter.name, adapter.version, str(adapter.path))
