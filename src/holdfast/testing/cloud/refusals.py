"""How a call to the cloud ends badly."""

from __future__ import annotations

from holdfast.core.failures import Failure
from holdfast.provider.local.wire import Refusal

__all__ = ["Lost", "Refused"]


class Refused(Exception):
    """An answer that is no success. Without a `failure` its reader cannot know whether it was done."""

    def __init__(
        self, status: int, code: str, message: str, failure: Failure | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        name = None if failure is None else failure.name
        self.refusal = Refusal(code=code, message=message, failure=name, retry_after_s=retry_after_s)


class Lost(Exception):
    """It was done, and the connection ends without an answer."""
