"""The server: HTTP, agent loop, step log, engines, adapter swap. It works with the learner dead."""

__version__ = "0.3.0"
