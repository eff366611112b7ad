"""Where a configuration comes from: words of a command line, and YAML that runs nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import yaml

from ..errors import MgenError
from ..plain_yaml import about, parse_yaml, read_yaml
from .classes import words

Source = Union[Path, tuple[str, str]]
SECTIONS = ("trainer", "model", "data", "optimizer", "lr_scheduler")
SINGLE = ("ckpt_path", "seed_everything", "return_predictions", "verbose")
CONFIG = ("--config", "-c")
CKPT = ("ckpt", "ckpt-path")  # as our own command line spells it
# Arguments whose values are text, also where they look like numbers.
TEXT = words(
    "ckpt_path config_name cv_fold_id_col filetype id_col in_cols out_cols output_dir path "
    "test_split_files test_split_name train_split_files train_split_name valid_split_files "
    "valid_split_name x_col y_col"
)


class _Loader(yaml.SafeLoader):
    """Plain YAML, but 1e-4 is a number and a date is text, as ModelGenerator reads them."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*)?\.[0-9_]+([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*\.([eE][-+]?[0-9]+)?$"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a file. Raises `MgenError`."""
    return read_yaml(path, _Loader)


def parse(text: str) -> Any:
    """What a text says. Raises `MgenError`."""
    return parse_yaml(text, _Loader)


def is_foreign(path: Path) -> bool:
    """Whether a config file is ModelGenerator's rather than ours. Raises `MgenError`."""
    with about(path):
        found = read_config(path)
    keys = {str(key).split(".")[0] for key in found}
    return bool(keys & {"trainer", "model", *SINGLE}) or isinstance(found.get("data"), dict)


def read_arguments(arguments: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Words of a command line: ModelGenerator's, in their order, and the rest.

    Theirs are `--config`, `--ckpt_path` and everything below `--model`, `--data`, `--trainer`.
    Raises `MgenError` for one of them without a value.
    """
    sources: list[Source] = []
    rest: list[str] = []
    left = iter(arguments)
    for word in left:
        if word == "--":
            rest += [word, *left]
            break
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if flag not in CONFIG and not _is_theirs(flag):
            rest.append(word)
            continue
        if not equals and (found := next(left, None)) is None:
            raise MgenError(f"{flag} has no value", f"write {flag} VALUE")
        value = value if equals else str(found)
        if flag in CONFIG:
            sources.append(Path(value))
        else:
            sources.append(("ckpt_path" if name in CKPT else name, value))
    return sources, rest


def _is_theirs(flag: str) -> bool:
    name = flag.removeprefix("--")
    first = name.split(".")[0].removesuffix("+")
    return flag.startswith("--") and (first in SECTIONS or name in (*SINGLE, *CKPT))


def parse_value(name: str, text: str) -> Any:
    """A flag's value: YAML, but names of columns and files stay as they were typed."""
    found = parse(text)
    scalar = found is not None and not isinstance(found, (list, dict))
    return text if scalar and name.removesuffix("+") in TEXT else found
