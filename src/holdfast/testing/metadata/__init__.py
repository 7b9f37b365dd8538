"""A metadata server that behaves like the real ones of AWS, Google Cloud and Azure, for rehearsals and tests.

    with metadata_server("aws", timeline=[(10, "preempt")]) as server:
        ...  # a process that is started with server.environment hears a spot interruption after ten seconds
        server.do("withdraw")

`aws.py`, `gcp.py` and `azure.py` are the clouds' behaviour without a socket, `timeline.py` what can happen and when, `server.py`
the HTTP around it, with the ways in which such a server fails.
"""

from __future__ import annotations

from holdfast.testing.metadata.ask import Ask
from holdfast.testing.metadata.server import Fault, MetadataServer, metadata_server
from holdfast.testing.metadata.timeline import Step, parse_timeline, read_timeline

__all__ = ["Ask", "Fault", "MetadataServer", "Step", "metadata_server", "parse_timeline", "read_timeline"]
