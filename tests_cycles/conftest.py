"""What whole cycles share with the other tests: the novice and its engine."""

from tests.conftest import engine, novice_engine, protocol

__all__ = ["engine", "novice_engine", "protocol"]
