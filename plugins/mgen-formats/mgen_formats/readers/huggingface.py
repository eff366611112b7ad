"""Datasets of Hugging Face `datasets`: saved folders, and ids on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]

from mgen_core import InputError, Reader, Rows

from ..plugin import DatasetOptions
from .arrow import chunk
from .source import chunk_rows, digest, reading


class DatasetReader(Reader):
    """Opens a folder saved by `save_to_disk`, or downloads `org/name` from the hub."""

    options: DatasetOptions

    def open(self, uri: str) -> Rows:
        if os.path.isdir(uri):
            with reading(Path(uri)):
                found = datasets.load_from_disk(uri)
            return DatasetRows(_split(uri, found, self.options.split), Path(uri))
        return DatasetRows(_split(uri, _download(uri), self.options.split), None)


class DatasetRows(Rows):
    """The rows of one split, memory-mapped."""

    def __init__(self, dataset: datasets.Dataset, folder: Path | None) -> None:
        self.dataset = dataset
        self.folder = folder
        self.columns = dataset.column_names
        self.length = len(dataset)

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        wanted = self.dataset.select_columns(list(columns)).with_format("arrow")
        for table in wanted.iter(chunk_rows(len(wanted), wanted.data.nbytes)):
            yield chunk(table, columns)

    def digest(self) -> str:
        # A dataset from the hub is named by its fingerprint: revision, configuration and split.
        return digest(self.folder) if self.folder else str(self.dataset._fingerprint)


def _download(uri: str) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(uri)
    except Exception as error:  # the library, the hub and the network raise all kinds
        hint = (
            f"check the name; without a network, run `hf download --repo-type dataset {uri} "
            "--local-dir FOLDER` elsewhere and give the files in FOLDER"
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{uri} is no file here and cannot be loaded as a dataset: {reason}", hint
        ) from error


def _split(
    uri: str, found: datasets.Dataset | datasets.DatasetDict, split: str | None
) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict({str(found.split or "train"): found})
    names = ", ".join(found)
    if split is None and len(found) != 1:
        raise InputError(f"{uri} has the splits {names}", "choose one with --split")
    if split is not None and split not in found:
        raise InputError(f"{uri} has no split {split!r}", f"it has: {names}")
    return found[split or next(iter(found))]
