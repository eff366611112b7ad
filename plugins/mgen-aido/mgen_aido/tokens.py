"""Letters to token ids: two vocabularies, and two ways to read a sequence.

`clean` (the default) reads what biologists write: any case, U as T, ambiguity codes. `reference`
reads what ModelGenerator's tokenizers read, oddities included, for numbers that must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mgen_core import RowError
from mgen_core.alphabet import ILLEGAL, Alphabet

Reading = Literal["clean", "reference"]


@dataclass(frozen=True)
class Vocabulary:
    """Token names in id order, and what stands around a sequence.

    - `before`, `after`: ids of the special tokens around the residues.
    - `letters`: the residues that `clean` knows; `replace` and `stop` are `Alphabet`'s.
    - `unknown`: id of what the reference cannot read; None: it fails.
    - `chain`: whether the reference reads a `|` that stands alone as `[SEP]`.
    """

    tokens: tuple[str, ...]
    letters: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    unknown: int | None = None
    chain: bool = False
    replace: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    stop: str | None = None

    @property
    def specials(self) -> int:
        """How many special tokens a sequence gets."""
        return len(self.before) + len(self.after)

    def alphabet(self) -> Alphabet:
        """What `clean` reads."""
        ids = {letter: self.tokens.index(letter) for letter in self.letters}
        return Alphabet(ids, self.replace, self.stop, mask=self.tokens.index("[MASK]"))


NUCLEOTIDE_TOKENS = tuple(
    [
        "[PAD]",
        "[MASK]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "A",
        "G",
        "C",
        "T",
        "U",
        "N",
        "[BOS]",
        "[EOS]",
        "[UNUSED1]",
        "[UNUSED2]",
        "[UNUSED3]",
    ]
)
PROTEIN_TOKENS = tuple(
    [
        "[PAD]",
        "L",
        "A",
        "G",
        "V",
        "S",
        "E",
        "R",
        "T",
        "I",
        "D",
        "P",
        "K",
        "Q",
        "N",
        "F",
        "Y",
        "M",
        "H",
        "W",
        "C",
        "X",
        "B",
        "U",
        "Z",
        "O",
        ".",
        "-",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "[eod]",
        "[sop]",
        "[eop]",
        "[SEP]",
        "[HC]",
        "[LC]",
        "[HUMAN]",
        "<cdr1>",
        "</cdr1>",
        "<cdr2>",
        "</cdr2>",
        "<cdr3>",
        "</cdr3>",
    ]
)
# The models were trained on DNA letters: U has an id, but one that they hardly ever saw.
AS_DNA = {
    "U": ("T", "U read as T"),
    **{letter: ("N", "ambiguity codes read as N") for letter in "RYSWKMBDHV"},
}

NUCLEOTIDES = Vocabulary(
    NUCLEOTIDE_TOKENS, "ACGTN", before=(2,), after=(3,), unknown=4, replace=AS_DNA
)
PROTEINS = Vocabulary(
    PROTEIN_TOKENS,
    "LAGVSERTIDPKQNFYMHWCXBUZO",
    after=(34,),
    unknown=27,
    chain=True,
    replace={"J": ("X", "J read as X")},
    stop="*",
)


class Tokens(Protocol):
    """One way to read a sequence. Ids are one byte a token, without special tokens."""

    def clean(self, text: str) -> str:
        """The text that the other methods take. Raises `RowError`."""

    def note(self, text: str, cleaned: str) -> str | None:
        """What `clean` changed, in words."""

    def count(self, text: str) -> int:
        """Tokens of a cleaned text."""

    def encode(self, text: str) -> bytes:
        """Token ids of a cleaned text."""

    def cut(self, text: str, tokens: int) -> str:
        """The start of a cleaned text that holds so many tokens."""


def read_as(vocabulary: Vocabulary, reading: Reading) -> Tokens:
    """The tokenizer of a vocabulary."""
    if reading == "reference":
        return ReferenceTokens(vocabulary)
    return CleanTokens(vocabulary.alphabet())


class CleanTokens:
    """One letter, one token; letters that the model does not know are an error."""

    def __init__(self, alphabet: Alphabet) -> None:
        self.clean: Callable[[str], str] = alphabet.clean
        self.note: Callable[[str, str], str | None] = alphabet.note
        self.encode: Callable[[str], bytes] = alphabet.encode
        self.count: Callable[[str], int] = len

    def cut(self, text: str, tokens: int) -> str:
        return text[:tokens]


class ReferenceTokens:
    """Longest vocabulary entry first, case-sensitive; a run of anything else is one unknown."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        longest_first = sorted(vocabulary.tokens, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first)) + r"|\s+")
        codes = bytearray([ILLEGAL] * 256)
        for token, number in self.ids.items():
            if len(token) == 1:
                codes[ord(token)] = number
        self._codes = bytes(codes)

    def clean(self, text: str) -> str:
        if not isinstance(text, str):
            raise RowError("no sequence" if text is None else f"not a sequence: {text!r:.40}")
        if not self.encode(text):
            raise RowError("empty sequence")
        return text

    def note(self, text: str, cleaned: str) -> str | None:
        return None

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def encode(self, text: str) -> bytes:
        # Most sequences hold single letters only: then the table does.
        found = text.encode("latin-1", "replace").translate(self._codes)
        if ILLEGAL not in found:
            return found
        return bytes(number for number, _ in self._scan(text))

    def cut(self, text: str, tokens: int) -> str:
        for count, (_, end) in enumerate(self._scan(text), start=1):
            if count == tokens:
                return text[:end]
        return text if tokens else ""

    def _scan(self, text: str) -> Iterator[tuple[int, int]]:
        """(id, end) of each token."""
        end = 0
        for match in self._known.finditer(text):
            if match.start() > end:
                yield self._unknown(text[end : match.start()]), match.start()
            end = match.end()
            if match[0] in self.ids:
                yield self.ids[match[0]], end
        if len(text) > end:
            yield self._unknown(text[end:]), len(text)

    def _unknown(self, run: str) -> int:
        if run == "|" and self.vocabulary.chain:
            return self.ids["[SEP]"]
        if self.vocabulary.unknown is None:
            raise RowError(f"{run[:20]!r} is not in the vocabulary")
        return self.vocabulary.unknown
