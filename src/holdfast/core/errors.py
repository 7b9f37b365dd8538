"""Every error that holdfast raises on purpose, in one tree.

    HoldfastError
    ├── UsageError                  the call, the flag or the job file is wrong; the message says how it should look
    │   ├── UnsupportedState        a value in the tracked state cannot be stored; names its path and type
    │   └── TrackedStateMismatch    checkpoint and script disagree (names, shapes, dtypes); lists every difference
    ├── RunConflict                 the URL holds something else than the caller thinks
    │   ├── DifferentRun            another experiment lives there
    │   ├── RunFinished             the run is complete
    │   └── RunRemoved              the run has been (or is being) removed
    ├── Fenced                      another attempt owns the run now; this process must stop writing
    ├── SaveError                   a checkpoint could not be committed
    │   ├── PassedOver              a newer snapshot was saved in its place
    │   └── TooManyUnsaved          more saves in a row have failed than `max_unsaved` allows
    ├── RestoreError                no retained checkpoint could be restored
    ├── RanksApart                  the ranks of a job could not agree: one is missing, or does something else
    ├── IntegrityError              bytes are missing, torn or altered: never loaded, always reported
    │   └── FormatError             the bytes do not follow the format (hostile, torn, or written by a newer version)
    ├── ProviderError               the provider of machines did not do what was asked
    │   ├── LaunchFailed            no machine: says why, and whether to ask again
    │   └── OutcomeUnknown          the answer was lost; there may be a machine, now or later
    └── StoreError                  the store did not do what was asked
        ├── NotFound                confirmed absent
        ├── PermissionDenied        401 / 403: credentials are missing, expired or too narrow
        ├── StoreUnavailable        throttled, timed out, unreachable, 5xx: the outcome may be unknown
        ├── StoreFull               no space or quota left
        └── StoreUnsafe             the store ignores conditional writes, so it cannot fence two writers

    Preempted (SystemExit)          the run saved what it could and leaves with the documented exit code
    HoldfastWarning (UserWarning)   something a user must know although the run goes on

An `IntegrityError` makes restore fall back to an older checkpoint; a `StoreUnavailable` or `PermissionDenied` never does, because
throttling must not cost a day of work.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.failures import Failure

__all__ = [
    "DifferentRun",
    "Fenced",
    "FormatError",
    "HoldfastError",
    "HoldfastWarning",
    "IntegrityError",
    "LaunchFailed",
    "NotFound",
    "OutcomeUnknown",
    "PassedOver",
    "PermissionDenied",
    "Preempted",
    "ProviderError",
    "RanksApart",
    "RestoreError",
    "RunConflict",
    "RunFinished",
    "RunRemoved",
    "SaveError",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "StoreUnsafe",
    "TooManyUnsaved",
    "TrackedStateMismatch",
    "UnsupportedState",
    "UsageError",
]


class HoldfastError(Exception):
    """Root of the tree above."""


class UsageError(HoldfastError):
    """The caller asked for something that makes no sense; the message says what would."""


class UnsupportedState(UsageError):
    """A value in the tracked state is of a type that no codec stores."""


class TrackedStateMismatch(UsageError):
    """The checkpoint and the script disagree about names, shapes or dtypes.

    `differences` lists all of them, one line each, so that they can be mended in one go.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class RunConflict(HoldfastError):
    """The run's URL holds something else than the caller thinks."""


class DifferentRun(RunConflict):
    """Another experiment lives at this URL."""


class RunFinished(RunConflict):
    """The run is complete; training it again would change a result that somebody may rely on."""


class RunRemoved(RunConflict):
    """The run has been removed, or is being removed."""


class Fenced(HoldfastError):
    """Another attempt has claimed the run. This process is stale and must not write any more."""


class SaveError(HoldfastError):
    """A checkpoint could not be committed. The previous one still stands."""


class PassedOver(SaveError):
    """Another rank had a newer snapshot already, which is saved in the place of this one."""


class TooManyUnsaved(SaveError):
    """More saves in a row have failed than `max_unsaved` allows."""


class RestoreError(HoldfastError):
    """No retained checkpoint could be restored; the message says why for each of them."""


class RanksApart(HoldfastError):
    """The ranks of a job could not agree. One is gone, too slow, or does something else than the others."""


class IntegrityError(HoldfastError):
    """Bytes are missing, torn or altered."""


class FormatError(IntegrityError):
    """Bytes do not follow the format."""


class ProviderError(HoldfastError):
    """The provider of machines did not do what was asked."""


class LaunchFailed(ProviderError):
    """There is no machine, and none will come of this request. `failure` says where it counts, as `core.failures.Failure`."""

    def __init__(self, message: str, failure: Failure, *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.failure, self.retry_after_s = failure, retry_after_s


class OutcomeUnknown(ProviderError):
    """The answer was lost. The same request with the same token says, at a provider that honours tokens, what came of it."""


class StoreError(HoldfastError):
    """The store did not do what was asked."""


class NotFound(StoreError):
    """The object is confirmed to be absent."""


class PermissionDenied(StoreError):
    """Credentials are missing, expired or too narrow."""


class StoreUnavailable(StoreError):
    """Throttled, timed out, unreachable or failing. After a write the outcome may be unknown."""


class StoreFull(StoreError):
    """No space or quota is left."""


class StoreUnsafe(StoreError):
    """The store accepts conditional writes and ignores the condition."""


class Preempted(SystemExit):
    """Capacity is being taken away; what could be saved is saved. Carries the documented exit code."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message or f"preempted (exit code {self.code})"


class HoldfastWarning(UserWarning):
    """Something a user must know although the run goes on."""
