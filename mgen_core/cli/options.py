"""Options that several commands share: flag, help and type, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import MgenError

INPUT, MODEL, OUTPUT, RUN, RANKS = "Input", "Model", "Output", "Run", "Several processes"


def place(text: str) -> Path:
    """A path, or what stands for one on an object store."""
    from ..objects import place

    return place(text)


class Dtype(str, Enum):
    """Of the numbers that are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Precision(str, Enum):
    """Of the arithmetic."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class TooLong(str, Enum):
    """What becomes of a row that is longer than the model takes."""

    fail = "fail"
    truncate = "truncate"


class Strategy(str, Enum):
    """How several ranks share the work."""

    auto = "auto"
    replicate = "replicate"
    zero3 = "zero3"


class Offload(str, Enum):
    """Where shards lie that do not fit on the GPUs."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OnError(str, Enum):
    """What becomes of the run when a row cannot be computed."""

    skip = "skip"
    stop = "stop"


Data = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="DATA...", help="Files, globs, URLs or Hugging Face datasets."),
]
Backbone = Annotated[
    Optional[str],
    typer.Option(
        "--backbone", "-b", help="The model: `mgen list backbones`.", rich_help_panel=MODEL
    ),
]
Weights = Annotated[
    Optional[str],
    typer.Option(
        metavar="DIR|HUB_ID",
        help="Weights to use instead of the published ones.",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    Optional[str],
    typer.Option(help="Revision of the weights on the hub.", rich_help_panel=MODEL),
]
PrecisionOption = Annotated[
    Optional[Precision],
    typer.Option("--precision", help="Of the arithmetic. Default: auto.", rich_help_panel=MODEL),
]
Option = Annotated[
    Optional[list[str]],
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the backbone or reader; repeatable.",
        rich_help_panel=MODEL,
    ),
]
IdCol = Annotated[
    Optional[str],
    typer.Option(help="Column with ids. Default: id, else row numbers.", rich_help_panel=INPUT),
]
XCol = Annotated[
    Optional[str],
    typer.Option(
        help="Column with the input. Default: sequence, sequences or seq.", rich_help_panel=INPUT
    ),
]
Keep = Annotated[
    Optional[list[str]],
    typer.Option(
        "--keep",
        "--keep-obs",
        metavar="A,B,...",
        help="Columns of the input that the result has, too; repeatable.",
        rich_help_panel=INPUT,
    ),
]
Split = Annotated[Optional[str], typer.Option(help="Split of a dataset.", rich_help_panel=INPUT)]
Reader = Annotated[
    Optional[str],
    typer.Option(
        help="Format of DATA, where its suffix does not tell: `mgen list readers`.",
        rich_help_panel=INPUT,
    ),
]
Limit = Annotated[
    Optional[int], typer.Option(help="Only the first N rows.", metavar="N", rich_help_panel=INPUT)
]
Output = Annotated[
    Optional[Path],
    typer.Option(
        "--output",
        "-o",
        parser=place,
        metavar="DIR|URL",
        help="The run directory. Default: predictions.",
        rich_help_panel=OUTPUT,
    ),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", parser=place, help="The run directory, or its URL.")
]
Writer = Annotated[
    Optional[str],
    typer.Option(
        help="Format of the parts: `mgen list writers`. Default: parquet.", rich_help_panel=OUTPUT
    ),
]
DtypeOption = Annotated[
    Optional[Dtype],
    typer.Option(
        "--dtype", help="Of the numbers stored. Default: float32.", rich_help_panel=OUTPUT
    ),
]
BatchTokens = Annotated[
    Optional[str],
    typer.Option(
        metavar="auto|N",
        help="Most tokens computed at once, padding included. Default: auto (measured).",
        rich_help_panel=RUN,
    ),
]
MaxLength = Annotated[
    Optional[int],
    typer.Option(
        metavar="TOKENS",
        help="Longest row, special tokens included. Default: the model's.",
        rich_help_panel=INPUT,
    ),
]
TooLongOption = Annotated[
    Optional[TooLong],
    typer.Option(
        "--too-long",
        help="Set longer rows aside, or cut them. Default: fail.",
        rich_help_panel=INPUT,
    ),
]
OnErrorOption = Annotated[
    Optional[OnError],
    typer.Option(
        "--on-error",
        help="Set a bad row aside, or stop at the first. Default: skip.",
        rich_help_panel=RUN,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Discard the run in --output first.", rich_help_panel=OUTPUT),
]
PlanOnly = Annotated[
    bool,
    typer.Option(
        "--plan-only", help="Print what would be done; no weights needed.", rich_help_panel=RUN
    ),
]
Config = Annotated[
    Optional[list[Path]],
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML with any of these options (batch_tokens: 4096); repeatable, last one wins; "
        "the command line wins over all.",
        rich_help_panel=RUN,
    ),
]
Devices = Annotated[
    Optional[str],
    typer.Option(
        metavar="auto|N",
        help="Processes to start here, one a GPU. Default: auto (all GPUs, else 1).",
        rich_help_panel=RANKS,
    ),
]
StrategyOption = Annotated[
    Optional[Strategy],
    typer.Option(
        "--strategy",
        help="The whole model on each rank, or shards of it. Default: auto (what fits).",
        rich_help_panel=RANKS,
    ),
]
OffloadOption = Annotated[
    Optional[Offload],
    typer.Option(
        "--offload",
        help="Keep shards in host memory, or in the mapped file. Default: none.",
        rich_help_panel=RANKS,
    ),
]
Hostfile = Annotated[
    Optional[Path],
    typer.Option(
        help="Hosts to run on (`node1 slots=8` a line), through DeepSpeed's launcher.",
        rich_help_panel=RANKS,
    ),
]
NumNodes = Annotated[
    Optional[int],
    typer.Option(metavar="N", help="Only the first N of the hosts.", rich_help_panel=RANKS),
]
Bind = Annotated[
    bool,
    typer.Option("--bind", help="Pin each process to cores of its own.", rich_help_panel=RANKS),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


Start = Callable[[str | None, dict[str, Any], dict[str, Any]], None]


def run_command(
    task: str | None = None, start: Start | None = None
) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """Make a run command of a function that turns its own options into those of its task.

    The command has the options of `shared` beside them. Without a task the function names it, or
    `start` finds it in a config.
    """

    def command(own: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            chosen = own(**{name: given.pop(name) for name in inspect.signature(own).parameters})
            (start or start_run)(task or chosen.pop("task", None), given, chosen)

        common = [*inspect.signature(shared, eval_str=True).parameters.values()]
        output = [parameter.name for parameter in common].index("output")
        mine = [*inspect.signature(own, eval_str=True).parameters.values()]
        parameters = [*common[:output], *mine, *common[output:]]
        # Typer reads these two.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = own.__doc__
        return run

    return command


def shared(
    data: Data = None,
    backbone: Backbone = None,
    weights: Weights = None,
    revision: Revision = None,
    precision: PrecisionOption = None,
    option: Option = None,
    id_col: IdCol = None,
    x_col: XCol = None,
    keep: Keep = None,
    split: Split = None,
    reader: Reader = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    too_long: TooLongOption = None,
    output: Output = None,
    writer: Writer = None,
    dtype: DtypeOption = None,
    overwrite: Overwrite = False,
    plan_only: PlanOnly = False,
    batch_tokens: BatchTokens = None,
    on_error: OnErrorOption = None,
    config: Config = None,
    devices: Devices = None,
    strategy: StrategyOption = None,
    offload: OffloadOption = None,
    hostfile: Hostfile = None,
    num_nodes: NumNodes = None,
    bind: Bind = False,
) -> None:
    """What every run command takes, in the order of its help; a task's own come before output."""


def start_run(task: str | None, given: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Run what the flags and the config files say."""
    from . import running

    configs, plan_only = given.pop("config"), given.pop("plan_only")
    config = running.make(configs, {**flags_of(given, chosen), "task": task})
    running.start(config, plan_only=plan_only)


def flags_of(given: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The flags as values of a `RunConfig`, the task's own among the options."""
    options = parse_options(given.pop("option"))
    options |= {key: value for key, value in chosen.items() if value is not None}
    for name in ("batch_tokens", "devices"):
        given[name] = parse_auto(f"--{name.replace('_', '-')}", given[name])
    given["keep"] = split_list(given["keep"])
    return {**given, "options": options}


def split_list(values: list[str] | None) -> list[str] | None:
    """`--pool mean,max --pool cls` as ["mean", "max", "cls"]; None when not given."""
    if not values:
        return None
    return [item.strip() for value in values for item in value.split(",") if item.strip()]


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """`--option key=value` pairs. Raises `MgenError` for one without a key."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise MgenError(f"--option {pair!r} is not KEY=VALUE", "write it as --option key=value")
        found[key.strip()] = value
    return found


def parse_auto(flag: str, value: str | None) -> int | None:
    """A number, or None for `auto`. Raises `MgenError` for anything else."""
    if value is None or value == "auto":
        return None
    if not value.isdigit():
        raise MgenError(f"{flag} {value!r} is not a number", "give a number, or auto")
    return int(value)
