"""Which rows ModelGenerator predicts on.

Its rules: `predict` takes the test split. Where there is none, a random part of the training
split stands in for it. Everything here is about that choice; reading is the readers' work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..api import Rows
from ..config import checked
from ..errors import InputError
from .classes import SPLITS

Numbers = npt.NDArray[np.int64]
Files = tuple[str, ...]
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Rules:
    """The arguments of a data module that choose rows, under ModelGenerator's names."""

    path: str
    config_name: str | None = None
    train_split_name: str | None = "train"
    valid_split_name: str | None = None
    test_split_name: str | None = "test"
    train_split_files: Files = ()
    valid_split_files: Files = ()
    test_split_files: Files = ()
    test_split_size: float = 0.2
    valid_split_size: float = 0.1
    random_seed: int = 42
    cv_num_folds: int = 1
    cv_test_fold_id: int = 0
    cv_enable_val_fold: bool = True
    cv_replace_val_fold_as_test_fold: bool = False
    cv_fold_id_col: str | None = None
    cv_val_offset: int = 1

    def __post_init__(self) -> None:
        for name in ("test_split_size", "valid_split_size"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}", "give a number from 0 to 1")
        if self.folded and self.cv_replace_val_fold_as_test_fold:
            what = "cv_replace_val_fold_as_test_fold is not supported: it may change the rows"
            raise InputError(what, "take it out, and choose the fold with cv_test_fold_id")
        if self.folded and not 0 <= self.cv_test_fold_id < self.cv_num_folds:
            what = f"cv_test_fold_id is {self.cv_test_fold_id} of {self.cv_num_folds} folds"
            raise InputError(what, f"give a number from 0 to {self.cv_num_folds - 1}")

    @property
    def folded(self) -> bool:
        """Whether cross-validation decides, whatever splits there are."""
        return self.cv_num_folds > 1

    def files(self) -> dict[str, Files]:
        """The files given for each split, where any are."""
        named = {part: getattr(self, f"{part}_split_files") for part in PARTS}
        return {part: files for part, files in named.items() if files}

    def tested(self, splits: Sequence[str]) -> tuple[str | None, bool]:
        """The split that rows are predicted from (None: there is none), and whether whole."""
        if not self.folded and self.test_split_name in splits:
            return self.test_split_name, True
        cuts = self.folded or self.test_split_size > 0
        return (self.train_split_name if cuts and self.train_split_name in splits else None), False


def make_rules(args: Mapping[str, Any]) -> Rules:
    """Of a data module's arguments. Raises `MgenError` for what does not fit."""
    given = {key: value for key, value in args.items() if key in SPLITS}
    for part in PARTS:
        name = f"{part}_split_files"
        files = given.get(name) or ()
        given[name] = (files,) if isinstance(files, str) else files
    if not given.get("path"):
        raise InputError("no data: the config has no data path", "add --data.path FOLDER, or DATA")
    return checked(Rules, given)


# --------------------------------------------------------------------------- rows of a split


class Taken(NamedTuple):
    """Rows of one split of the data set, by number, in order."""

    split: str
    numbers: Numbers


def split_rows(
    rules: Rules, counts: Mapping[str, int], fold_ids: Sequence[Any] | None = None
) -> dict[str, Taken]:
    """What is trained, validated and tested ("train", "valid", "test") of splits of so many rows.

    `fold_ids` is the column `cv_fold_id_col` of the training split. A part that does not come
    about is absent.
    """
    names = {part: getattr(rules, f"{part}_split_name") for part in PARTS}
    if rules.folded:
        train = names["train"]
        return _folds(rules, train, counts[train], fold_ids) if train in counts else {}
    found = {
        part: Taken(name, np.arange(counts[name], dtype=np.int64))
        for part, name in names.items()
        if name in counts
    }
    for part, size in (("test", rules.test_split_size), ("valid", rules.valid_split_size)):
        if part not in found and "train" in found and size > 0:
            split, rows = found["train"]
            cut, rest = _cut(rows, size, rules.random_seed)
            found |= {part: Taken(split, cut), "train": Taken(split, rest)}
    return found


