"""What whole cycles share with the other tests."""

from tests.conftest import protocol

__all__ = ["protocol"]
