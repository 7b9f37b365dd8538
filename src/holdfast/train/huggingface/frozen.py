"""A model of which most is frozen (LoRA and other adapters over a base that the script loads): its trained part alone.

By default a run saves the frozen part as well; it is sent once. Left out, it is not copied, hashed or read back either; what
remains of it in a checkpoint is a fingerprint, by which another base is found out before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from blake3 import blake3

from holdfast.core.errors import UsageError

__all__ = ["TrainedPart"]

_PIECE_BYTES = 64 << 20


class TrainedPart(torch.nn.Module):
    """`model` without the parameters that are frozen now; they must stay so. Buffers are part of it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_whole"] = model  # not registered: it is no child of this
        self._frozen = frozenset(_frozen_names(model))

    def fingerprint(self) -> str:
        """Of the frozen parameters: names, types, shapes and bytes."""
        whole: torch.nn.Module = self.__dict__["_whole"]
        digest = blake3()
        for name, parameter in whole.named_parameters():
            if name in self._frozen:
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
                for piece in parameter.detach().reshape(-1).view(torch.uint8).split(_PIECE_BYTES):
                    digest.update(piece.cpu().numpy())
        return digest.hexdigest(16)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        whole: torch.nn.Module = self.__dict__["_whole"]
        if thawed := self._frozen - set(_frozen_names(whole)):
            raise UsageError(
                f'{min(thawed)} was frozen when the training began and is trained now: with frozen="left out" that part would be '
                'lost. Use frozen="saved"'
            )
        return {name: value for name, value in whole.state_dict().items() if name not in self._frozen}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        whole: torch.nn.Module = self.__dict__["_whole"]
        return whole.load_state_dict(state_dict, strict=False)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        yield from self.__dict__["_whole"].named_modules(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        every = self.__dict__["_whole"].named_parameters(*args, **kwargs)
        return ((name, parameter) for name, parameter in every if name not in self._frozen)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.__dict__["_whole"].named_buffers(*args, **kwargs)


def _frozen_names(model: torch.nn.Module) -> Iterator[str]:
    """Under each of its names where one is tied to another."""
    every = model.named_parameters(remove_duplicate=False)
    return (name for name, parameter in every if not parameter.requires_grad)
