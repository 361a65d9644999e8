"""The only room that imports vllm. What vLLM reads from the environment when it is imported is set here."""

import os

# vLLM reads these when it is imported, here and in the process it starts. What the user has set stays as it is set.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# No choice: a forked engine would inherit this process's threads, locks and database connections.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
