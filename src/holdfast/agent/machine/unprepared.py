"""Why a machine cannot be made ready: raised by whatever makes it ready, heard by its life."""

from __future__ import annotations

from holdfast.core.errors import HoldfastError

__all__ = ["Unprepared"]


class Unprepared(HoldfastError):
    """The machine cannot be made ready for this job. `exit_code` goes into its last word."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
