"""YAML that others wrote: it runs nothing, and cannot grow beyond what was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from .errors import MgenError

MOST_TEXT = 1 << 20  # PyYAML takes seconds for it; configurations have a few kB
MOST_EXPANDED = 10 << 20  # letters, once every alias is replaced by what it stands for


class StrictLoader(yaml.SafeLoader):
    """Plain YAML, but a key that is given twice is an error: nobody knows which one was meant."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        told: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in told:
                    problem = f"{key.value[:40]!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                told.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = StrictLoader) -> dict[str, Any]:
    """The mapping in a file; that of an empty one is empty. Raises `MgenError`."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_TEXT + 1).decode("utf-8-sig")
    except OSError as error:
        raise MgenError(f"cannot be read: {error.strerror}", "check --config") from error
    except UnicodeDecodeError as error:
        raise MgenError("is not YAML: not a text file", "check --config") from error
    found = parse_yaml(text, loader)
    if not isinstance(found, dict | None):
        raise MgenError("holds no keys", "write `key: value` lines, as `backbone: NAME`")
    return found or {}


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = StrictLoader) -> Any:
    """What a text says. Raises `MgenError`."""
    if len(text) > MOST_TEXT:
        raise MgenError(
            f"is not a configuration: it is larger than {MOST_TEXT >> 20} MiB", "check the file"
        )
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _expanded(node, {})
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except MgenError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} " if mark else ""
        problem = str(getattr(error, "problem", None) or "it cannot be parsed")
        if "python/" in problem:
            raise MgenError(
                f"{where}has a tag that runs Python: {problem}", "it is not followed: take it out"
            ) from error
        raise MgenError(f"{where}is not YAML: {problem}", "mend that line") from error
    except RecursionError as error:
        raise MgenError("is nested too deep", "write fewer levels") from error
    except Exception as error:  # what PyYAML meets in a value that does not fit its tag
        what = f"has a value that does not fit its kind: {error!s:.80}"
        raise MgenError(what, "put quotes around it if it is text") from error


@contextmanager
def about(name: object) -> Iterator[None]:
    """Put the name of what is read before the errors within."""
    try:
        yield
    except MgenError as error:
        error.what = f"{name}: {error.what}"
        error.args = (error.what,)
        raise


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Letters and nodes below a node, counted as often as aliases repeat them.

    PyYAML shares what is repeated; whoever prints or stores the values does not.
    """
    size = known.get(id(node))
    if size == 0:
        raise MgenError("has an alias to what it is part of", "write the value out")
    if size is not None:
        return size
    known[id(node)] = 0
    below = node.value if isinstance(node, yaml.SequenceNode) else ()
    if isinstance(node, yaml.MappingNode):
        below = chain.from_iterable(node.value)
    size = 1 + len(node.value) + sum(_expanded(inner, known) for inner in below)
    if size > MOST_EXPANDED:
        raise MgenError("has aliases that repeat each other without end", "write the values out")
    known[id(node)] = size
    return size
