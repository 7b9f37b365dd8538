"""moto's server, one request at a time: `python -m holdfast.testing.moto_in_turn PORT`, on 127.0.0.1.

By itself moto looks whether a name is free and then writes, with other requests in between: of 1,000 races of eight writers on a
busy machine, four had two winners. Such a store passes the probe and still cannot fence; in turn, its answers are right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

__all__: list[str] = []

Application = Callable[[Any, Any], Iterable[bytes]]


def _in_turn(application: Application) -> Application:
    lock = Lock()

    def one(environ: Any, start_response: Any) -> Iterable[bytes]:
        with lock:
            return application(environ, start_response)

    return one


if __name__ == "__main__":
    run_simple(
        "127.0.0.1",
        int(sys.argv[1]),
        _in_turn(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
