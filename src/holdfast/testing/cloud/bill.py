"""What a rehearsal cost, by the provider's rules: read from the cloud's log by a program that shares no code with holdfast.

    python -I bill.py FOLDER [--until UNIX_SECONDS]

    machine     every second from birth to death at the pool's price in that second, on spot never more than its ceiling; at least
                `minimum_s` seconds, those that are missing at the price of its last second. A spot machine that the provider
                takes within its first hour computes for nothing, where `first_hour_free` says so
    volume      its gibibytes, address: each, at the hourly rate, in whole units of `extras_unit_s` seconds, until it is removed

Each of the three is rounded up to a whole millionth of a dollar, for each machine. What is still there is billed until
`--until`, else until the newest entry of the log. The rules in force are the newest in the log. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

__all__ = ["bill", "read_log"]

HOUR_S = 3600


def read_log(path: Path) -> list[dict[str, Any]]:
    """Whole lines; one that was being written when the cloud was killed has not happened."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def price_seconds(changes: Sequence[tuple[int, int]], since: int, until: int) -> Iterator[tuple[int, int]]:
    """(price, seconds) pieces of [since, until). `changes`: (second, price), in the order of the log; the later of one second
    holds."""
    prices = dict(sorted(changes, key=lambda change: change[0]))
    seconds = list(prices)
    for begin, end in pairwise([since, *(second for second in seconds if since < second < until), until]):
        yield prices[seconds[bisect_right(seconds, begin) - 1]], end - begin


def computing(
    birth: dict[str, Any],
    death: dict[str, Any] | None,
    until: int,
    changes: Sequence[tuple[int, int]],
    rules: dict[str, Any],
) -> tuple[int, int]:
    """Millionths of a dollar, and billed seconds."""
    spot = birth["pool"].endswith("/spot")
    begin, end = birth["t"], until if death is None else death["t"]
    most = birth["ceiling_microusd_h"] if spot else None
    pieces = [
        (price if most is None else min(price, most), s)
        for price, s in price_seconds(changes, begin, max(end, begin + 1))
    ]
    last = pieces[-1][0]
    billed_s = max(end - begin, rules["minimum_s"])
    if end == begin:
        pieces = []
    pieces.append((last, billed_s - (end - begin)))
    free = (
        rules["first_hour_free"] and spot and death is not None and death["by"] == "provider" and end - begin < HOUR_S
    )
    cost = 0 if free else ceil(sum(Fraction(price * seconds, HOUR_S) for price, seconds in pieces))
    return cost, billed_s


def extra(entry: dict[str, Any], removed: int | None, until: int, rules: dict[str, Any]) -> int:
    rate = rules["address_microusd_h"] if entry["event"] == "address" else entry["gib"] * rules["disk_microusd_gib_h"]
    unit_s = rules["extras_unit_s"]
    seconds = (until if removed is None else removed) - entry["t"]
    return ceil(Fraction(rate * ceil(Fraction(seconds, unit_s)) * unit_s, HOUR_S))


def bill(entries: Sequence[dict[str, Any]], until: int | None = None) -> dict[str, Any]:
    until = max(entry["t"] for entry in entries) if until is None else until
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault(entry["event"], []).append(entry)
    rules = kinds["rules"][-1]["rules"]
    deaths = {entry["machine"]: entry for entry in kinds.get("death", [])}
    removed = {entry["id"]: entry["t"] for entry in kinds.get("removed", [])}
    prices: dict[str, list[tuple[int, int]]] = {}
    for entry in kinds["price"]:
        prices.setdefault(entry["pool"], []).append((entry["t"], entry["microusd_h"]))
    machines: dict[str, dict[str, Any]] = {}
    for birth in kinds.get("birth", []):
        death = deaths.get(birth["machine"])
        cost, billed_s = computing(birth, death, until, prices[birth["pool"]], rules)
        machines[birth["machine"]] = {
            "pool": birth["pool"],
            "tags": birth["tags"],
            "born_unix_s": birth["t"],
            "gone_unix_s": death and death["t"],
            "ended_by": death and death["by"],
            "billed_s": billed_s,
            "compute_microusd": cost,
            "volume_microusd": 0,
            "address_microusd": 0,
        }
    for kind in ("volume", "address"):
        for entry in kinds.get(kind, []):
            machines[entry["machine"]][f"{kind}_microusd"] += extra(entry, removed.get(entry["id"]), until, rules)
    for machine in machines.values():
        machine["total_microusd"] = sum(machine[f"{kind}_microusd"] for kind in ("compute", "volume", "address"))
    total = sum(machine["total_microusd"] for machine in machines.values())
    return {"until_unix_s": until, "total_microusd": total, "machines": machines}


def main(arguments: Sequence[str]) -> int:
    until = int(arguments[2]) if len(arguments) == 3 and arguments[1] == "--until" else None
    if not arguments or (len(arguments) > 1 and until is None):
        print("bill.py FOLDER [--until UNIX_SECONDS]", file=sys.stderr)
        return 2
    print(json.dumps(bill(read_log(Path(arguments[0]) / "log.jsonl"), until), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
