"""What a run is asked to do: one frozen value, checked once, from files and flags."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from .errors import MgenError
from .objects import ObjectPath, place

StoredDtype = Literal["float32", "float16", "bfloat16"]
Precision = Literal["auto", "fp32", "bf16"]
Strategy = Literal["auto", "replicate", "zero3"]
Offload = Literal["none", "cpu", "nvme"]
T = TypeVar("T")


class _Placed:
    """How pydantic makes a path of a text that may be a URL."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(_placed)


Place = Annotated[Path, _Placed()]
"""A path of this machine, or an `ObjectPath`."""


@dataclass(frozen=True)
class RunConfig:
    """A run. Field names are the command line's, and the keys of a `--config` file.

    `ckpt` is a fine-tuned model's file, `weights` then those of its base; `lora` has r, alpha,
    rslora, target_modules and modules_to_save of its training. `options` are the `--option
    key=value` of the backbone, the reader and the task together. `keep` names columns of the input
    that the result has, too.
    """

    task: str
    backbone: str
    data: tuple[str, ...]
    output: Place = Path("predictions")
    weights: str | None = None
    revision: str | None = None
    ckpt: Path | None = None
    lora: Mapping[str, Any] | None = None
    reader: str | None = None
    id_col: str | None = None
    x_col: str | None = None
    keep: tuple[str, ...] = ()
    split: str | None = None
    writer: str = "parquet"
    dtype: StoredDtype = "float32"
    precision: Precision = "auto"
    batch_tokens: int | None = None
    batch_rows: int | None = None
    max_length: int | None = None
    too_long: Literal["fail", "truncate"] = "fail"
    on_error: Literal["skip", "stop"] = "skip"
    limit: int | None = None
    overwrite: bool = False
    devices: int | None = None
    num_nodes: int | None = None
    hostfile: Path | None = None
    strategy: Strategy = "auto"
    offload: Offload = "none"
    bind: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_length", "limit", "devices", "num_nodes", "batch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MgenError(f"{name} is {value}", "it must be 1 or more")
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, (str, Path)) and not _can_be_named(str(text)):
                    what = f"{name} {str(text)!r:.40} is not text that a file can be called"
                    raise MgenError(what, "a config file's escapes make such: write it plainly")
        if not self.data:
            raise MgenError("no input", "name a file, a glob or a dataset")


def read_config(paths: Sequence[Path]) -> dict[str, Any]:
    """The keys of the YAML files, the last file winning.

    Raises `MgenError` for a file that is not there, not YAML, not a mapping, or has a key that
    no `RunConfig` has.
    """
    if not paths:
        return {}
    from .plain_yaml import about, read_yaml

    known = {f.name for f in dataclasses.fields(RunConfig)}
    merged: dict[str, Any] = {}
    for path in paths:
        with about(path):
            found = read_yaml(path)
            for key in found:
                if key not in known:
                    raise MgenError(f"unknown key {key!r:.40}", near(str(key), known))
        merged.update(found)
    return merged


def make_config(values: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig. Raises `MgenError` naming each field that does not fit."""
    for name in ("task", "backbone", "data"):
        if not values.get(name):
            flag = "DATA" if name == "data" else f"--{name}"
            raise MgenError(f"no {name} given", f"add {flag}, or `{name}:` to the config file")
    data = values["data"]
    # One path is one path, commas and all.
    values = {**values, "data": (data,) if isinstance(data, str) else data}
    for name in ("batch_tokens", "devices"):
        if values.get(name) == "auto":
            values[name] = None
    if isinstance(values.get("weights"), Path):  # or a hub id
        values["weights"] = str(values["weights"])
    return checked(RunConfig, values)


def make_options(kinds: Sequence[type[Any]], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each `--option` handed to the options classes that have a field of its name.

    Raises `MgenError` for a key that none has. Values are checked by `checked`.
    """
    fields = [{f.name for f in dataclasses.fields(kind)} - RESERVED for kind in kinds]
    for key in given:
        if not any(key in names for names in fields):
            known = set().union(*fields)
            listed = f"there are: {', '.join(sorted(known))}" if known else "there are none here"
            raise MgenError(f"no option {key!r}", f"{near(key, known)} {listed}".strip())
    return [{k: v for k, v in given.items() if k in names} for names in fields]


# Fields of options classes that have a flag of their own.
RESERVED = {"weights", "split"}


def checked(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass made from loose values, or `MgenError` saying which do not fit.

    As on a command line, "4" is 4 and, where a tuple is wanted, "a,b" is ("a", "b").
    """
    import pydantic

    tuples = {name for name, hint in get_type_hints(kind).items() if get_origin(hint) is tuple}
    loose = {
        name: value.split(",") if name in tuples and isinstance(value, str) else value
        for name, value in values.items()
    }
    try:
        return pydantic.TypeAdapter(kind).validate_python(loose)
    except pydantic.ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or kind.__name__} = {fault['input']!r:.60}"
            f" ({fault['msg'][0].lower() + fault['msg'][1:]})"
            for fault in error.errors()
        ]
        raise MgenError(
            f"does not fit: {'; '.join(faults)}", "give a value of that kind"
        ) from error


def _can_be_named(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False


def near(name: str, known: set[str]) -> str:
    """ "did you mean ...?", or nothing."""
    import difflib

    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {found[0]}?" if found else ""


def _placed(value: Any) -> Any:
    if isinstance(value, (Path, ObjectPath)):
        return value
    if not isinstance(value, str):
        raise ValueError("not a path")
    return place(value)
