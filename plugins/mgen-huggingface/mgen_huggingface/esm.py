"""What ESM2 and ESM C share: letters, batches, the walk through the blocks, rotary attention."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgen_core import (
    Activations,
    Backbone,
    BackboneCard,
    BackboneOptions,
    Inputs,
    Row,
    Want,
    WeightsError,
)
from mgen_core.alphabet import Alphabet, hide

SPECIAL = ("<cls>", "<pad>", "<eos>", "<unk>")
CLS, PAD, EOS, MASK_ID = 0, 1, 2, 32
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"
ALPHABET = Alphabet(
    ids={letter: number for number, letter in enumerate(LETTERS, len(SPECIAL))},
    replace={"J": ("X", "J read as X")},
    stop="*",
    mask=MASK_ID,
)

Rotation = tuple[Tensor, Tensor]  # cos and sin, (L, features of a head / 2), float32
C = TypeVar("C", bound="EsmConfig")


@dataclass(frozen=True)
class EsmConfig:
    """The part of config.json that the numbers depend on.

    Subclass it with further fields; their defaults are those of transformers.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    accepted: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values that other keys may have: this code would compute another model for any other."""

    @classmethod
    def read(cls: type[C], found: Mapping[str, Any]) -> C:
        """Raises `WeightsError` for a key that is missing, or not as accepted."""
        for name, values in cls.accepted.items():
            if found.get(name) not in values:
                raise WeightsError(
                    f"config.json says {name}: {json.dumps(found.get(name))}, but this backbone "
                    f"needs {' or '.join(json.dumps(value) for value in values)}",
                    "try --backbone huggingface, which takes any encoder that transformers knows",
                )
        known = {field.name: field for field in fields(cls)}
        for name, field in known.items():
            if name not in found and field.default is MISSING:
                raise WeightsError(f"config.json has no {name}", "fetch the file again")
        return cls(**{name: found[name] for name in known if name in found})


class EsmBackbone(Backbone):
    """Rows of letters to `<cls> letters <eos>`, and an `Encoder` over them."""

    cls_position = 0
    kind: type[EsmConfig]
    depths: Mapping[int, int]
    """Depth of the published model of each width, for planning without weights."""

    def __init__(self, card: BackboneCard, options: BackboneOptions) -> None:
        super().__init__(card, options)
        if options.weights is None:
            self.depth = self.depths[self.width]
        else:
            self.config = self.kind.read(options.config())
            self.depth = self.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.config.hidden_size if self.options.weights else super().width

    def prepare(self, row: Row) -> Row:
        return row.with_data(ALPHABET.clean(row.data))

    def note(self, row: Row, prepared: Row) -> str | None:
        return ALPHABET.note(row.data, prepared.data)

    def masked(self, row: Row, position: int) -> Row:
        return row.with_data(hide(row.data, position))

    def measure(self, row: Row) -> int:
        return len(row.data) + 2

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """`tokens` (B, L) int64, `residues` (B, L) bool; `attention` only where lengths differ.

        Without a mask the attention kernels are faster and the numbers the same.
        """
        lengths = [self.measure(row) for row in rows]
        tokens = np.full((len(rows), max(lengths)), PAD, dtype=np.int64)
        for line, row, length in zip(tokens, rows, lengths):
            line[0], line[length - 1] = CLS, EOS
            line[1 : length - 1] = np.frombuffer(ALPHABET.encode(row.data), dtype=np.uint8)
        inputs = {
            "tokens": torch.from_numpy(tokens),
            "residues": torch.from_numpy(tokens >= len(SPECIAL)),
        }
        if min(lengths) < max(lengths):
            inputs["attention"] = torch.from_numpy(tokens != PAD)
        return inputs

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        attention = inputs.get("attention")
        if attention is not None:
            attention = attention[:, None, None, :]
        hidden, logits = module(inputs["tokens"], attention, want)
        return Activations(hidden, inputs["residues"], logits)


class Encoder(nn.Module):
    """Blocks between an embedding and a norm: the module of an `EsmBackbone`."""

    embed: nn.Embedding
    rotary: Rotary
    layers: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Module | None

    def start(self, tokens: Tensor) -> Tensor:
        """Layer 0 (B, L, H) of token ids (B, L)."""
        hidden: Tensor = self.embed(tokens)
        return hidden

    def forward(
        self, tokens: Tensor, attention: Tensor | None, want: Want
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """The wanted layers (B, L, H) and logits (B, L, V); blocks behind them do not run."""
        depth = len(self.layers)
        last = depth if want.logits else max(want.layers, default=0)
        rotation = self.rotary(tokens.shape[1])
        hidden = self.start(tokens)
        kept = {}
        for number in range(last):
            if number in want.layers:
                kept[number] = hidden
            hidden = self.layers[number](hidden, rotation, attention)
        if last == depth:
            hidden = self.norm(hidden)
        if last in want.layers:
            kept[last] = hidden
        return kept, self.head(hidden) if self.head and want.logits else None


class Rotary(nn.Module):
    """Angles by which the features of a head are turned, position by position."""

    inv_freq: Tensor

    def __init__(self, features: int, theta: float) -> None:
        super().__init__()
        steps = torch.arange(0, features, 2, dtype=torch.float32) / features
        self.register_buffer("inv_freq", 1.0 / theta**steps)

    def forward(self, length: int) -> Rotation:
        positions = torch.arange(length, dtype=torch.float32, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        return angles.cos(), angles.sin()


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], heads: int, rotation: Rotation, attention: Tensor | None
) -> Tensor:
    """Multi-head attention over three (B, L, H), with rotary positions."""
    split = (*qkv[0].shape[:2], heads, -1)
    query, key, value = (x.view(split).transpose(1, 2) for x in qkv)
    mixed = F.scaled_dot_product_attention(
        rotate(query, rotation), rotate(key, rotation), value, attn_mask=attention
    )
    return mixed.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + half) of the last dimension; in float32 at any precision."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
