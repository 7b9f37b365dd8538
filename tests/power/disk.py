"""What a disk holds after a power cut: a model of a POSIX file system whose memory and platters are told apart.

A folder's names and a file's pages are volatile until that very folder or file has been flushed. At a cut every volatile name may
be on the disk or not, independently of all others and whatever came first; an unsynced file may be empty, full of zeros, torn
between pages, or whole. That is weaker than what ext4, XFS or btrfs promise, so what survives here survives there.

A flush that failed is remembered: what was waiting for it stays uncertain, and no later flush writes it (Linux marks such pages
clean), until it is written anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

__all__ = ["File", "Folder", "Node", "Question", "Tree", "all_answers", "materialise", "questions", "survivor"]

_PAGE_BYTES = 4096

Tree: TypeAlias = dict[str, bytes | None]
"""Paths below the base: a file's bytes, or None for a folder."""


@dataclass(eq=False)
class File:
    """An inode with pages. `dirty` pages wait for a flush, `lost` ones were waiting when one failed."""

    data: bytes = b""
    dirty: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)

    def write(self, offset: int, data: bytes) -> None:
        self.data = self.data[:offset].ljust(offset, b"\0") + data + self.data[offset + len(data) :]
        pages = set(range(offset // _PAGE_BYTES, -(-(offset + len(data)) // _PAGE_BYTES)))
        self.dirty |= pages
        self.lost -= pages

    def flushed(self) -> None:
        self.dirty.clear()

    def flush_failed(self) -> None:
        self.lost |= self.dirty
        self.dirty.clear()

    def contents(self) -> list[bytes]:
        """What may be on the disk; the last one is the newest."""
        unsure = self.dirty | self.lost
        if not unsure:
            return [self.data]
        even, odd = ({page for page in unsure if page % 2 == rest} for rest in (0, 1))
        torn = [self._without(unsure), self._without(even), self._without(odd)]
        kept = self.data[: min(unsure) * _PAGE_BYTES]
        return list(dict.fromkeys([kept, self.data[: len(self.data) // 2], *torn, self.data]))

    def _without(self, pages: set[int]) -> bytes:
        """The size is on the disk, these pages are not."""
        data = bytearray(self.data)
        for page in pages:
            end = min(len(data), (page + 1) * _PAGE_BYTES)
            data[page * _PAGE_BYTES : end] = bytes(end - page * _PAGE_BYTES)
        return bytes(data)


@dataclass(eq=False)
class Folder:
    """An inode with names. `stable`: what each name may lead to on the disk; `pending`: what it has led to since the last flush."""

    now: dict[str, Node] = field(default_factory=dict)
    stable: dict[str, list[Node | None]] = field(default_factory=dict)
    pending: dict[str, list[Node | None]] = field(default_factory=dict)

    def bind(self, name: str, node: Node | None) -> None:
        if node is None:
            self.now.pop(name, None)
        else:
            self.now[name] = node
        self.pending.setdefault(name, []).append(node)

    def flushed(self) -> None:
        for name, nodes in self.pending.items():
            self.stable[name] = nodes[-1:]
        self.pending.clear()

    def flush_failed(self) -> None:
        for name in self.pending:
            self.stable[name] = self.bindings(name)
        self.pending.clear()

    def names(self) -> list[str]:
        return sorted({*self.stable, *self.pending})

    def bindings(self, name: str) -> list[Node | None]:
        """Where the name may lead after a cut; the last one is the newest."""
        found = [*self.stable.get(name, [None]), *self.pending.get(name, [])]
        return [node for number, node in enumerate(found) if node not in found[number + 1 :]]


Node: TypeAlias = File | Folder


class Question(NamedTuple):
    """Something that the cut decides: where a name leads (`name` is set), or what a file holds. `answers`: how many there are."""

    node: Node
    name: str
    answers: int


def questions(base: Folder) -> list[Question]:
    """Everything below `base` that is uncertain and that some cut leaves reachable."""
    found: list[Question] = []
    seen: list[Node] = []
    waiting: list[Node] = [base]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.append(node)
        if isinstance(node, File):
            if len(node.contents()) > 1:
                found.append(Question(node, "", len(node.contents())))
            continue
        for name in node.names():
            bindings = node.bindings(name)
            if len(bindings) > 1:
                found.append(Question(node, name, len(bindings)))
            waiting.extend(below for below in bindings if below is not None)
    return found


def survivor(base: Folder, asked: Sequence[Question], answers: Sequence[int]) -> Tree:
    """The tree that is there when the power is back."""
    chosen = {(id(question.node), question.name): answer for question, answer in zip(asked, answers, strict=True)}

    def walk(folder: Folder, prefix: str) -> Iterator[tuple[str, bytes | None]]:
        for name in folder.names():
            node = folder.bindings(name)[chosen.get((id(folder), name), 0)]
            if isinstance(node, File):
                yield prefix + name, node.contents()[chosen.get((id(node), ""), 0)]
            elif isinstance(node, Folder):
                yield prefix + name, None
                yield from walk(node, f"{prefix}{name}/")

    return dict(walk(base, ""))


def all_answers(asked: Sequence[Question], most: int) -> Iterator[tuple[int, ...]]:
    """Every combination where there are at most `most` of them; else the corners: the oldest of all, the newest of all, and
    these with one answer changed."""
    counts = [question.answers for question in asked]
    total = 1
    for count in counts:
        total *= count
    if total <= most:
        yield from itertools.product(*(range(count) for count in counts))
        return
    for corner in ([0] * len(counts), [count - 1 for count in counts]):
        yield tuple(corner)
        for index, count in enumerate(counts):
            for answer in range(count):
                if answer != corner[index]:
                    yield (*corner[:index], answer, *corner[index + 1 :])


def materialise(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for path, data in sorted(tree.items()):
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
