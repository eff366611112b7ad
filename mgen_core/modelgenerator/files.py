"""Which files a data set is made of, split by split, as Hugging Face `datasets` decides it.

By what is given, else by what a dataset's README.md says, else by names of folders and files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import near
from ..errors import InputError
from ..plain_yaml import about
from .rows import Files, Rules
from .sources import parse

HubSplits = Callable[[str], Sequence[str]]


def find_splits(rules: Rules, hub_splits: HubSplits) -> dict[str, Files]:
    """The splits of the data set, each with its files, or with its id where it is on the hub.

    Raises `InputError` for a data set that is not there.
    """
    folder = Path(rules.path)
    if folder.is_file():
        raise InputError(
            f"data.path {rules.path} is a file: ModelGenerator takes folders",
            f"write --data.path {folder.parent} --data.test_split_files {folder.name}, or give "
            "the file as DATA",
        )
    if folder.is_dir():
        return _of_folder(folder, rules)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", rules.path):
        raise InputError(f"no data folder {rules.path}", "check --data.path, or give DATA")
    if rules.files() or rules.config_name:
        raise InputError(
            f"{rules.path}: files or a config_name of a dataset on the hub are not supported",
            f"run `hf download --repo-type dataset {rules.path} --local-dir FOLDER` and give "
            "--data.path FOLDER, or give DATA",
        )
    return {name: (rules.path,) for name in hub_splits(rules.path)}


def hub_splits(uri: str) -> list[str]:
    """Names of the splits of a dataset on the hub, which is downloaded for it."""
    try:
        import datasets  # type: ignore[import-untyped]

        return list(datasets.load_dataset(uri))
    except Exception as error:  # the library, the hub and the network raise all kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{uri} is no folder here and cannot be loaded as a dataset: {reason}",
            "check --data.path, or give DATA",
        ) from error


# As Hugging Face `datasets` decides: by shards, by names of folders, by names of files.
SHARD = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}.*\..*")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
APART = "[-._ 0-9]"
IN_FOLDERS = (
    "(.*/)?{word}/.*",
    "(.*/)?{word}{apart}[^/]*/.*",
    "(.*/)?[^/]*{apart}{word}/.*",
    "(.*/)?[^/]*{apart}{word}{apart}[^/]*/.*",
)
IN_FILES = ("(.*/)?{word}{apart}[^/]*", "(.*/)?[^/]*{apart}{word}{apart}[^/]*")
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".ndjson")  # in order of preference
NO_DATA = (
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
)


def _of_folder(folder: Path, rules: Rules) -> dict[str, Files]:
    every = _files_below(folder)
    if given := rules.files():
        named = {part: _given(folder, every, names) for part, names in given.items()}
        return {part: _paths(folder, names) for part, names in named.items()}
    told = _told_by_card(folder, rules.config_name)
    found = (
        {name: _given(folder, every, patterns) for name, patterns in told.items()}
        if told
        else _by_name(every)
    )
    readable = {name: _of_one_format(names) for name, names in found.items()}
    kept = {name: _paths(folder, names) for name, names in readable.items() if names}
    if not kept:
        raise InputError(
            f"no table in {folder}", f"ModelGenerator reads {', '.join(sorted(SUFFIXES))}"
        )
    return kept


def _files_below(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.name not in NO_DATA
        and not any(part.startswith(".") for part in name.parts)
        and not any(part.startswith("__") for part in name.parts[:-1])
    )


def _given(folder: Path, every: Sequence[str], names: Sequence[str]) -> list[str]:
    """Files by name or pattern. Raises `InputError` for one that is not there."""
    found: list[str] = []
    for name in names:
        matches = [name] if (folder / name).is_file() else _matching(folder, every, name)
        if not matches:
            hint = f"{near(name, set(every))} it holds: {', '.join(every[:10]) or 'nothing'}"
            raise InputError(f"no file {name} in {folder}", hint.strip())
        found += matches
    return found


def _matching(folder: Path, every: Sequence[str], pattern: str) -> list[str]:
    pattern = f"{pattern}/*" if pattern.endswith("**") else pattern
    try:
        matches = {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    except (NotImplementedError, ValueError):  # an absolute pattern
        return []
    return [name for name in every if name in matches]


def _by_name(every: Sequence[str]) -> dict[str, list[str]]:
    shards = [(match[1], name) for name in every if (match := SHARD.fullmatch(name))]
    if shards:
        return _grouped(shards)
    for patterns in (IN_FOLDERS, IN_FILES):
        found = [
            (split, name)
            for split, keywords in KEYWORDS.items()
            for keyword in keywords
            for pattern in patterns
            for name in every
            if re.fullmatch(pattern.format(word=keyword, apart=APART), name)
        ]
        if found:
            return _grouped(found)
    return {"train": list(every)}


def _grouped(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for split, name in pairs:
        if name not in found.setdefault(split, []):
            found[split].append(name)
    return found


def _of_one_format(names: Sequence[str]) -> list[str]:
    """The files of the most frequent format: a folder may hold notes beside its tables."""
    formats = {name: _format(name) for name in names}
    count = Counter(form for form in formats.values() if form)
    if not count:
        return []
    best = max(count, key=lambda form: (count[form], -SUFFIXES.index(form)))
    return [name for name in names if formats[name] == best]


def _format(name: str) -> str | None:
    endings = [f".{piece}".lower() for piece in name.rpartition("/")[2].split(".")[1:]]
    return next((ending for ending in reversed(endings) if ending in SUFFIXES), None)


def _paths(folder: Path, names: Sequence[str]) -> Files:
    return tuple(str(folder / name) for name in names)


def _told_by_card(folder: Path, config_name: str | None) -> dict[str, list[str]]:
    """What `configs:` at the head of a README.md says of the splits; {} where it says nothing."""
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\s*?\n(.*?\n)---", text, re.S)
    with about(card):
        told = parse(head[1]) if head else {}
    configs = (told.get("configs") or []) if isinstance(told, dict) else []
    named = {one.get("config_name"): one for one in configs if isinstance(one, dict)}
    if not named:
        return {}
    usual = [name for name, one in named.items() if one.get("default") or name == "default"]
    usual = usual or (list(named) if len(named) == 1 else [])
    chosen = config_name or next(iter(usual), None)
    if chosen not in named:
        listed = ", ".join(map(str, named))
        raise InputError(f"{folder} has the configurations {listed}", "give --data.config_name")
    if "data_files" not in named[chosen]:
        raise InputError(
            f"{card}: configuration {chosen} names no data_files", "give --data.test_split_files"
        )
    return _grouped(list(_entries(named[chosen]["data_files"])))


def _entries(files: Any) -> Iterator[tuple[str, str]]:
    """(split, pattern) pairs of a path, a list of paths, or a list of {split, path}."""
    for entry in [files] if isinstance(files, str) else files:
        one = entry if isinstance(entry, dict) else {"path": entry}
        paths = one.get("path") or []
        for path in [paths] if isinstance(paths, str) else paths:
            yield str(one.get("split", "train")), str(path)
