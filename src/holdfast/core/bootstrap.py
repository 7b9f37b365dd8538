"""The script with which a fresh machine becomes one of holdfast's: from a bare image to `holdfast machine`, and no other way out.

    dead-man timer → virtual environment → fetch, SHA-256 of every file → install from those files only → holdfast machine …
    however it ends, also half-way → the end command, once

It is POSIX sh, goes out as user-data, which anybody on the machine can read, and so holds no secret. The machine's own role
fetches. From the first line on a timer runs against it: a boot that hangs, or whose network never comes up, ends the machine. As
soon as `holdfast machine` has its watchdog, the watchdog takes over; the file `guarded` says so, with its process's number.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.core.errors import UsageError

__all__ = [
    "ENDED",
    "ENV_LOCAL_END",
    "ENV_MACHINE_BOOT",
    "ENV_MACHINE_BOOT_LIMIT",
    "ENV_MACHINE_FOLDER",
    "ENV_MACHINE_KIND",
    "GUARDED",
    "LOCAL_KIND",
    "MOST_USER_DATA_BYTES",
    "Piece",
    "bootstrap_script",
    "once_only",
]

ENV_MACHINE_KIND = "HOLDFAST_MACHINE_KIND"
"""`local`: the machine is one of the rehearsal cloud's, on somebody's own computer. Then nothing but ENV_LOCAL_END is run as its
end."""
ENV_LOCAL_END = "HOLDFAST_LOCAL_END_COMMAND"
"""Set by the rehearsal cloud: the command that ends this machine of its, and nothing else."""
ENV_MACHINE_BOOT = "HOLDFAST_MACHINE_BOOT_MONOTONIC_S"
"""When this machine began, on its monotonic clock (CLOCK_MONOTONIC, seconds), where that is not the kernel's boot."""
ENV_MACHINE_BOOT_LIMIT = "HOLDFAST_MACHINE_BOOT_LIMIT_S"
"""Seconds from the machine's boot: without a grant by then, it ends. Never longer than the first grant's lifetime."""
ENV_MACHINE_FOLDER = "HOLDFAST_MACHINE_FOLDER"
"""The folder of this machine for code, scripts and marks; else the current one."""
LOCAL_KIND = "local"
GUARDED, ENDED = "guarded", "ended"
"""Marks in the machine's folder: a watchdog stands (its process's number); the end command has been begun."""
MOST_USER_DATA_BYTES = 12 << 10
"""Clouds take 16 KB; some count it encoded."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SOURCE = re.compile(r"(?:s3|gs|https)://[^\s'\"\\]+|(?:file://)?/[^\0\n]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A file to fetch: holdfast's wheel, or one of its needs."""

    source: str
    """s3://…, gs://…, https://…, file:///… or a path."""
    name: str
    sha256: str

    def __post_init__(self) -> None:
        if not _SOURCE.fullmatch(self.source) or "@" in self.source.partition("//")[2].partition("/")[0]:
            raise UsageError(
                f"cannot be fetched: {self.name}; sources are s3://, gs://, https:// or a path, without secrets"
            )
        if not _NAME.fullmatch(self.name) or not _SHA256.fullmatch(self.sha256):
            raise UsageError(f"a piece has a plain file name and a SHA-256 in hex, not {self.name!r}, {self.sha256!r}")


def once_only(command: str, folder: str) -> str:
    """Shell text that runs the command unless somebody has begun to in this folder. A full disk does not stop it."""
    mark = shlex.quote(f"{folder}/{ENDED}")
    return f"if mkdir {mark} 2>/dev/null || [ ! -d {mark} ]; then {command}\nfi"


