"""The card of AntiBERTy. Every mgen command reads this module, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from mgen_core import Backbone, BackboneCard, BackboneOptions, hookimpl


def load(card: BackboneCard, options: BackboneOptions) -> Backbone:
    from .antiberty import AntiBERTy  # torch is imported here, when a run needs the model

    return AntiBERTy(card, options)


@hookimpl
def mgen_backbones() -> Iterable[BackboneCard]:
    yield BackboneCard(
        name="antiberty",
        summary="AntiBERTy, trained on 558M antibody sequences; its weights come with pip",
        modality="protein",
        load=load,
        width=512,
        max_tokens=512,
        licence="MIT",
        weights=("package:antiberty/trained_models/AntiBERTy_md_smooth",),
        parameters=25_772_569,
    )
