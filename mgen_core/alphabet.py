"""Letters of a one-letter-a-token sequence model: cleaning, checking and encoding them.

Everything is a table look-up over bytes, so a million sequences take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import RowError

ILLEGAL = 0xFF
MASK = "\x1a"
"""Stands for a masked residue in a cleaned text; never accepted from the user."""


def hide(text: str, position: int) -> str:
    """A cleaned text with one residue (from 0) masked."""
    return text[:position] + MASK + text[position + 1 :]


class Alphabet:
    """The letters that a model knows, and what is read as them.

    - `ids`: letter -> token id (0..254).
    - `replace`: letters read as another one (`{"U": "T"}`, ambiguity codes), with the words for
      the report: `{"U": ("T", "U read as T")}`.
    - `stop`: a letter dropped at the end of a sequence (the `*` of translated genes).
    - `mask`: id of the mask token, for texts in which `MASK` stands for a residue.

    Lower case is read as upper case: in sequence files it marks repeats, not other residues.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        replace: Mapping[str, tuple[str, str]] | None = None,
        stop: str | None = None,
        mask: int | None = None,
    ) -> None:
        self.ids = dict(ids)
        self.replace = dict(replace or {})
        self.stop = stop
        codes, letters = bytearray([ILLEGAL] * 256), bytearray(range(256))
        for letter, number in self.ids.items():
            codes[ord(letter)] = number
        for letter, (other, _) in self.replace.items():
            letters[ord(letter)] = ord(other)
            codes[ord(letter)] = self.ids[other]
        self._codes, self._letters = bytes(codes), bytes(letters)
        if mask is not None:
            codes[ord(MASK)] = mask
        self._with_mask = bytes(codes)

    def clean(self, text: str) -> str:
        """The text as the model sees it: upper case, letters replaced, trailing stop dropped.

        Raises `RowError` for an empty text or a letter the model does not know, naming the
        letter and its position (from 1).
        """
        if not isinstance(text, str):
            raise RowError("no sequence" if text is None else f"not a sequence: {text!r:.40}")
        cleaned = text.strip().upper()
        if self.stop:
            cleaned = cleaned.removesuffix(self.stop)
        if not cleaned:
            raise RowError("empty sequence")
        # What Latin-1 lacks becomes '?', one byte a letter, so that positions stay true.
        found = cleaned.encode("latin-1", "replace")
        position = found.translate(self._codes).find(ILLEGAL)
        if position >= 0:
            letter = cleaned[position]
            raise RowError(f"illegal character {letter!r} at position {position + 1}")
        return found.translate(self._letters).decode("latin-1")

    def encode(self, cleaned: str) -> bytes:
        """Token ids of a cleaned text, one byte a letter (`numpy.frombuffer` reads them)."""
        return cleaned.encode("latin-1").translate(self._with_mask)

    def note(self, text: str, cleaned: str) -> str | None:
        """What `clean` changed beyond case, in words for the run's report; None when nothing."""
        if text == cleaned:
            return None
        upper = text.strip().upper()
        notes = dict.fromkeys(why for letter, (_, why) in self.replace.items() if letter in upper)
        if self.stop and upper.endswith(self.stop):
            notes[f"trailing {self.stop!r} dropped"] = None
        return "; ".join(notes) or None
