"""A user's rules from the values of a job file: the keys that users know, texts in, `Rules` out, errors that show the form.

spot_policy: auto            # spot, on-demand
opportunistic: false         # spot only, and no deadline
max_price: $2.50             # of one machine, per hour
on_demand_floor: 25%         # of the work; of several machines: 2, or a share of them
fallback_after: 3 tries or 10 min
start_window: mon-fri 20:00-06:00, sat, sun      # UTC; or run_window
reserved: [block-a, block-b]
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

from holdfast.core.config import parse_duration_s
from holdfast.core.errors import UsageError
from holdfast.core.jobfile import parse_dollars, parse_floor
from holdfast.policy.backoff import Fallback
from holdfast.policy.market.facts import HIGHEST_MICROUSD_H, LONGEST_S
from holdfast.policy.market.rules_facts import MILLION, Rules, SpotPolicy
from holdfast.policy.market.rules_week import parse_weekly

__all__ = ["RULE_KEYS", "parse_fallback", "parse_rules"]


def parse_rules(values: Mapping[str, object], num_nodes: int = 1) -> Rules:
    """The rules that these keys say, for a job of so many machines. A key whose value is None is as good as left out."""
    said: dict[str, object] = {}
    for key, value in values.items():
        if key not in _READERS:
            near = difflib.get_close_matches(str(key), RULE_KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(RULE_KEYS)}"
            raise UsageError(f"unknown rule {key!r}; {hint}")
        if value is None:
            continue
        try:
            said |= _READERS[key](value, num_nodes)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
    return Rules(**said)  # type: ignore[arg-type]


def parse_fallback(value: object) -> Fallback:
    """ "3 tries", "10 min", "3 tries or 10 min"; a bare number is tries."""
    tries: int | None = None
    after_s: int | None = None
    for part in re.split(r"\s+or\s+|,", str(value).strip().lower()):
        counted = re.fullmatch(r"(\d{1,6})\s*(?:try|tries)?", part.strip(), re.ASCII)
        if counted and tries is None:
            tries = int(counted[1])
        elif not counted and after_s is None:
            after_s = min(LONGEST_S, round(_duration_s(part)))
        else:
            raise UsageError(f"not a fallback: {value!r}; {_FALLBACK_FORMS}")
    return Fallback(tries, after_s)


_FALLBACK_FORMS = 'it is written like "3 tries", "10 min" or "3 tries or 10 min"'


def _duration_s(text: str) -> float:
    try:
        return parse_duration_s(text)
    except UsageError:
        raise UsageError(f"not a fallback: {text.strip()!r}; {_FALLBACK_FORMS}") from None


def _spot_policy(value: object, _: int) -> dict[str, object]:
    try:
        return {"spot_policy": SpotPolicy(value)}
    except ValueError:
        raise UsageError(f"spot, on-demand or auto, not {value!r}") from None


def _opportunistic(value: object, _: int) -> dict[str, object]:
    said = {"true": True, "yes": True, "false": False, "no": False}.get(str(value).strip().lower())
    if said is None:
        raise UsageError(f"true or false, not {value!r}")
    return {"opportunistic": said}


def _max_price(value: object, num_nodes: int) -> dict[str, object]:
    microusd_h = round(Fraction(parse_dollars(value)) * MILLION)
    if microusd_h * num_nodes > HIGHEST_MICROUSD_H:
        most = HIGHEST_MICROUSD_H / MILLION / num_nodes
        raise UsageError(f"{value!r} is more than ${most:,.0f} per machine and hour, the most that is counted with")
    return {"max_microusd_h": microusd_h}


def _floor(value: object, num_nodes: int) -> dict[str, object]:
    text = str(value).strip()
    if num_nodes > 1 or not text.endswith("%"):
        nodes = parse_floor(text, num_nodes)
        return {"floor_nodes": nodes} if num_nodes > 1 else {"floor_millionths": nodes * MILLION}
    try:
        share = Fraction(text[:-1].strip()) / 100
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share <= 1:
        raise UsageError(
            f'not a floor: {value!r}; a share of the work between "0%" and "100%", or a number of machines'
        )
    # Rounded up: what was promised is kept.
    return {"floor_millionths": -(-share.numerator * MILLION // share.denominator)}


def _reserved(value: object, _: int) -> dict[str, object]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UsageError(f"names of pools, as a list or with commas, not {value!r}")
    return {"reserved": tuple(dict.fromkeys(name.strip() for name in names))}


_READERS: Mapping[str, Callable[[object, int], dict[str, object]]] = {
    "spot_policy": _spot_policy,
    "opportunistic": _opportunistic,
    "max_price": _max_price,
    "on_demand_floor": _floor,
    "fallback_after": lambda value, _: {"fallback": parse_fallback(value)},
    "start_window": lambda value, _: {"start_window": parse_weekly(value)},
    "run_window": lambda value, _: {"run_window": parse_weekly(value)},
    "reserved": _reserved,
}
RULE_KEYS = tuple(_READERS)
