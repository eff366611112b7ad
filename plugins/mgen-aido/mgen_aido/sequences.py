"""A row's sequence as tokens: the half of a backbone that needs no weights."""

from __future__ import annotations

from collections.abc import Sequence

from mgen_core import Backbone, BackboneCard, Inputs, MgenError, Row, RowError
from mgen_core.alphabet import hide
from mgen_core.packed import pack

from .options import TokenOptions
from .tokens import CleanTokens, Vocabulary, read_as


class Sequences(Backbone):
    """One sequence a row, read by one of two tokenizers."""

    def __init__(self, card: BackboneCard, options: TokenOptions, vocabulary: Vocabulary) -> None:
        super().__init__(card, options)
        self.alphabet = vocabulary
        self.tokens = read_as(vocabulary, options.tokens)
        self.pads = options.pads
        self.packed = not options.pads

    def prepare(self, row: Row) -> Row:
        try:
            cleaned = self.tokens.clean(row.data)
        except RowError as error:
            raise RowError(self._why(row.data, str(error))) from None
        return row.with_data(cleaned)

    def _why(self, text: object, reason: str) -> str:
        """The reason, and what the text seems to be when it is of another kind."""
        if self.card.modality != "protein" and looks_like_protein(text):
            return f"a protein, where {self.card.name} takes {self.card.modality.upper()}: {reason}"
        return reason

    def note(self, row: Row, prepared: Row) -> str | None:
        return self.tokens.note(row.data, prepared.data)

    def measure(self, row: Row) -> int:
        return self.tokens.count(row.data) + self.alphabet.specials

    def truncate(self, row: Row, tokens: int) -> Row:
        room = tokens - self.alphabet.specials
        if room < 1:
            raise RowError(f"cannot be cut to {tokens} tokens, special tokens included")
        return row.with_data(self.tokens.cut(row.data, room))

    def residues(self, row: Row) -> Sequence[int]:
        if self.vocabulary[: len(self.alphabet.tokens)] != self.alphabet.tokens:
            return super().residues(row)  # its logits are over other tokens than it reads
        return list(self.tokens.encode(row.data))

    def masked(self, row: Row, position: int) -> Row:
        if isinstance(self.tokens, CleanTokens):
            return row.with_data(hide(row.data, position))
        raise MgenError(
            f"{self.card.name} cannot mask residues with tokens=reference",
            "leave out that option, or use --score pll",
        )

    def collate(self, rows: Sequence[Row]) -> Inputs:
        before, after = bytes(self.alphabet.before), bytes(self.alphabet.after)
        ids = [before + self.tokens.encode(row.data) + after for row in rows]
        return pack(ids, len(before), len(after), pads=self.pads)


def looks_like_protein(text: object) -> bool:
    """Whether residues that no nucleotide code shares are common in the text."""
    if not isinstance(text, str) or not text:
        return False
    return sum(map(text.upper().count, "EFILPQ")) > len(text) / 10
