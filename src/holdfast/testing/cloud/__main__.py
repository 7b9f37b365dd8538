"""`python -m holdfast.testing.cloud FOLDER [--config FILE]`: the cloud in the foreground, until SIGTERM or Ctrl-C. Its machines
go on."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from holdfast.core.contract import EXIT_USAGE
from holdfast.core.errors import HoldfastError
from holdfast.provider.local.wire import EXIT_TAKEN
from holdfast.testing.cloud.config import read_config
from holdfast.testing.cloud.server import FolderTaken, serve

CONFIG = "config.json"
"""In the folder: what holds where no other file is named."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m holdfast.testing.cloud", description="a cloud for rehearsals, on this machine"
    )
    parser.add_argument("folder", type=Path, help="what it remembers, and where its machines live")
    parser.add_argument("--config", type=Path, help="pools, prices, faults: see docs/rehearsal.md")
    arguments = parser.parse_args()
    own = arguments.folder / CONFIG
    file: Path | None = arguments.config or (own if own.exists() else None)
    try:
        config = read_config(file)
        with serve(arguments.folder.resolve(), config, Path.cwd() if file is None else file.resolve().parent) as server:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.close())
            server.run()
    except FolderTaken as error:
        print(error, file=sys.stderr)
        return EXIT_TAKEN
    except HoldfastError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
