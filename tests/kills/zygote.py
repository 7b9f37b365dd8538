"""A process that has torch imported and forks a victim on demand, so that a hundred restarts do not import torch a hundred times.

Reads one JSON request per line on stdin and answers with one JSON line on stdout:
{"start": {...}} → {"pid": n}; {"wait": pid} → {"status": n}.
It stays single-threaded, so forking it is safe.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import victim


def run_child(arguments: dict[str, Any]) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(arguments["environ"])
        log = os.open(arguments["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        victim.train(**arguments["train"])
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                run_child(request["start"])
            answer = {"pid": pid}
        else:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