def _cut(rows: Numbers, size: float, seed: int) -> tuple[Numbers, Numbers]:
    """A random part of the rows, and the others, both in the order they were drawn."""
    drawn = rows[np.random.default_rng(seed).permutation(len(rows))]
    count = math.ceil(size * len(rows))
    return drawn[:count], drawn[count:]


def _folds(
    rules: Rules, split: str, count: int, fold_ids: Sequence[Any] | None
) -> dict[str, Taken]:
    folds = (
        _drawn_folds(count, rules.cv_num_folds, rules.random_seed)
        if fold_ids is None
        else _told_folds(fold_ids, rules)
    )
    test = rules.cv_test_fold_id
    found = {"test": Taken(split, folds[test])}
    used = {test}
    if rules.cv_enable_val_fold:
        valid = (test + rules.cv_val_offset) % rules.cv_num_folds
        found["valid"] = Taken(split, folds[valid])
        used.add(valid)
    rest = [fold for number, fold in enumerate(folds) if number not in used]
    found["train"] = Taken(split, np.concatenate(rest) if rest else folds[test][:0])
    return found


def _drawn_folds(count: int, folds: int, seed: int) -> list[Numbers]:
    rows = np.arange(count, dtype=np.int64)
    np.random.RandomState(seed).shuffle(rows)
    ends = [number * (count // folds) for number in range(1, folds)]
    return np.split(rows, ends)


def _told_folds(fold_ids: Sequence[Any], rules: Rules) -> list[Numbers]:
    try:
        ids = np.array([int(str(value)) for value in fold_ids], dtype=np.int64)
    except ValueError as error:
        what = f"column {rules.cv_fold_id_col} does not hold fold numbers: {error}"
        raise InputError(what, f"it must hold 0 to {rules.cv_num_folds - 1}") from error
    strange = sorted(set(ids.tolist()) - set(range(rules.cv_num_folds)))
    if strange:
        what = f"column {rules.cv_fold_id_col} holds fold {strange[0]}"
        raise InputError(
            what, f"with {rules.cv_num_folds} folds they are 0 to {rules.cv_num_folds - 1}"
        )
    return [np.flatnonzero(ids == number) for number in range(rules.cv_num_folds)]


# --------------------------------------------------------------------------- rows that are open


@dataclass(frozen=True)
class Cut:
    """What is to be done to the rows of the files to get those that ModelGenerator predicts on.

    `whole`: they are all of them; `letters`: a column is cut to so many letters first.
    """

    rules: Rules
    split: str
    whole: bool = False
    letters: tuple[str, int] | None = None

    def of(self, sources: Sequence[Rows]) -> Chosen:
        """The rows of the opened files, which are read through once for it.

        Raises `InputError` where the rules leave none.
        """
        if self.whole:
            return Chosen(sources, None, self.letters)
        column = self.rules.cv_fold_id_col if self.rules.folded else None
        count, fold_ids = _read_through(sources, column)
        found = split_rows(self.rules, {self.split: count}, fold_ids).get("test")
        numbers = np.arange(0) if found is None else found.numbers
        what = f"ModelGenerator's rules take {len(numbers):,} of {count:,} rows ({self.why()})"
        if not len(numbers):
            raise InputError(what, self.mend())
        part = f"{what}: {self.mend()}" if len(numbers) < count else ""
        return Chosen(sources, numbers, self.letters, part)

    def why(self) -> str:
        """Which rule it is."""
        if self.rules.folded:
            return f"fold {self.rules.cv_test_fold_id} of {self.rules.cv_num_folds}"
        return f"test_split_size {self.rules.test_split_size} of a table without a test split"

    def mend(self) -> str:
        """How to get all rows instead."""
        folds = "--data.cv_num_folds 1 " if self.rules.folded else ""
        return f"all of them with {folds}--data.test_split_name {self.split}, or give DATA"


def _read_through(sources: Sequence[Rows], column: str | None) -> tuple[int, list[Any] | None]:
    """How many rows there are, and the values of a column in them."""
    values: list[Any] = []
    count = 0
    for source in sources:
        if column is not None and column not in source.columns:
            raise InputError(f"no column {column!r}", f"there are: {', '.join(source.columns)}")
        if column is None and source.length is not None:
            count += source.length
            continue
        name = column or source.columns[0]
        for chunk in source.chunks([name]):
            count += len(chunk[name])
            values += chunk[name] if column else ()
    return count, values if column else None


class Chosen(Rows):
    """Rows of other rows, by number, in any order; `numbers` None means all.

    Memory: the numbers, and a block of rows. Rows out of order are read block by block, each in
    one pass over the sources. `sentence` is what the user should know of the choice.
    """

    block_rows = 1 << 20
    block_bytes = 256 << 20  # rows may be chromosomes
    chunk_rows = 4096

    def __init__(
        self,
        sources: Sequence[Rows],
        numbers: Numbers | None,
        letters: tuple[str, int] | None = None,
        sentence: str = "",
    ) -> None:
        first, *more = sources
        self.sources = tuple(sources)
        self.numbers = numbers
        self.letters = letters
        self.sentence = sentence
        self.columns = [n for n in first.columns if all(n in other.columns for other in more)]
        self.default_id, self.default_x = first.default_id, first.default_x
        self.options = first.options
        self.length = None if numbers is None else len(numbers)

    def digest(self) -> str:
        whole = hashlib.sha256("\n".join(source.digest() for source in self.sources).encode())
        if self.numbers is not None:
            whole.update(b"\0rows\0" + self.numbers.astype("<i8").tobytes())
        return hashlib.sha256(f"{whole.hexdigest()} {self.letters}".encode()).hexdigest()

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        names = list(columns)
        if self.numbers is None:
            for source in self.sources:
                yield from map(self._shortened, source.chunks(names))
            return
        rows = self._rows(names, self.numbers)
        while part := list(islice(rows, self.chunk_rows)):
            yield self._shortened(dict(zip(names, map(list, zip(*part)))))

    def _rows(self, names: Sequence[str], numbers: Numbers) -> Iterator[tuple[Any, ...]]:
        if bool((numbers[1:] > numbers[:-1]).all()):
            yield from (row for _, row in self._found(names, numbers))
            return
        start = 0
        while start < len(numbers):
            block = self._block(names, numbers[start : start + self.block_rows])
            yield from block
            start += len(block)

    def _shortened(self, chunk: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        if self.letters is None or self.letters[0] not in chunk:
            return chunk
        name, most = self.letters
        cut = [text[:most] if isinstance(text, str) else text for text in chunk[name]]
        return {**chunk, name: cut}

    def _block(self, names: Sequence[str], numbers: Numbers) -> list[tuple[Any, ...]]:
        """The first of these rows, as many as may be held."""
        end, size = len(numbers), 0
        held: dict[int, tuple[Any, ...]] = {}
        for place, row in self._found(names, numbers):
            if place >= end:
                continue
            held[place] = row
            size += _bytes(row)
            while size > self.block_bytes and end > 1:
                end = (end + 1) // 2
                size -= sum(_bytes(held.pop(late)) for late in [one for one in held if one >= end])
        return [held[place] for place in range(end)]

    def _found(
        self, names: Sequence[str], numbers: Numbers
    ) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Each row of these numbers with its place among them, in the order of the sources."""
        if not len(numbers):
            return
        places = np.argsort(numbers, kind="stable")
        ordered = numbers[places]
        last, first = int(ordered[-1]), 0
        for source in self.sources:
            for chunk in source.chunks(names):
                columns = [chunk[name] for name in names]
                count = len(columns[0])
                low, high = np.searchsorted(ordered, [first, first + count])
                for place, number in zip(places[low:high].tolist(), ordered[low:high].tolist()):
                    yield place, tuple(column[number - first] for column in columns)
                first += count
                if first > last:
                    return
        raise InputError(
            f"row {last} was asked for, but there are {first} rows",
            "the input changed while it was read: start again",
        )


def _bytes(row: tuple[Any, ...]) -> int:
    return sum(len(value) if isinstance(value, str) else 8 for value in row)
