"""Where vLLM's process begins and how it ends: with the server, however that ends."""
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc

from runtime.engines.vllm.on_cpu import ask_for_amx


def run_engine_process(*args: Any, **kwargs: Any) -> None:
    """Where vLLM's process begins. It ends with the server, however that ends: an orphan would hold the GPU."""
    os.setsid()  # Ctrl-C is for the server, which ends its requests before its engine
    threading.Thread(target=die_with_parent, daemon=True).start()
    ask_for_amx()
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
