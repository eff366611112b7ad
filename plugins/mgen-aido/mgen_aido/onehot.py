"""One-hot letters: the baseline that every learned embedding should beat."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from mgen_core import Activations, BackboneCard, Inputs, Want
from mgen_core.packed import unpack

from .options import TokenOptions
from .sequences import Sequences
from .tokens import NUCLEOTIDES, PROTEINS

# The reference reads nucleotides here as it reads proteins: no [CLS], and no word for what is
# unknown, since this vocabulary has no `-`.
LETTERS = {
    "dna": replace(NUCLEOTIDES, before=(), unknown=None, chain=True),
    "protein": PROTEINS,
}


class OneHot(Sequences):
    """No parameters: layer 0, the only one, is (B, L, tokens) float32."""

    def __init__(self, card: BackboneCard, options: TokenOptions) -> None:
        super().__init__(card, options, LETTERS[card.modality])

    @property
    def width(self) -> int:
        return len(self.alphabet.tokens)

    def build(self) -> nn.Module:
        return nn.Module()

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        tokens, mask = cast(Tensor, inputs["tokens"]), cast(Tensor, inputs["mask"])
        stream = torch.eye(self.width, device=tokens.device)[tokens]
        hidden = unpack(stream, inputs["slots"], *mask.shape)
        # ModelGenerator has no mask of these: padding counts as the first letter.
        real = torch.ones_like(mask) if self.pads else inputs["real"]
        return Activations(hidden, mask, tokens=real)
