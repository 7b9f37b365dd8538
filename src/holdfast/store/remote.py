"""Amazon S3, Google Cloud Storage, Azure Blob Storage and what speaks their protocols, through obstore.

obstore signs, retries and streams; this file sizes its timeouts by the bytes of each request, waits until it has let go of the
caller's memory, and turns every error into one of ours, with all credentials taken out of the text.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeVar

import obstore
from obstore import exceptions as client_errors

from holdfast.core.clock import Clock, SystemClock
from holdfast.core.errors import (
    FormatError,
    HoldfastError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    StoreFull,
    StoreUnavailable,
    UsageError,
)
from holdfast.store.base import Body, Entry, check_key, check_prefix, flat_buffers, is_key
from holdfast.store.redaction import redact

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

    Client = AzureStore | GCSStore | S3Store

__all__ = ["Connect", "ObjectStore", "request_timeout_s"]

_T = TypeVar("_T")

Connect = Callable[[float], "Client"]
"""Makes a client whose requests may each take so many seconds."""

_SIZE_CLASSES_BYTES = tuple(2**power for power in (20, 23, 26, 29))
"""1 MiB, 8 MiB, 64 MiB, 512 MiB (and what is larger): one client each, made when first needed."""
_LEAST_TIMEOUT_S = 30.0
_SLOWEST_BYTES_PER_S = 256 * 1024
"""A stream slower than this counts as dead."""

_READ_CHUNK_BYTES = 8 * 2**20
_LET_GO_S = 10.0
"""How long to wait for the client to drop the caller's memory after a request has failed; it took 10 ms where measured."""

_PAUSES_S = (0.1, 0.4)
_REPEAT_WITHIN_S = 5.0

_REFUSED = (client_errors.PermissionDeniedError, client_errors.UnauthenticatedError)
_UNMET = (client_errors.AlreadyExistsError, client_errors.PreconditionError)
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified (bucket|container) does not exist", re.IGNORECASE)
_OBJECT_LOCK = re.compile(r"Content-MD5 (OR|or) x-amz-|MissingUploadObjectWithObjectLockHeaders")
_BAD_RANGE = re.compile(r"Invalid range|InvalidRange|Wanted range|range requested|bytes 0--1/0", re.IGNORECASE)
"""The last is azurite's Content-Range for a range of an empty object."""
_FULL = re.compile(r"QuotaExceeded|StorageFull|InsufficientStorage|QuotaLimit", re.IGNORECASE)
_ERROR_CODE = re.compile(r"<Code>([\w.-]{1,80})</Code>|\(code: ([\w.-]{1,80})\)")
"""In the server's document, or as the client words what a deletion of several objects said about one of them."""
_DENIED_CODES = frozenset(
    {
        "401", "403", "AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken",
        "SignatureDoesNotMatch", "TokenRefreshRequired", "AccountIsDisabled", "AuthenticationFailed", "AuthorizationFailure",
        "AuthorizationPermissionMismatch", "InsufficientAccountPermissions",
    }
)  # fmt: skip
"""S3 answers 400 to an expired session token, and 200 to the deletion of an object that it refuses to delete."""
_CREDENTIALS_SOUGHT = re.compile(r"token request|169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal")

_runtime_process: int | None = None
"""The process in which obstore's threads were started; a forked child has none of them and would wait for ever."""


def request_timeout_s(size_bytes: int) -> tuple[int, float]:
    """The size class of a request, as an index, and the seconds that a request of that class may take."""
    index = min(bisect_left(_SIZE_CLASSES_BYTES, size_bytes), len(_SIZE_CLASSES_BYTES) - 1)
    most_bytes = _SIZE_CLASSES_BYTES[index]
    return index, _LEAST_TIMEOUT_S + (0.0 if index == 0 else most_bytes / _SLOWEST_BYTES_PER_S)


