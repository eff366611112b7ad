"""The formats that mgen reads and writes, as cards. Nothing heavy is imported here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mgen_core import Reader, ReaderCard, ReaderOptions, Writer, WriterCard, hookimpl

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TORCH_DTYPES = ("float32", "float16", "bfloat16")
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")


def _also_compressed(*suffixes: str, by: Iterable[str]) -> tuple[str, ...]:
    return suffixes + tuple(suffix + packed for suffix in suffixes for packed in by)


def _is_dataset(uri: str) -> bool:
    """Whether it is a folder saved by `datasets`, or can only be a dataset's id on the hub."""
    if os.path.isdir(uri):
        return any(os.path.isfile(os.path.join(uri, name)) for name in SAVED_BY_DATASETS)
    return bool(HUB_ID.fullmatch(uri)) and not os.path.exists(uri)


def _csv(card: ReaderCard, options: ReaderOptions) -> Reader:
    from .readers.delimited import DelimitedReader

    return DelimitedReader(card, options, delimiter=",")


def _tsv(card: ReaderCard, options: ReaderOptions) -> Reader:
    from .readers.delimited import DelimitedReader

    return DelimitedReader(card, options, delimiter="\t")


def _jsonl(card: ReaderCard, options: ReaderOptions) -> Reader:
    from .readers.jsonl import JsonLinesReader

    return JsonLinesReader(card, options)


def _parquet(card: ReaderCard, options: ReaderOptions) -> Reader:
    from .readers.parquet import ParquetReader

    return ParquetReader(card, options)


def _fasta(card: ReaderCard, options: ReaderOptions) -> Reader:
    from .readers.fasta import FastaReader

    return FastaReader(card, options)


@dataclass(frozen=True)
class DatasetOptions(ReaderOptions):
    """Which split of a dataset that has several."""

    split: str | None = None


def _huggingface(card: ReaderCard, options: DatasetOptions) -> Reader:
    from .readers.huggingface import DatasetReader

    return DatasetReader(card, options)


def _write_parquet(card: WriterCard) -> Writer:
    from .writers.parquet import ParquetWriter

    return ParquetWriter(card)


def _write_tsv(card: WriterCard) -> Writer:
    from .writers.tsv import TsvWriter

    return TsvWriter(card)


def _write_pt(card: WriterCard) -> Writer:
    from .writers.pt import PtWriter

    return PtWriter(card)


def _write_safetensors(card: WriterCard) -> Writer:
    from .writers.safetensors import SafetensorsWriter

    return SafetensorsWriter(card)


def _write_npz(card: WriterCard) -> Writer:
    from .writers.npz import NpzWriter

    return NpzWriter(card)


def _write_zarr(card: WriterCard) -> Writer:
    from .writers.zarr import ZarrWriter

    return ZarrWriter(card)


PACKED = (".gz", ".bz2", ".zst")

READERS = (
    ReaderCard("csv", "comma-separated text", _csv, suffixes=_also_compressed(".csv", by=PACKED)),
    ReaderCard("tsv", "tab-separated text", _tsv, suffixes=_also_compressed(".tsv", by=PACKED)),
    ReaderCard(
        "jsonl",
        "one JSON object a line",
        _jsonl,
        suffixes=_also_compressed(".jsonl", ".ndjson", by=PACKED),
    ),
    ReaderCard("parquet", "Apache Parquet", _parquet, suffixes=(".parquet",)),
    ReaderCard(
        "fasta",
        "FASTA sequences",
        _fasta,
        suffixes=_also_compressed(".fa", ".fasta", ".faa", ".fna", ".ffn", ".frn", by=PACKED),
    ),
    ReaderCard(
        "huggingface",
        "a folder saved by Hugging Face datasets, or a dataset's id on the hub",
        _huggingface,
        claims=_is_dataset,
        options=DatasetOptions,
    ),
)

WRITERS = (
    WriterCard("parquet", ".parquet", "Apache Parquet, streamed", _write_parquet),
    WriterCard("tsv", ".tsv", "tab-separated text, lists as JSON, streamed", _write_tsv),
    WriterCard(
        "pt", ".pt", "tensors for torch.load, through temporary files", _write_pt, TORCH_DTYPES
    ),
    WriterCard(
        "safetensors",
        ".safetensors",
        "tensors without pickle, through temporary files",
        _write_safetensors,
        TORCH_DTYPES,
    ),
    WriterCard("npz", ".npz", "NumPy arrays without pickle, through temporary files", _write_npz),
    WriterCard("zarr", ".zarr.zip", "zarr 3 arrays in a zip file, streamed", _write_zarr),
)


@hookimpl
def mgen_readers() -> Iterable[ReaderCard]:
    """Input formats."""
    return READERS


@hookimpl
def mgen_writers() -> Iterable[WriterCard]:
    """Output formats."""
    return WRITERS
