"""What ESM2 and ESM C share: letters, batches, the walk through the blocks, rotary attention.

Shapes: T tokens of all rows end to end (`mgen_core.packed`), H width, V outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
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
from mgen_core.attention import mix
from mgen_core.packed import Spans, pack, unpacked
from mgen_core.rotary import Rotation, frequencies, rotate, rotation

SPECIAL = ("<cls>", "<pad>", "<eos>", "<unk>")
CLS, EOS, MASK_ID = b"\0", b"\2", 32
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"
ALPHABET = Alphabet(
    ids={letter: number for number, letter in enumerate(LETTERS, len(SPECIAL))},
    replace={"J": ("X", "J read as X")},
    stop="*",
    mask=MASK_ID,
)

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
    packed = True
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
        """`tokens` (T,), and what else `mgen_core.packed.pack` tells of the rows."""
        return pack([CLS + ALPHABET.encode(row.data) + EOS for row in rows], 1, 1)

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        streams, logits = module(inputs, want)
        return unpacked(inputs, streams, logits)


class Encoder(nn.Module):
    """Blocks between an embedding and a norm: the module of an `EsmBackbone`."""

    embed: nn.Embedding
    rotary: Rotary
    layers: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Module | None

    def start(self, tokens: Tensor) -> Tensor:
        """Layer 0 (T, H) of token ids (T,)."""
        hidden: Tensor = self.embed(tokens)
        return hidden

    def forward(self, inputs: Inputs, want: Want) -> tuple[dict[int, Tensor], Tensor | None]:
        """The wanted layers (T, H) and logits (T, V); blocks behind them do not run."""
        depth = len(self.layers)
        last = depth if want.logits else max(want.layers, default=0)
        turn = self.rotary(inputs["positions"])
        hidden = self.start(inputs["tokens"])
        kept = {}
        for number in range(last):
            if number in want.layers:
                kept[number] = hidden
            hidden = self.layers[number](hidden, turn, inputs["spans"])
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
        self.features = features
        self.register_buffer("inv_freq", frequencies(features, theta))

    def forward(self, positions: Tensor) -> Rotation:
        # Tables in float32 at any precision.
        return rotation(positions, self.inv_freq, self.features, torch.float32)


def attend(qkv: tuple[Tensor, Tensor, Tensor], heads: int, turn: Rotation, spans: Spans) -> Tensor:
    """Multi-head attention over three (T, H), the first two of which it turns in place."""
    query, key, value = (x.view(len(x), heads, -1) for x in qkv)
    rotate(query, turn)
    rotate(key, turn)
    return mix(query, key, value, spans).flatten(1)
