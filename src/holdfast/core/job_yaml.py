"""YAML with line numbers, for files that people write: plain values come out, and the line of each, so that a message can point.

Stricter than YAML: one document, a mapping, no key twice, and what aliases unfold to is bounded.
"""

from __future__ import annotations

from collections.abc import Collection

import yaml

from holdfast.core.errors import UsageError

__all__ = ["read_yaml"]

_LARGEST_CHARACTERS = 1 << 20
_MOST_NODES = 50_000
_DEEPEST = 40


def read_yaml(text: str, name: str, words: Collection[str] = ()) -> tuple[dict[str, object], dict[str, int]]:
    """The values, and the line of each path (`$.resources.any_of[0].cpus`). What stands under the keys `words` is text as written:
    there `NO` is no falsehood and `010` no number. `name` is used in messages; all errors are UsageErrors."""
    if len(text) > _LARGEST_CHARACTERS:
        raise UsageError(f"{name} has {len(text)} characters; at most {_LARGEST_CHARACTERS} are read")
    lines: dict[str, int] = {}
    data = _Reader(name, lines, tuple(f"$.{word}." for word in words)).read(text)
    return data, lines


class _Reader(yaml.SafeLoader):
    def __init__(self, name: str, lines: dict[str, int], words: tuple[str, ...]) -> None:
        self.source, self.lines, self.words, self.seen_nodes = name, lines, words, 0

    def read(self, text: str) -> dict[str, object]:
        try:
            super().__init__(text)
            root = self.get_single_node()
            data = None if root is None else self._value(root, "$")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            raise UsageError(f"{self.source}, line {line}: this is not YAML: {error.problem}") from None
        except RecursionError:
            raise UsageError(f"{self.source}: nested too deeply") from None
        # A tag that does not fit its value ends in any of these inside the parser.
        except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise UsageError(f"{self.source}: this is not YAML: {error}") from None
        if data is not None and not isinstance(data, dict):
            raise UsageError(f"{self.source}, line 1: it is a mapping of keys to values")
        return data or {}

    def _value(self, node: yaml.Node, path: str) -> object:
        self.seen_nodes += 1
        if self.seen_nodes > _MOST_NODES or path.count(".") + path.count("[") > _DEEPEST:
            raise UsageError(f"{self.source}: too large once its aliases are unfolded")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        if path.startswith(self.words) and node.tag != "tag:yaml.org,2002:null":
            return str(node.value)
        return self.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, object]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self.source}, line {key.start_mark.line + 1}: a key is one word")
            if key.value in seen and key.value != "<<":
                raise UsageError(
                    f"{self.source}, line {key.start_mark.line + 1}: {key.value!r} stands in line {seen[key.value]} already"
                )
            seen[key.value] = key.start_mark.line + 1
        self.flatten_mapping(node)
        found: dict[str, object] = {}
        for key, value in node.value:
            self.lines[f"{path}.{key.value}"] = key.start_mark.line + 1
            found[key.value] = self._value(value, f"{path}.{key.value}")
        return found
