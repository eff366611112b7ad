"""AntiBERTy (Ruffolo, Gray and Sulam 2021, arXiv 2112.07782): a BERT over antibody residues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mgen_core import Activations, Backbone, Inputs, Row, Want
from mgen_core.alphabet import Alphabet, hide
from mgen_core.attention import mix
from mgen_core.dense import activated
from mgen_core.packed import Spans, pack, unpacked

WIDTH, DEPTH, HEADS, INNER, POSITIONS, EPS = 512, 8, 8, 2048, 512, 1e-12

# Line N of the model's vocab.txt is token N. It has no letter for unknown residues.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP, MASK = b"\2", b"\3", 4
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
IDS = {letter: n for n, letter in enumerate(LETTERS, len(SPECIAL))}
ALPHABET = Alphabet(IDS, stop="*", mask=MASK)

# Names of our modules -> names in the published file; LAYER counts from bert.encoder.layer.N.
MODEL = {
    "words": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "norm": "bert.embeddings.LayerNorm",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions.decoder",
}
LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mix": "attention.output.dense",
    "mix_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "down_norm": "output.LayerNorm",
}


class AntiBERTy(Backbone):
    vocabulary = (*SPECIAL, *LETTERS)
    cls_position = 0
    packed = True
    depth = DEPTH
    max_positions = POSITIONS
    units = ("Layer",)
    ignored = (r"bert\.pooler\..*", r"cls\..*", r"bert\.embeddings\.position_ids")

    # Without weights: what planning and collating need.

    def prepare(self, row: Row) -> Row:
        return row.with_data(ALPHABET.clean(row.data))

    def note(self, row: Row, prepared: Row) -> str | None:
        return ALPHABET.note(row.data, prepared.data)

    def masked(self, row: Row, position: int) -> Row:
        return row.with_data(hide(row.data, position))

    def measure(self, row: Row) -> int:
        return len(row.data) + 2

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """`tokens` (T,): [CLS] residues [SEP] of every row, and what else `pack` tells of them."""
        return pack([CLS + ALPHABET.encode(row.data) + SEP for row in rows], 1, 1)

    # With weights: `build` makes the module, mgen fills it, `forward` runs it.

    def build(self) -> nn.Module:
        return Model(logits=self.want.logits)

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        module, _, kind = name.rpartition(".")
        if module.startswith("layers."):
            _, number, part = module.split(".")
            return (f"bert.encoder.layer.{number}.{LAYER[part]}.{kind}",)
        return (f"{MODEL[module]}.{kind}",)

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        streams, logits = module(inputs, want)
        return unpacked(inputs, streams, logits)


class Model(nn.Module):
    def __init__(self, *, logits: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(len(SPECIAL) + len(LETTERS), WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)  # of a pair of sentences; a chain is the first
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.head = Head() if logits else None

    def forward(self, inputs: Inputs, want: Want) -> tuple[dict[int, Tensor], Tensor | None]:
        """The wanted layers (T, H) and logits (T, V) of T tokens of all rows end to end."""
        hidden = self.words(inputs["tokens"]) + self.positions(inputs["positions"])
        hidden = self.norm(hidden + self.types.weight[0])
        kept = {0: hidden} if 0 in want.layers else {}
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, inputs["spans"])
            if number in want.layers:
                kept[number] = hidden
        return kept, self.head(hidden) if self.head and want.logits else None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mix_norm = nn.LayerNorm(WIDTH, EPS)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.down_norm = nn.LayerNorm(WIDTH, EPS)

    def forward(self, hidden: Tensor, spans: Spans) -> Tensor:
        query, key, value = (
            project(hidden).view(len(hidden), HEADS, -1)
            for project in (self.query, self.key, self.value)
        )
        mixed = mix(query, key, value, spans).flatten(1)
        hidden = self.mix_norm(self.mix(mixed).add_(hidden))
        inner = activated(self.up, hidden, "gelu")
        found: Tensor = self.down_norm(self.down(inner).add_(hidden))
        return found


class Head(nn.Module):
    """Hidden state to logits of the 25 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.decoder = nn.Linear(WIDTH, len(SPECIAL) + len(LETTERS))

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.norm(activated(self.dense, hidden, "gelu")))
        return logits