def bootstrap_script(
    *,
    run_url: str,
    launch: int,
    pieces: Sequence[Piece],
    end_command: str,
    boot_limit_s: int,
    folder: str = "/var/lib/holdfast",
    python: str = "python3",
    machine_command: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """`pieces` begins with holdfast's wheel; what else it needs and the image lacks follows. `python`: the image's interpreter,
    whose packages (torch, drivers' libraries) stay visible. `boot_limit_s`: from the boot until there is a grant, at most; what has
    none then ends. `machine_command` prints the provider's name of the machine.
    `environment` holds what is no secret: a region, an endpoint. UsageError for what cannot be a script of this kind.
    """
    if not pieces or not end_command.strip() or boot_limit_s <= 0 or launch < 1:
        raise UsageError("a machine needs holdfast's wheel, an end command, a time limit for its boot and a launch")
    if not folder.startswith("/"):
        raise UsageError(f"the machine's folder is an absolute path, not {folder!r}")
    quote = shlex.quote
    exports = [f"export {name}={quote(value)}" for name, value in sorted((environment or {}).items())]
    fetches = [f"get {quote(piece.source)} {piece.name} {piece.sha256}" for piece in pieces]
    identity = [] if not machine_command else [f'HOLDFAST_MACHINE="$({machine_command})" && export HOLDFAST_MACHINE']
    script = "\n".join(
        (
            "#!/bin/sh",
            "set -u",
            f"D={quote(folder)}",
            f"END={quote(end_command)}",
            _PROLOGUE.replace("@LIMIT@", str(boot_limit_s)),
            *exports,
            *identity,
            _FETCH.replace("@PYTHON@", quote(python)),
            *fetches,
            _INSTALL.replace("@PYTHON@", quote(python)).replace("@WHEEL@", quote(pieces[0].name)),
            f'"$D/venv/bin/python" -m holdfast machine --run {quote(run_url)} --launch {launch} --end-command "$END"',
            "",
        )
    )
    if len(script.encode()) > MOST_USER_DATA_BYTES:
        raise UsageError(
            f"the bootstrap script has {len(script.encode())} bytes, more than {MOST_USER_DATA_BYTES}; name fewer files: an image "
            "that has holdfast's needs already is quicker as well"
        )
    return script


_PROLOGUE = f"""\
end() {{
  trap '' EXIT
  # Under the rehearsal cloud only its own command is run: this may be somebody's computer.
  if [ "${{{ENV_MACHINE_KIND}:-}}" = {LOCAL_KIND} ] && [ "$END" != "${{{ENV_LOCAL_END}:-}}" ]; then return; fi
  if mkdir "$D/{ENDED}" 2>/dev/null || [ ! -d "$D/{ENDED}" ]; then sh -c "$END"; fi
}}
lives() {{ [ -d "/proc/$1" ] && ! grep -q '^State:[[:space:]]*[ZX]' "/proc/$1/status" 2>/dev/null; }}
leave() {{
  code=$?
  set +e
  # A watchdog that stands may still wait for a last save.
  while [ -s "$D/{GUARDED}" ] && lives "$(cat "$D/{GUARDED}")"; do sleep 1; done
  kill "$TIMER" 2>/dev/null
  end
  exit $code
}}
mkdir -p "$D" && cd "$D" || {{ end; exit 1; }}
rm -rf "$D/{GUARDED}" "$D/{ENDED}"
BOOT=$$
(
  trap '' HUP INT
  n=0
  while [ $n -lt @LIMIT@ ]; do
    [ -e "$D/{GUARDED}" ] && exit 0
    sleep 1; n=$((n+1))
  done
  echo "holdfast: not ready after @LIMIT@ s: ending the machine" >&2
  end
  kill "$BOOT"
) > "$D/timer.log" 2>&1 &
TIMER=$!
trap leave EXIT
trap 'exit 143' TERM INT HUP
exec > "$D/bootstrap.log" 2>&1
set -e
export {ENV_MACHINE_FOLDER}="$D" {ENV_MACHINE_BOOT_LIMIT}=@LIMIT@ HOME="${{HOME:-/root}}"
"""

_FETCH = """\
mkdir -p pieces
fetch() {
  case "$1" in
    s3://*) if command -v aws >/dev/null; then aws s3 cp --only-show-errors "$1" "$2"; else @PYTHON@ -c '
import sys, boto3
bucket, _, key = sys.argv[1][5:].partition("/")
boto3.client("s3").download_file(bucket, key, sys.argv[2])' "$1" "$2"; fi ;;
    gs://*) if command -v gcloud >/dev/null; then gcloud storage cp "$1" "$2"; else gsutil -q cp "$1" "$2"; fi ;;
    https://*) if command -v curl >/dev/null; then curl -fsSL --retry 3 -o "$2" "$1"; else wget -qO "$2" "$1"; fi ;;
    file://*) cp "${1#file://}" "$2" ;;
    *) cp "$1" "$2" ;;
  esac
}
get() {
  for pause in 1 2 4 8 16 0; do
    if fetch "$1" "pieces/$2" && echo "$3  pieces/$2" | sha256sum -c --status; then return 0; fi
    rm -f "pieces/$2"; sleep $pause
  done
  echo "holdfast: $1 could not be fetched, or is not what was asked for" >&2
  return 1
}"""

_INSTALL = """\
[ -x venv/bin/python ] || @PYTHON@ -m venv --system-site-packages --without-pip venv
# The image's pip works in here as well, and a second one takes seconds to unpack.
if venv/bin/python -m pip --version >/dev/null 2>&1; then
  for pip in venv/bin/pip venv/bin/pip3; do
    [ -e $pip ] || { printf '#!/bin/sh\\nexec "%s/venv/bin/python" -m pip "$@"\\n' "$D" > $pip; chmod 755 $pip; }
  done
else
  venv/bin/python -m ensurepip
fi
install() { venv/bin/python -m pip install --no-index --disable-pip-version-check -q "$@" pieces/@WHEEL@; }
# This very wheel, whatever the image has of the same version; then what it needs and nobody has yet.
install --no-deps --force-reinstall
install --find-links pieces"""
