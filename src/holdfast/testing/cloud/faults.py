"""What the cloud's API does wrong, and when: scripted for the next calls, else drawn from the seed, call by call."""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal

from holdfast.core.errors import UsageError
from holdfast.testing.cloud.config import FaultConfig

__all__ = ["Call", "Faults"]

Call = Literal["create", "list", "terminate"]
_WORDS: dict[Call, frozenset[str]] = {
    "create": frozenset({"ok", "error", "throttle", "no-capacity", "lost", "late"}),
    "list": frozenset({"ok", "error", "throttle", "lost"}),
    "terminate": frozenset({"ok", "error", "throttle", "lost", "ignored"}),
}


class Faults:
    """Thread safety: none; the cloud draws under its lock."""

    def __init__(self, config: FaultConfig, seed: int) -> None:
        self._seed = seed
        self._drawn: Counter[Call] = Counter()
        self.configure(config)

    def configure(self, config: FaultConfig) -> None:
        """From now on this; UsageError for a word that no call knows."""
        chances: dict[Call, dict[str, float]] = {
            "create": config.create,
            "list": config.list,
            "terminate": config.terminate,
        }
        for call, words in _WORDS.items():
            unknown = ({*chances[call], *config.script.get(call, ())}) - words
            if unknown:
                raise UsageError(f"{call} cannot {sorted(unknown)[0]!r}; it can {', '.join(sorted(words))}")
        self.config, self._chances = config, chances
        self._script = {call: list(words) for call, words in config.script.items()}

    def draw(self, call: Call) -> str:
        """`ok`, or what goes wrong with this call."""
        scripted = self._script.get(call)
        if scripted:
            return scripted.pop(0)
        self._drawn[call] += 1
        left = random.Random(f"{self._seed}/{call}/{self._drawn[call]}").random()
        for word, chance in self._chances[call].items():
            left -= chance
            if left < 0:
                return word
        return "ok"
