"""Cards of the protein models published on the Hugging Face hub, and of any encoder there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mgen_core import Backbone, BackboneCard, BackboneOptions, hookimpl


@dataclass(frozen=True)
class AutoOptions(BackboneOptions):
    """Options of the `huggingface` backbone.

    - `spaces`: write letters apart ("M K V"), as ProtBert and ProtT5 want them.
    - `upper`: read lower case as upper case.

    `auto` asks the tokenizer: apart where it knows letters only apart, upper case where it knows
    no lower case letter.
    """

    spaces: bool | Literal["auto"] = "auto"
    upper: bool | Literal["auto"] = "auto"


def load_esm2(card: BackboneCard, options: BackboneOptions) -> Backbone:
    from .esm2 import Esm2

    return Esm2(card, options)


def load_esmc(card: BackboneCard, options: BackboneOptions) -> Backbone:
    from .esmc import EsmC

    return EsmC(card, options)


def load_auto(card: BackboneCard, options: AutoOptions) -> Backbone:
    from .auto import AutoEncoder

    return AutoEncoder(card, options)


# name, hub id, width, parameters
ESM2 = [
    ("esm2_8m", "facebook/esm2_t6_8M_UR50D", 320, 7_512_353),
    ("esm2_35m", "facebook/esm2_t12_35M_UR50D", 480, 33_501_153),
    ("esm2_150m", "facebook/esm2_t30_150M_UR50D", 640, 148_139_553),
    ("esm2_650m", "facebook/esm2_t33_650M_UR50D", 1280, 651_042_593),
    ("esm2_3b", "facebook/esm2_t36_3B_UR50D", 2560, 2_839_004_193),
    ("esm2_15b", "facebook/esm2_t48_15B_UR50D", 5120, 15_129_098_273),
]
ESMC = [
    ("esmc_300m", "biohub/ESMC-300M", 960, 332_997_184),
    ("esmc_600m", "biohub/ESMC-600M", 1152, 575_036_992),
    ("esmc_6b", "biohub/ESMC-6B", 2560, 6_352_005_184),
]


@hookimpl
def mgen_backbones() -> Iterable[BackboneCard]:
    for name, hub_id, width, parameters in ESM2:
        yield BackboneCard(
            name,
            "ESM2, a language model of proteins",
            modality="protein",
            load=load_esm2,
            width=width,
            max_tokens=1024,  # what it was trained on; --max-length N goes beyond
            licence="MIT",
            weights=(hub_id,),
            parameters=parameters,
        )
    for name, hub_id, width, parameters in ESMC:
        yield BackboneCard(
            name,
            "ESM C, a language model of proteins",
            modality="protein",
            load=load_esmc,
            width=width,
            max_tokens=2048,
            licence="MIT",
            weights=(hub_id,),
            parameters=parameters,
        )
    yield BackboneCard(
        "huggingface",
        "any encoder that transformers knows: --weights DIR_OR_HUB_ID",
        modality="any",
        licence="as the weights",
        load=load_auto,
        weights_required=True,
        options=AutoOptions,
    )
