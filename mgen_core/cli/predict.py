"""`mgen predict`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from ..errors import MgenError, WeightsError
from . import options as o

if TYPE_CHECKING:
    from ..catalog import Catalog
    from ..config import RunConfig
    from ..modelgenerator.merging import Foreign
    from ..modelgenerator.rows import Chosen
    from ..modelgenerator.translation import Translated


Ckpt = Annotated[
    Optional[Path],
    typer.Option(
        "--ckpt",
        "--ckpt_path",
        metavar="FILE",
        help="The fine-tuned model's checkpoint.",
        rich_help_panel=o.MODEL,
    ),
]
LabelMean = Annotated[
    Optional[str],
    typer.Option(
        metavar="NUMBER,...",
        rich_help_panel=o.OUTPUT,
        help="Of the labels in training, where it normalised them: gives label units.",
    ),
]
LabelStd = Annotated[
    Optional[str],
    typer.Option(metavar="NUMBER,...", help="Likewise.", rich_help_panel=o.OUTPUT),
]


LabelStats = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE",
        help='Both, as JSON: {"mean": 3.1, "std": 0.8}, or lists of one for each output.',
        rich_help_panel=o.OUTPUT,
    ),
]


class Layout(str, Enum):
    """Of the files of a run."""

    native = "native"
    modelgenerator = "modelgenerator"


class PredictCommand(TyperCommand):
    """Takes ModelGenerator's own words (--model.backbone X, --ckpt_path F) out of the line first.

    Their order counts, among themselves and with `--config`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from ..modelgenerator.sources import read_arguments

        ctx.meta["sources"], rest = read_arguments(args)
        return super().parse_args(ctx, rest)


@dataclass(frozen=True)
class Asked:
    """Values of a `RunConfig`, of all that was given, and ModelGenerator's share of them."""

    values: dict[str, Any]
    found: Translated | None = None
    foreign: Foreign | None = None

    def check(self, plan_only: bool) -> None:
        """Raises `MgenError` for a head that nobody gave the weights of: not after an hour."""
        head = self.found.head if self.found is not None else {}
        if head and not self.values.get("ckpt") and not plan_only:
            raise MgenError(
                "the config is that of a fine-tuned model, and no checkpoint is given",
                "add --ckpt model.ckpt",
            )

    def check_weights(self) -> None:
        """Raises `WeightsError` where all was trained, and the checkpoint holds a part of it."""
        if self.found is None or self.found.kept != "all" or not self.values.get("ckpt"):
            return
        from ..lightning import open_lightning
        from ..lora import holds_backbone

        ckpt = self.values["ckpt"]
        if not holds_backbone(open_lightning(ckpt)):
            raise WeightsError(
                f"{ckpt} does not hold the whole backbone, which by the config was trained",
                "give the config.yaml of its training: one with frozen, or with use_peft",
            )

    def open(self) -> tuple[RunConfig, Chosen | None]:
        """The config, and the rows that stand for those of its data, if any do."""
        from ..catalog import discover
        from ..config import make_config
        from ..table import open_sources

        config = make_config(self.values)
        cut = self.found.rows if self.found is not None else None
        return config, cut.of(open_sources(config, discover())) if cut else None

    def tell(self, rows: Chosen | None) -> None:
        """Say once, whatever the number of ranks, what differs from ModelGenerator."""
        if not speaks():
            return
        notes = self.found.notes if self.found is not None else []
        for note in [*notes, rows.sentence if rows is not None else ""]:
            if note:
                typer.echo(f"note      {note}", err=True)


def speaks() -> bool:
    """Whether this process speaks for a run: rank 0, or the mgen that has started the ranks."""
    from ..join import LAUNCHER, LOCAL

    return os.environ.get("RANK", "0") == "0" and os.environ.get(LAUNCHER) != LOCAL


