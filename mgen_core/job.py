"""A RunConfig made real: cards found, options checked, the table opened, the weights located."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

from .api import (
    Backbone,
    BackboneCard,
    ReaderCard,
    Row,
    Rows,
    Task,
    TaskCard,
    Writer,
    WriterCard,
    open_backbone,
)
from .catalog import Catalog
from .config import RESERVED, RunConfig, checked, make_options
from .errors import MgenError, WeightsError, blaming, opening
from .plan import Batch, PlanSettings, Window, Work, make_work, windows
from .table import Table, choose_columns, open_table

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Measured on CPUs: a moderate budget beats a large one. A GPU needs more to be kept busy.
AUTO_BATCH_TOKENS = {"cpu": 1_024, "cuda": 16_384}


@dataclass(frozen=True)
class Job:
    """Everything a run needs, still without weights in memory."""

    config: RunConfig
    backbone: Backbone
    task: Task
    writer: Writer
    table: Table

    @property
    def options(self) -> dict[str, str]:
        """Every option, given or not: what equal runs have in common."""
        read = (source.options for source in self.table.sources)
        kinds: list[Any] = [*read, self.backbone.options, self.task.options]
        every = {key: value for options in kinds for key, value in asdict(options).items()}
        return {key: _told(value) for key, value in sorted(every.items()) if key not in RESERVED}

    @property
    def max_tokens(self) -> int | None:
        """Longest row that is computed, special tokens included."""
        if self.config.max_length is not None:
            return self.config.max_length
        limits = (self.backbone.card.max_tokens, self.backbone.max_positions)
        return min((limit for limit in limits if limit is not None), default=None)

    @cached_property
    def row_bytes(self) -> Callable[[int], int]:
        """Estimated bytes that a row of so many tokens leaves in a part."""
        item = ITEM_BYTES[self.config.dtype]

        @cache  # asked for every row, and lengths repeat
        def row_bytes(tokens: int) -> int:
            return self.task.values(1, tokens) * item + 40

        return row_bytes

    def settings(self, batch_tokens: int) -> PlanSettings:
        """What the plan depends on, beside the rows."""
        return PlanSettings(
            batch_tokens,
            self.config.batch_rows,
            self.max_tokens,
            self.config.too_long,
            self.backbone.packed,
        )

    def cost(self, rows: Sequence[Row]) -> int:
        """Tokens that a pass of prepared rows computes."""
        tokens = [self.measure(row) for row in rows]
        return sum(tokens) if self.backbone.packed else max(tokens) * len(tokens)

    def measure(self, row: Row) -> int:
        """Tokens of a prepared row. Raises `RowError`."""
        with blaming(self.backbone.card):
            return self.backbone.measure(row)

    def variants(self, row: Row) -> Sequence[Row]:
        """What the task runs for a prepared row. Raises `RowError`."""
        with blaming(self.task.card):
            return tuple(self.task.variants(row))

    def work(self, batch: Batch, settings: PlanSettings) -> Work:
        """What the task runs for a batch."""
        return make_work(batch, self.variants, self.measure, settings)

    def windows(self, settings: PlanSettings) -> Iterator[Window]:
        """The plan, window by window, read from the input anew."""
        return windows(self.table, self.backbone, settings, self.row_bytes)


def open_job(
    config: RunConfig, catalog: Catalog, *, rows: Rows | None = None, download: bool = True
) -> Job:
    """Resolve every name of the config; `rows` stands in for files (rows that are in memory).

    Without `download`, weights that are not on this machine are left out: enough for planning.
    Raises `MgenError` for the first thing that cannot be had.
    """
    backbone_card = catalog.find(BackboneCard, config.backbone)
    task_card = catalog.find(TaskCard, config.task)
    writer_card = catalog.find(WriterCard, config.writer)
    if config.dtype not in writer_card.dtypes:
        able = [o.card.name for o in catalog.offers(WriterCard) if config.dtype in o.card.dtypes]
        raise MgenError(
            f"{writer_card.name} cannot hold {config.dtype}",
            f"use --writer {' or '.join(able)}, or --dtype {' or '.join(writer_card.dtypes)}",
        )
    if backbone_card.weights_required and config.weights is None:
        raise WeightsError(
            f"{backbone_card.name} has no weights of its own", "give --weights FOLDER or a hub id"
        )
    given = _options(config, catalog, backbone_card, task_card)
    table = (
        open_table(config, catalog, backbone_card)
        if rows is None
        else choose_columns((rows,), config, backbone_card)
    )
    options = checked(backbone_card.options, given[0])
    task_options = checked(task_card.options, given[1])
    from . import hub  # the hub client is slow to import: only once the rest is in order

    located = hub.locate(config.weights, backbone_card, config.revision, download=download)
    backbone = open_backbone(backbone_card, replace(options, weights=located))
    with opening(task_card):
        task = task_card.load(task_card, task_options, backbone)
    with opening(writer_card):
        writer = writer_card.load(writer_card)
    _check_length(config, backbone)
    return Job(config, backbone, task, writer, table)


def _options(
    config: RunConfig,
    catalog: Catalog,
    backbone: BackboneCard,
    task: TaskCard,
) -> list[dict[str, Any]]:
    readers = [offer.card.options for offer in catalog.offers(ReaderCard)]
    kinds: list[type[Any]] = [backbone.options, task.options, *readers]
    return make_options(kinds, config.options)


def _told(value: Any) -> str:
    """An option as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_length(config: RunConfig, backbone: Backbone) -> None:
    most = backbone.max_positions
    if most is not None and config.max_length is not None and config.max_length > most:
        raise MgenError(
            f"--max-length {config.max_length} is over what {backbone.card.name} can take",
            f"give at most {most}: its positions end there",
        )
