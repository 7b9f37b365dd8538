"""Why there is no machine: the words in which providers answer and policies decide."""

from __future__ import annotations

from enum import Enum

__all__ = ["Failure"]


class Failure(Enum):
    """Why a launch failed."""

    NO_CAPACITY = "no capacity"
    QUOTA = "the quota is used up"
    THROTTLED = "the provider asks for fewer requests"
    ERROR = "an error of the provider"
    TIMEOUT = "it did not come up in time"
    BAD_REQUEST = "the provider refuses the request as wrong"
    NO_PERMISSION = "permission is missing"
    NO_QUOTA = "the quota is zero"
