"""The training states that are measured, and how they change between two saves.

A state is a module and its AdamW, as a training script has them. Everything is float32. No two blocks of a state are alike, so that
deduplication inside one snapshot saves nothing that it would not save in a real run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch import nn

__all__ = ["STATES", "State", "build", "fingerprint", "named_tensors"]

MIB = 1 << 20
_WIDTH = 1024
_LAYER_BYTES = 4 * _WIDTH * _WIDTH
_RANK = 8
_BATCH = 32


class Layers(nn.Module):
    """`layers` square weights of 4 MiB, the first `frozen` of which do not train."""

    def __init__(self, layers: int, frozen: int = 0) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(_WIDTH, _WIDTH)) for _ in range(layers))
        for weight in list(self.weights)[:frozen]:
            weight.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            inputs = nn.functional.layer_norm(inputs @ weight, (_WIDTH,))
        return inputs


class Adapters(nn.Module):
    """A frozen base and, for each of its layers, a trained pair of thin matrices, as LoRA has them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.base = Layers(layers, frozen=layers)
        self.down = nn.ParameterList(nn.Parameter(torch.empty(_WIDTH, _RANK)) for _ in range(layers))
        self.up = nn.ParameterList(nn.Parameter(torch.empty(_RANK, _WIDTH)) for _ in range(layers))


class Small(nn.Module):
    """Many parameters of 4 KiB."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.empty(_WIDTH)) for _ in range(count))


def _adam(mib: int) -> Callable[[], nn.Module]:
    """A model that is `mib` MiB together with AdamW's two moments."""
    return lambda: Layers(mib * MIB // (3 * _LAYER_BYTES))


# Of the bytes of 256 MiB with AdamW, a tenth changes: 54 frozen layers, and 2 that train, each three times (weight, two moments).
STATES: dict[str, Callable[[], nn.Module]] = {
    "256 MiB": _adam(256),
    "1 GiB": _adam(1024),
    "4 GiB": _adam(4096),
    "90 % frozen, 240 MiB": lambda: Layers(56, frozen=54),
    "90 % frozen, 960 MiB": lambda: Layers(224, frozen=216),
    "LoRA, 256 MiB": lambda: Adapters(64),
    "LoRA, 1 GiB": lambda: Adapters(256),
    "10,000 tensors": lambda: Small(2500),  # each with two moments and a step count
}


@dataclass(slots=True)
class State:
    """A module and its optimizer."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def tree(self) -> dict[str, Any]:
        """What one hands to a checkpoint library. It is made anew for every save, as a training script does."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self, *, trained_only: bool = False) -> list[torch.Tensor]:
        """Everything but AdamW's step counts, as it lies in memory."""
        parameters = [p.detach() for p in self.model.parameters() if p.requires_grad or not trained_only]
        return parameters + [v for state in self.optimizer.state.values() for v in state.values() if v.numel() > 1]

    def total_bytes(self, *, trained_only: bool = False) -> int:
        return sum(tensor.nbytes for tensor in self.tensors(trained_only=trained_only))

    def change(self, *, trained_only: bool = False) -> None:
        """Give every element (of what trains) another value."""
        torch._foreach_mul_(self.tensors(trained_only=trained_only), 1.0001)

    def at_start(self) -> State:
        """The same model with an AdamW that has no state yet, as a script has them before it restores."""
        return State(self.name, self.model, _adamw(self.model))

    def step(self) -> None:
        """Forward, backward, and AdamW: what a save runs beside."""
        self.forward_backward()
        self.optimizer.step()

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(_BATCH, _WIDTH))[:, 0].sum().backward()


def build(name: str, *, zeros: bool = False) -> State:
    """The state of that name, with moments. `zeros`: a place to restore into."""
    torch.manual_seed(0)
    model = STATES[name]()
    block = torch.randn(_WIDTH * _WIDTH) / _WIDTH**0.5
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(block[: parameter.numel()].view(parameter.shape) * (0.0 if zeros else 1 + number * 1e-3))
    optimizer = _adamw(model)
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        parameter.grad = block[: parameter.numel()].view(parameter.shape) * (0.0 if zeros else 2 + number * 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return State(name, model, optimizer)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def named_tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a tree by their path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        for key, item in tree.items():
            found |= named_tensors(item, f"{path}.{key}" if path else str(key))
    return found


def fingerprint(state: State) -> dict[str, str]:
    """A digest of every tensor: restored values are compared with this, whatever library they came from."""
    return {
        name: blake3(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, max_threads=blake3.AUTO).hexdigest()
        for name, tensor in named_tensors(state.tree()).items()
    }
