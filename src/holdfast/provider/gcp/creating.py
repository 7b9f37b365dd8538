"""One insert, and what came of it: however often it is repeated, by whomever, and however late.

    look for an earlier try ──→ instances.insert ──→ its operation, until it is done ──→ the instance | LaunchFailed |
    OutcomeUnknown

Three things keep a repeated call from making a second machine: the request id (GCP answers with the first operation), the name
(two instances of one zone cannot share it), and the look for an operation with this request id before anything is sent, for
repetitions so late that the machine of the first call has come and gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.core.clock import Clock
from holdfast.core.errors import LaunchFailed, OutcomeUnknown, ProviderError
from holdfast.core.failures import Failure
from holdfast.provider.base import Machine
from holdfast.provider.gcp.answers import Refusal, failure_of, refusal_of_operation
from holdfast.provider.gcp.asking import Insert
from holdfast.provider.gcp.calls import Calls, NotSent, Refused, Unanswered
from holdfast.provider.gcp.words import REQUEST, TOKEN

__all__ = ["Creating"]

_POLL_S = (1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Creating:
    """Thread safety: every method."""

    calls: Calls
    clock: Clock
    operation_s: float
    """So long an operation is waited for."""
    read: Callable[[Mapping[str, Any]], Machine | None]
    """An instance as a machine of ours."""

    def create(self, insert: Insert) -> Machine | Mapping[str, Any]:
        """The machine; or the operation that made it, when it is there no more. LaunchFailed, OutcomeUnknown."""
        operation = self._earlier(insert) or self._insert(insert)
        if isinstance(operation, Machine):
            return operation
        done = self._finished(insert, operation)
        refusal = None if done is None else refusal_of_operation(done)
        machine = self._there(insert)
        if machine is not None:
            return machine
        if refusal is not None:
            raise _launch_failed(insert, refusal)
        return done or operation

    def _earlier(self, insert: Insert) -> Mapping[str, Any] | None:
        """The operation of an earlier try: GCP's memory of request ids is short, and a name is free again after a deletion."""
        try:
            for page in self.calls.pages(
                "compute", "zoneOperations.list", project=insert.project, zone=insert.zone,
                filter=f'(operationType = "insert") (clientOperationId = "{insert.request_id}")',
            ):  # fmt: skip
                for operation in page.get("items", []):
                    # Not trusted to have filtered.
                    if operation.get("clientOperationId") == insert.request_id:
                        return dict(operation)
        except NotSent as error:
            raise LaunchFailed(f"GCP: {error}", Failure.NO_PERMISSION) from error
        except Refused as error:
            # Who may not read operations may still be allowed to insert, and hears of it there if not.
            if failure_of(error.refusal) in (None, Failure.ERROR, Failure.THROTTLED):
                raise OutcomeUnknown(
                    f"GCP: whether {insert.name} was asked for before is not known: {error}"
                ) from error
        except (Unanswered, ProviderError) as error:
            raise OutcomeUnknown(f"GCP: whether {insert.name} was asked for before is not known: {error}") from error
        return None

    def _insert(self, insert: Insert) -> Mapping[str, Any] | Machine:
        try:
            return self.calls.call(
                "compute", "instances.insert", project=insert.project, zone=insert.zone, requestId=insert.request_id,
                body=insert.body,
            )  # fmt: skip
        except NotSent as error:
            raise LaunchFailed(f"GCP: {error}", Failure.NO_PERMISSION) from error
        except Unanswered as error:
            raise OutcomeUnknown(f"GCP: no answer to the request for {insert.name}: {error}") from error
        except Refused as error:
            if not error.refusal.is_duplicate and failure_of(error.refusal) is None:
                raise OutcomeUnknown(f"GCP: {insert.name} may have been accepted: {error}") from error
            machine = self._there(insert, forbidden_is_absence=failure_of(error.refusal) is Failure.NO_PERMISSION)
            if machine is not None and machine.state == "pending":
                # Of an earlier try, whose operation can still fail.
                raise OutcomeUnknown(
                    f"GCP: {insert.name} is being made; the same request again says what came of it"
                ) from error
            if machine is not None:
                return machine
            if error.refusal.is_duplicate:
                raise OutcomeUnknown(f"GCP: the name {insert.name} is taken, and nothing has it: {error}") from error
            raise _launch_failed(insert, error.refusal) from error

    def _finished(self, insert: Insert, operation: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The operation when it is done; None when GCP has forgotten it. OutcomeUnknown when it takes too long."""
        until_s = self.clock.monotonic_s() + self.operation_s
        nap_s, longest_s = _POLL_S
        problem = ""
        while operation.get("status") != "DONE":
            if self.clock.monotonic_s() >= until_s:
                raise OutcomeUnknown(
                    f"GCP: the operation {operation['name']} for {insert.name} is still {operation.get('status')} after "
                    f"{self.operation_s:.0f} s{problem}; the same request again goes on waiting for it"
                )
            self.clock.sleep(nap_s)
            nap_s = min(longest_s, nap_s * 1.5)
            try:
                operation = self.calls.call(
                    "compute",
                    "zoneOperations.get",
                    project=insert.project,
                    zone=insert.zone,
                    operation=operation["name"],
                )
            except Refused as error:
                if error.refusal.is_absence:
                    return None
                problem = f" ({error})"
            except (Unanswered, NotSent) as error:
                problem = f" ({error})"
        return operation

    def _there(self, insert: Insert, *, forbidden_is_absence: bool = False) -> Machine | None:
        """The instance of this name, if it is ours. LaunchFailed when it is somebody else's.

        `forbidden_is_absence`: who may neither insert nor look has no rights here at all, and hears that. Were they withdrawn
        after an earlier try, its machine finds the launch answered as failed, and ends itself.
        """
        try:
            found = self.calls.call(
                "compute", "instances.get", project=insert.project, zone=insert.zone, instance=insert.name
            )
        except Refused as error:
            if error.refusal.is_absence or (forbidden_is_absence and error.refusal.status in (401, 403)):
                return None
            raise OutcomeUnknown(f"GCP: whether {insert.name} is there is not known: {error}") from error
        except (Unanswered, NotSent) as error:
            raise OutcomeUnknown(f"GCP: whether {insert.name} is there is not known: {error}") from error
        machine, labels = self.read(found), found.get("labels") or {}
        if machine is None or labels.get(TOKEN) != insert.request_id:
            raise LaunchFailed(f"GCP: {insert.name} in {insert.zone} is somebody else's", Failure.ERROR)
        if labels.get(REQUEST) != insert.body["labels"].get(REQUEST):
            raise LaunchFailed(
                f"GCP: {insert.name} was asked for with this token and other parameters; a token belongs to one request",
                Failure.BAD_REQUEST,
            )
        return machine


def _launch_failed(insert: Insert, refusal: Refusal) -> LaunchFailed:
    failure = Failure.ERROR if refusal.is_duplicate else failure_of(refusal) or Failure.ERROR
    message = f"GCP makes no machine in {insert.zone} ({failure.value}): {refusal}"
    return LaunchFailed(message, failure, retry_after_s=refusal.retry_after_s)