def start(task: str | None, given: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Make one config of all that was given, then run as any other command."""
    from . import running

    plan_only, printing = given.pop("plan_only"), chosen.pop("print_config")
    layout = chosen.pop("layout")
    asked = ask(task, given, chosen)
    if layout == Layout.modelgenerator and asked.foreign is None:
        raise MgenError("--layout modelgenerator needs a config of ModelGenerator's", "give one")
    if printing:
        from ..modelgenerator.translation import Translated, as_yaml

        found = asked.found or Translated({})
        typer.echo(as_yaml(replace(found, values=asked.values)), nl=False)
        return
    asked.check(plan_only)
    config, rows = asked.open()
    asked.tell(rows)
    if not plan_only:
        asked.check_weights()
    try:
        running.start(config, plan_only=plan_only, rows=rows)
    except typer.Exit as end:
        if end.exit_code or config.hostfile is not None:
            raise
    if layout == Layout.modelgenerator and speaks() and not plan_only:
        lay_out(asked, config, rows)


def lay_out(asked: Asked, config: RunConfig, rows: Chosen | None) -> None:
    """The files that ModelGenerator would have left, beside our own."""
    from ..catalog import discover
    from ..job import open_job
    from ..manifest import Manifest
    from ..merge import Selection, complete, selected
    from ..modelgenerator.layout import write_layout
    from ..origin import find_origin

    assert asked.foreign is not None and asked.found is not None
    catalog, manifest = discover(), Manifest.open(config.output)
    job = open_job(config, catalog, rows=rows, download=False)
    _, tables = selected(manifest, complete(manifest, Selection()), catalog, Selection())
    head = find_origin(job.backbone.options.weights, config.ckpt, config.lora).head
    count = write_layout(config.output, asked.foreign, asked.found, job, tables, head)
    files = f"{count:,} {'file' if count == 1 else 'files'} predict_predictions_0_N.pt"
    typer.echo(f"written   {files} in {config.output}", err=True)


def ask(task: str | None, given: dict[str, Any], chosen: dict[str, Any]) -> Asked:
    """Configs and flags, ours and ModelGenerator's, as one."""
    from ..catalog import discover
    from ..config import read_config
    from ..modelgenerator.merging import merge_configs
    from ..modelgenerator.sources import is_foreign
    from ..modelgenerator.translation import units_note
    from . import running

    sources = chosen.pop("sources")
    if (stats := chosen.pop("label_stats", None)) is not None:
        chosen |= label_units(stats)
    given.pop("config")
    flags = {**o.flags_of(given, chosen), "task": task}
    ours = [source for source in sources if isinstance(source, Path) and not is_foreign(source)]
    theirs = [source for source in sources if source not in ours]
    if all(not isinstance(source, Path) and source[0] == "ckpt_path" for source in theirs):
        flags["ckpt"] = Path(theirs[-1][1]) if theirs else None
        values = running.merged_values(read_config(ours), flags)
        if not values.get("task"):
            raise MgenError(
                "mgen predict and mgen test need the config of a fine-tuned model",
                "give --config config.yaml, as its training wrote it, and --ckpt model.ckpt",
            )
        return Asked(values)
    foreign = merge_configs(theirs)
    found = translated(foreign, flags["data"] or (), discover())
    flags = running.merged_values(read_config(ours), flags)
    values = running.merged_values(found.values, flags)
    found.notes.extend(units_note(found.head, values["options"]))
    if str(values["options"].get("as_reference", "")).lower() == "true":
        values = like_the_reference(values, found.batch_size, discover())
    return Asked(values, found, foreign)


def label_units(path: Path) -> dict[str, str]:
    """Mean and deviation of the labels in training, from a JSON file."""
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        told = {name: found[name] for name in ("mean", "std")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MgenError(
            f"--label-stats {path} cannot be read: {type(error).__name__}: {error}",
            'write {"mean": 3.1, "std": 0.8} into it, or lists of numbers',
        ) from error
    lists = {name: value if isinstance(value, list) else [value] for name, value in told.items()}
    return {f"label_{name}": ",".join(map(str, values)) for name, values in lists.items()}


def like_the_reference(values: dict[str, Any], batch_size: int, catalog: Catalog) -> dict[str, Any]:
    """Its batches and its padding, on which its numbers depend where it is defective."""
    from ..api import BackboneCard

    card = catalog.find(BackboneCard, values["backbone"])
    pads = {"pads": True} if "pads" in card.options.__dataclass_fields__ else {}
    return {**values, "batch_rows": batch_size, "options": {**pads, **values["options"]}}


def translated(foreign: Foreign, data: Sequence[str], catalog: Catalog) -> Translated:
    """ModelGenerator's configuration, in our own terms."""
    from ..api import BackboneCard
    from ..modelgenerator.translation import translate

    cards = [offer.card for offer in catalog.offers(BackboneCard)]
    found = translate(foreign, cards, data)
    tuned = {"ckpt": found.ckpt, "lora": found.lora if found.ckpt else None}
    return replace(found, values={**found.values, **tuned})


@o.run_command(start=start)
def predict(
    ctx: typer.Context = None,  # type: ignore[assignment]  # typer gives one
    ckpt: Ckpt = None,
    label_mean: LabelMean = None,
    label_std: LabelStd = None,
    label_stats: LabelStats = None,
    top_pairs: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            rich_help_panel=o.OUTPUT,
            help="Of predicted pairs of residues, only the N most probable ones a row.",
        ),
    ] = None,
    layout: Annotated[
        Layout,
        typer.Option(
            rich_help_panel=o.OUTPUT,
            help="modelgenerator: beside ours, the .pt files that it would have written.",
        ),
    ] = Layout.native,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            "--print_config",
            rich_help_panel=o.RUN,
            help="Print what the configs and flags come to as one short config, and stop.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Predictions of a fine-tuned model, from ModelGenerator's config and checkpoint.

    Its YAML is taken as it is, and its flags (--model.backbone X, --data.path Y) too.

    Leaves a run directory; `mgen merge` makes one file of it.
    """
    # `ckpt` is here for its help: with its place among ModelGenerator's words it is in `sources`.
    return {
        "sources": ctx.meta["sources"],
        "print_config": print_config,
        "layout": layout,
        "label_mean": label_mean,
        "label_std": label_std,
        "label_stats": label_stats,
        "top_pairs": top_pairs,
    }
