"""Retrieval-augmented proteins: a query, the rows of its alignment, its structure embedding.

The letters of all rows lie end to end without their gaps; a letter's position is its column and
its row in the alignment. What comes out is the query's part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgen_core import BackboneCard, Inputs, MgenError, Row, RowError
from mgen_core.packed import pack

from .backbone import EncoderBackbone
from .config import Config, Fields, parse
from .families import RAG
from .options import EncoderOptions

# Published configs leave these to whoever runs the model.
DEFAULTS: Fields = {"position_embedding_type": "rope_2d", "str_embedding_in": 384}
GAP = "-"
# In an .a3m file these stand between the columns of the query.
INSERTIONS = re.compile(r"[a-z.]")


class Line(NamedTuple):
    """A row as the model takes it: ids and positions (2, T) of its tokens, [SEP] included;
    `query` of them are the query's; `structure` (T or fewer, S) starts with them."""

    ids: bytes
    positions: Tensor
    query: int
    structure: Tensor | None


class RagBackbone(EncoderBackbone):
    """`msa`: aligned sequences, or the path of an .a3m file. `str_emb`: S numbers a letter, or the
    path of an .npy file. Either may be null."""

    def __init__(self, card: BackboneCard, options: EncoderOptions) -> None:
        if options.pads:
            raise MgenError(f"{card.name} computes no padding", "leave out --option pads")
        super().__init__(card, options, RAG)
        self.exact = options.tokens == "reference"
        letters = RAG.vocabulary.letters + GAP
        self.aligned = replace(RAG.vocabulary, letters=letters, stop=None).alphabet()

    def read_config(self, card: BackboneCard, options: EncoderOptions) -> Config | None:
        if options.weights is None:
            return None
        found = {key: value for key, value in options.config().items() if value is not None}
        return parse({**DEFAULTS, **found}, self.family)

    # -- without weights -------------------------------------------------------------------

    def prepare(self, row: Row) -> Row:
        query = super().prepare(row).data
        msa = read_alignment(row.fields.get("msa"), query)
        if not self.exact:
            msa = [self._clean(line, number, query) for number, line in enumerate(msa, start=1)]
        structure = row.fields.get("str_emb")
        # A file is read again when its batch comes: a window of rows stays small.
        if (numbers := read_structure(structure)) is not None:
            self._check(numbers, query)
        kept = structure if isinstance(structure, str) else numbers
        return row._replace(data=query, fields={"msa": tuple(msa), "str_emb": kept})

    def _clean(self, line: str, number: int, query: str) -> str:
        columns = INSERTIONS.sub("", line)
        if len(columns) != len(query):
            raise RowError(
                f"msa does not fit: row {number} has {len(columns)} columns, "
                f"the sequence {len(query)} letters"
            )
        try:
            return self.aligned.clean(columns)
        except RowError as error:
            raise RowError(f"msa: row {number}: {error}") from None

    def _check(self, structure: NDArray[np.float32], query: str) -> None:
        wanted = (len(query), self.known.structure if self.config else structure.shape[-1])
        if structure.shape != wanted:
            raise RowError(
                f"str_emb does not fit: its shape is {structure.shape}, the sequence needs {wanted}"
            )

    def measure(self, row: Row) -> int:
        tokens = self.tokens.count(_letters(row)) + self.alphabet.specials
        return min(tokens, int(row.fields.get("limit", tokens)))

    def truncate(self, row: Row, tokens: int) -> Row:
        if tokens <= self.alphabet.specials:
            raise RowError(f"cannot be cut to {tokens} tokens, special tokens included")
        return row._replace(fields={**row.fields, "limit": tokens})

    def residues(self, row: Row) -> Sequence[int]:
        return super().residues(row)[: self.measure(row) - self.alphabet.specials]

    def collate(self, rows: Sequence[Row]) -> Inputs:
        lines = [self._line(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda number: -len(lines[number].ids))
        inputs = pack([lines[number].ids for number in order])
        width = max(line.query for line in lines)
        keep, slots, places, structures = [], [], [], []
        start = 0
        for number in order:
            line = lines[number]
            keep.append(torch.arange(start, start + line.query))
            slots.append(torch.arange(line.query) + number * width)
            if line.structure is not None:
                structures.append(line.structure)
                places.append(torch.arange(start, start + len(line.structure)))
            start += len(line.ids)
        inputs["positions"] = torch.cat([lines[number].positions for number in order], dim=1)
        inputs["keep"], inputs["slots"] = torch.cat(keep), torch.cat(slots)
        queries = torch.tensor([line.query for line in lines])
        inputs["mask"] = inputs["real"] = torch.arange(width) < queries[:, None]
        if structures:
            inputs["structure"] = {"numbers": torch.cat(structures), "places": torch.cat(places)}
        return inputs

    def _line(self, row: Row) -> Line:
        limit = row.fields.get("limit")
        letters = _letters(row)[:limit]
        ids = self.tokens.encode(letters)
        if limit is not None:
            ids = ids[: limit - 1]
        ids += bytes(self.alphabet.after)
        positions = torch.zeros(2, len(ids), dtype=torch.int64)
        # As the reference has it: a [SEP] that takes the place of a letter has its position.
        known = torch.from_numpy(_places(row))[:, :limit][:, : len(ids)]
        positions[:, : known.shape[1]] = known
        structure = read_structure(row.fields.get("str_emb"))
        return Line(
            ids,
            positions,
            min(len(row.data), len(ids) - 1),
            None if structure is None else torch.tensor(structure[: len(ids)]),
        )


def _letters(row: Row) -> str:
    return "".join((row.data, *row.fields.get("msa", ()))).replace(GAP, "")


def _places(row: Row) -> NDArray[np.int64]:
    """(2, letters): column and line of every letter."""
    lines = (row.data, *row.fields.get("msa", ()))
    codes = [np.frombuffer(line.encode("utf-32-le"), np.uint32) for line in lines]
    columns = [np.flatnonzero(line != ord(GAP)) for line in codes]
    numbers = np.repeat(np.arange(len(lines)), [len(found) for found in columns])
    return np.stack([np.concatenate(columns), numbers])


def read_alignment(value: Any, query: str) -> list[str]:
    """The aligned rows below the query: a list as it is, a file without the query itself."""
    if value is None:
        return []
    if isinstance(value, str):
        return _read_a3m(Path(value), query)
    if isinstance(value, (list, tuple, np.ndarray)) and all(isinstance(one, str) for one in value):
        return list(value)
    raise RowError("msa: neither sequences nor the path of an .a3m file")


def _read_a3m(path: Path, query: str) -> list[str]:
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise RowError(f"msa: cannot read {path}: {error}") from None
    lines: list[str] = []
    for part in text.splitlines():
        if part.startswith(">"):
            lines.append("")
        elif lines and not part.startswith("#"):
            lines[-1] += part.strip()
    return lines[1:] if lines and lines[0].upper() == query.upper() else lines


def read_structure(value: Any) -> NDArray[np.float32] | None:
    """(letters, S) float32. Raises `RowError` for what is not a matrix of numbers."""
    if value is None:
        return None
    try:
        found = np.load(value, allow_pickle=False) if isinstance(value, str) else value
        matrix = np.asarray(found, dtype=np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise RowError(f"str_emb: cannot be read: {error}") from None
    if matrix.ndim != 2:
        raise RowError(f"str_emb does not fit: its shape is {matrix.shape}, not (letters, numbers)")
    return matrix
