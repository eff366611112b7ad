"""The four hooks. Each returns cards; none has side effects."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from .api import BackboneCard, ReaderCard, TaskCard, WriterCard

hookspec = pluggy.HookspecMarker("mgen")
hookimpl = pluggy.HookimplMarker("mgen")


@hookspec
def mgen_backbones() -> Iterable[BackboneCard]:  # type: ignore[empty-body]
    """Pretrained models that this plugin offers."""


@hookspec
def mgen_tasks() -> Iterable[TaskCard]:  # type: ignore[empty-body]
    """What can be computed from a model's activations."""


@hookspec
def mgen_readers() -> Iterable[ReaderCard]:  # type: ignore[empty-body]
    """Input formats."""


@hookspec
def mgen_writers() -> Iterable[WriterCard]:  # type: ignore[empty-body]
    """Output formats."""