class ObjectStore:
    """Objects below a prefix of one bucket.

    Thread safety: every method. Not fork-safe: a child that uses a store after its parent used one gets a UsageError.
    Signals: while a call runs in the main thread, Python's signal handlers wait for it; make long calls from other threads.
    Ownership: bodies are sent from the caller's memory without a copy; a call returns when the client has let go of it.
    """

    def __init__(self, url: str, connect: Connect, *, secrets: Iterable[str] = (), clock: Clock | None = None) -> None:
        self._url = url
        self._connect = connect
        self._secrets = frozenset(secrets)
        self._clock = clock or SystemClock()
        self._clients: dict[int, Client] = {}
        self._lock = Lock()

    @property
    def url(self) -> str:
        return self._url

    @property
    def is_near(self) -> bool:
        return False

    def put(self, key: str, body: Body) -> None:
        with self._translated("writing", check_key(key)):
            self._send(key, flat_buffers(body), "overwrite")

    def put_new(self, key: str, body: bytes) -> bool:
        try:
            with self._translated("creating", check_key(key)):
                self._send(key, flat_buffers(body), "create")
        except _Taken:
            return False
        return True

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._translated("reading", check_key(key)):
            answer = obstore.get(self._client(max_bytes), key)
            size_bytes = answer.meta["size"]
            if size_bytes > max_bytes:
                raise FormatError(f"{key!r} in {self.url} has {size_bytes} bytes, more than the {max_bytes} expected")
            body = answer.bytes().to_bytes()
        if len(body) != size_bytes:
            raise IntegrityError(f"{key!r} in {self.url} ended after {len(body)} of {size_bytes} bytes")
        return body

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.read_any(check_key(key), offset, buffer)

    def read_any(self, name: str, offset: int, buffer: memoryview) -> str:
        """As `read_into`, of an object with any name; returns its ETag, or an empty text where the service gives none."""
        flat = buffer.cast("B")
        end = offset + len(flat)
        done = 0
        with self._translated("reading", name):
            client = self._client(len(flat))
            if not len(flat):
                about = obstore.head(client, name)
                if offset > about["size"]:
                    raise IntegrityError(f"{name!r} in {self.url} is too short for offset {offset}")
                return about["e_tag"] or ""
            # Chunk by chunk, so that a large range needs no second copy of itself in host memory.
            answer = obstore.get(client, name, options={"range": (offset, end)})
            for chunk in answer.stream(min_chunk_size=_READ_CHUNK_BYTES):
                if done + len(chunk) > len(flat):
                    raise IntegrityError(f"{name!r} in {self.url}: the answer is longer than [{offset}, {end})")
                flat[done : done + len(chunk)] = memoryview(chunk)
                done += len(chunk)
        if done != len(flat):
            raise IntegrityError(f"{name!r} in {self.url} ended after {done} bytes of [{offset}, {end})")
        return answer.meta["e_tag"] or ""

    def list_any(self, prefix: str) -> Sequence[tuple[str, int, str]]:
        """Name, size and ETag of every object below these whole components, whatever it is called."""
        return self._repeated(lambda: self._listed_any(prefix))

    def look_at(self, name: str) -> tuple[int, str]:
        """Size and ETag of an object with any name."""
        with self._translated("reading", name):
            about = obstore.head(self._client(0), name)
            return about["size"], about["e_tag"] or ""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Everything is listed before the first entry is returned: not every service lists in order, and an error in the
        middle must not look like a short list."""
        check_prefix(prefix)
        return iter(self._repeated(lambda: self._listed(prefix)))

    def delete(self, key: str) -> None:
        check_key(key)
        self._repeated(lambda: self._delete(key))

    def close(self) -> None:
        with self._lock:
            self._clients.clear()

    def client(self) -> Client:
        """The client for small requests, for questions about the bucket that are no business of `Store`."""
        return self._client(0)

    def _client(self, size_bytes: int) -> Client:
        global _runtime_process
        index, timeout_s = request_timeout_s(size_bytes)
        with self._lock:
            if _runtime_process not in (None, os.getpid()):
                raise UsageError(
                    f"{self.url} is used in a forked process, where the client's threads do not exist; "
                    "start the process with the spawn method, or fork before a store is used"
                )
            _runtime_process = os.getpid()
            client = self._clients.get(index)
            if client is None:
                client = self._clients[index] = self._connect(timeout_s)
            return client

    def _listed(self, prefix: str) -> Sequence[Entry]:
        found = []
        with self._translated("listing", prefix):
            for page in obstore.list(self._client(0), prefix or None, chunk_size=1000):
                found += [Entry(item["path"], item["size"]) for item in page if is_key(item["path"])]
        return sorted(found)

    def _listed_any(self, prefix: str) -> Sequence[tuple[str, int, str]]:
        found = []
        with self._translated("listing", prefix):
            try:
                for page in obstore.list(self._client(0), prefix or None, chunk_size=1000):
                    found += [(item["path"], item["size"], item["e_tag"] or "") for item in page]
            except client_errors.InvalidPathError as error:
                said = str(error).split("\n\nDebug source", 1)[0]
                raise UsageError(f"{self.url}: an object has a name that is no file's ({said})") from None
        return found

    def _delete(self, key: str) -> None:
        try:
            with self._translated("deleting", key):
                obstore.delete(self._client(0), key)
        except NotFound:
            pass

    def _repeated(self, call: Callable[[], _T]) -> _T:
        """The client repeats what was refused or timed out, but neither a deletion whose connection broke (it is a POST) nor a
        list whose answer broke off; both are harmless to repeat. What has taken long has been repeated enough by the client."""
        begun_s = self._clock.monotonic_s()
        for pause_s in _PAUSES_S:
            try:
                return call()
            except StoreUnavailable:
                if self._clock.monotonic_s() - begun_s > _REPEAT_WITHIN_S:
                    raise
                self._clock.sleep(pause_s)
        return call()

    def _send(self, key: str, buffers: Sequence[memoryview], mode: Literal["create", "overwrite"]) -> None:
        """One single PUT: multipart uploads cost more requests, leave litter when killed, and cannot be conditional."""
        client = self._client(sum(len(buffer) for buffer in buffers))
        views = [memoryview(buffer) for buffer in buffers]
        try:
            obstore.put(client, key, views or b"", use_multipart=False, mode=mode)
        finally:
            self._wait_until_released(views)
            for buffer in buffers:
                buffer.release()

    def _wait_until_released(self, views: MutableSequence[memoryview]) -> None:
        """After a timeout the client drops the request in its own threads, a little later: until then it may still send
        from the caller's memory, which must not be used anew so long."""
        give_up_s = self._clock.monotonic_s() + _LET_GO_S
        while views:
            try:
                views[-1].release()
                views.pop()
            except BufferError:
                if self._clock.monotonic_s() > give_up_s:
                    raise StoreUnavailable(
                        f"{self.url}: the client still holds the body of a request that has ended; the server answered "
                        "without reading it all, so the outcome is unknown"
                    ) from None
                self._clock.sleep(0.002)

    @contextmanager
    def _translated(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except HoldfastError:
            raise
        except (client_errors.BaseError, OSError, ValueError) as error:
            raise self._as_ours(error, doing, key) from None

    def _as_ours(self, error: Exception, doing: str, key: str) -> Exception:
        text = str(error)
        found = _STATUS.search(text)
        status = int(found.group(1)) if found else 0
        code = _code(text)
        where = f"{doing} {key!r} in {self.url}"
        said = f"{where}: {_summary(text, status, code, self._secrets)}"
        if _CREDENTIALS_SOUGHT.search(text):
            said += "; no credentials are set, and this machine's own identity service gave none"
        if _NO_BUCKET.search(text):
            return StoreUnavailable(f"{where}: the bucket does not exist; check the URL, or create it")
        if _OBJECT_LOCK.search(text):
            return StoreUnavailable(
                f"{where}: the bucket locks every new object for a time (S3 Object Lock), so checkpoints could not be removed; "
                "use another bucket, or set AWS_CHECKSUM_ALGORITHM=sha256, which such a bucket asks for, and pay for all of them"
            )
        if isinstance(error, _REFUSED) or status in (401, 403) or code in _DENIED_CODES:
            return PermissionDenied(f"{said}; check that the credentials are there, fresh, and wide enough")
        if doing == "creating" and isinstance(error, _UNMET):
            # S3 answers 409 when two conditional writes meet: then nobody may have won, and the caller must look again.
            # Azure says BlobAlreadyExists for a taken name, and 409 with other codes while a container is being removed.
            undecided = status == 409 and code not in ("", "BlobAlreadyExists")
            return StoreUnavailable(f"{said}; another write to this name was under way") if undecided else _Taken(said)
        if status == 507 or _FULL.search(text):
            return StoreFull(f"{said}; free some space or raise the quota")
        if doing == "reading" and (status == 416 or _BAD_RANGE.search(text)):
            return IntegrityError(f"{where}: the object is too short for the range asked for")
        absent = isinstance(error, FileNotFoundError) or (doing == "deleting" and code == "NoSuchKey")
        if absent and doing in ("reading", "deleting"):
            return NotFound(f"{key!r} is not in {self.url}")
        return StoreUnavailable(said)


class _Taken(Exception):
    """The condition of a conditional write did not hold; never leaves this file."""


def _code(text: str) -> str:
    """The service's own word for what went wrong, or an empty text."""
    found = _ERROR_CODE.search(text)
    return (found.group(1) or found.group(2)) if found else ""


def _summary(text: str, status: int, code: str, secrets: frozenset[str]) -> str:
    """What the client said, without its debug dump and without the server's document except for its error code."""
    said = text.split("\n\nDebug source", 1)[0]
    if status or code:
        said = "the server answered " + (f"{status} ({code})" if status and code else code or str(status))
    return redact(said, secrets)
