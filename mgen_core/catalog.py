"""Finds plugins, guards each one, and answers "which card has this name?".

A `Catalog` is a value: `discover()` makes one from the installed distributions, `Catalog.of`
from plugin objects, for tests. One broken plugin is a `Problem` and never stops another.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import pluggy

from . import hookspecs
from .api import BackboneCard, Card, ReaderCard, TaskCard, WriterCard
from .errors import PluginError

GROUP = "mgen"
KINDS: dict[str, type[Any]] = {
    "backbone": BackboneCard,
    "task": TaskCard,
    "reader": ReaderCard,
    "writer": WriterCard,
}
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
SUFFIX = re.compile(r"(\.\w+)+", re.ASCII)
C = TypeVar("C", BackboneCard, TaskCard, ReaderCard, WriterCard)


@dataclass(frozen=True)
class Plugin:
    """An entry point of the group `mgen`, and what became of it."""

    name: str
    distribution: str
    version: str
    seconds: float = 0.0
    cards: tuple[Card, ...] = ()
    problem: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Offer(Generic[C]):
    """A card and the distribution that offers it."""

    card: C
    distribution: str


@dataclass(frozen=True)
class Catalog:
    """All plugins that were found, broken ones included, in the order of their names."""

    plugins: tuple[Plugin, ...] = field(default=())

    @classmethod
    def of(cls, *modules: Any) -> Catalog:
        """A catalog of plugin modules or objects that are at hand."""
        return cls(tuple(_examined(Plugin(_name(m), _name(m), ""), lambda m=m: m) for m in modules))

    def offers(self, kind: type[C]) -> list[Offer[C]]:
        """Every card of one kind, sorted by name."""
        found = [
            Offer(card, plugin.distribution)
            for plugin in self.plugins
            for card in plugin.cards
            if isinstance(card, kind)
        ]
        return sorted(found, key=lambda offer: (offer.card.name, offer.distribution))

    def find(self, kind: type[C], name: str) -> C:
        """The card called `name`, or `distribution:name` where two plugins offer it.

        Raises `PluginError` for a name that is missing (with near names, and the broken plugins
        that might have offered it) or offered twice.
        """
        distribution, _, short = name.rpartition(":")
        found = [
            offer
            for offer in self.offers(kind)
            if offer.card.name == short and distribution in ("", offer.distribution)
        ]
        if len(found) == 1:
            return found[0].card
        if found:
            choices = ", ".join(f"{offer.distribution}:{short}" for offer in found)
            raise PluginError(f"two plugins offer {short!r}", f"say which one: {choices}")
        raise PluginError(f"no {_word(kind)} {name!r}", self._hint(kind, short))

    def _hint(self, kind: type[C], name: str) -> str:
        names = [offer.card.name for offer in self.offers(kind)]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        broken = [f"{p.distribution} ({p.problem})" for p in self.plugins if p.problem]
        if near:
            return f"did you mean {' or '.join(near)}?"
        listed = f"`mgen list {_word(kind)}s` tells which there are"
        return f"{listed}; broken plugins: {'; '.join(broken)}" if broken else listed


def discover() -> Catalog:
    """The catalog of the installed distributions.

    `MGEN_PLUGINS=a,b` narrows it to those entry points, for tests and for a plugin so broken
    that no guard can catch it.
    """
    found = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    if only := os.environ.get("MGEN_PLUGINS"):
        names = {name.strip() for name in only.split(",")}
        found = [point for point in found if point.name in names]
    return Catalog(tuple(_loaded(point) for point in found))


def _loaded(point: importlib.metadata.EntryPoint) -> Plugin:
    distribution = point.dist.name if point.dist else point.module
    version = point.dist.version if point.dist else ""
    return _examined(Plugin(point.name, distribution, version), point.load)


def _examined(plugin: Plugin, load: Any) -> Plugin:
    """The plugin with its cards, or with what is wrong with it."""
    start = time.perf_counter()
    try:
        cards = tuple(_cards(load()))
    # A plugin may raise anything, SystemExit included, and must not take the others with it.
    except (Exception, SystemExit) as error:
        return replace(plugin, problem=_cause(error), traceback=traceback.format_exc())
    return replace(plugin, cards=cards, seconds=time.perf_counter() - start)


def _cards(module: Any) -> Iterable[Card]:
    # A manager each: two plugins cannot disturb each other's hooks.
    manager = pluggy.PluginManager("mgen")
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}; it may need a newer mgen") from error
    for kind, cls in KINDS.items():
        for cards in getattr(manager.hook, f"mgen_{kind}s")():
            for card in cards:
                if not isinstance(card, cls):
                    raise PluginError(f"mgen_{kind}s gave {card!r:.60}, not a {cls.__name__}")
                _check_name(card)
                yield card


def _check_name(card: Card) -> None:
    """Names are typed and printed; a writer's suffix becomes part of names of files."""
    if not NAME.fullmatch(card.name):
        raise PluginError(f"{card.name!r:.60} is no name: use letters, digits, and . _ - within")
    if isinstance(card, WriterCard) and not SUFFIX.fullmatch(card.suffix):
        raise PluginError(f"{card.suffix!r:.60} is no suffix: write it as .txt")


def _cause(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _name(module: Any) -> str:
    return str(getattr(module, "__name__", type(module).__name__))


def _word(kind: type[Any]) -> str:
    return next(word for word, cls in KINDS.items() if cls is kind)
