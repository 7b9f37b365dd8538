"""A small GPT over characters, complete and plain: what `train.py` trains.

    characters → embedding + position → blocks of (causal attention, MLP) → the next character's logits

Positions are a fixed table of sines and the output layer shares its weight with the embedding, so the state holds what real models'
state holds: a buffer that never changes, and a tensor that is known by two names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

__all__ = ["GPT"]


class Attention(nn.Module):
    """Each position looks at itself and at those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on each; both add to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = x + self.attention(x)
        thought: Tensor = attended + self.mlp(attended)
        return thought


class GPT(nn.Module):
    """`forward` takes (batch, length) token numbers, length ≤ context, and returns (batch, length, vocabulary) logits."""

    positions: Tensor

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", sines(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(initialise)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        # Tied weights are small (0.02) for the head's sake; the scale brings the embedding up to the positions.
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.dropout(x))))
        return logits


def sines(context: int, width: int) -> Tensor:
    """(context, width): position p as sine and cosine of p at width / 2 frequencies from 1 down to 1 / 10 000."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(context)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(context, width)


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
