"""Cards of GenBio's sequence models: facts only, nothing heavy is imported here.

What only a model's own config.json knows is left out of its card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mgen_core import Backbone, BackboneCard, hookimpl

from .options import EncoderOptions, TokenOptions

GENBIO = "GenBio AI Community License (see the model card)"
OURS = "Apache-2.0"
MILLION, BILLION = 10**6, 10**9


def load_rnabert(card: BackboneCard, options: EncoderOptions) -> Backbone:
    """AIDO.RNA and AIDO.DNA."""
    from .backbone import EncoderBackbone
    from .families import RNABERT

    return EncoderBackbone(card, options, RNABERT)


def load_fm4bio(card: BackboneCard, options: EncoderOptions) -> Backbone:
    """AIDO.Protein."""
    from .backbone import EncoderBackbone
    from .families import FM4BIO

    return EncoderBackbone(card, options, FM4BIO)


def load_rag(card: BackboneCard, options: EncoderOptions) -> Backbone:
    """AIDO.Protein-RAG."""
    from .rag import RagBackbone

    return RagBackbone(card, options)


def load_onehot(card: BackboneCard, options: TokenOptions) -> Backbone:
    """One-hot letters."""
    from .onehot import OneHot

    return OneHot(card, options)


def _rna(name: str, model: str, summary: str, width: int | None, parameters: int) -> BackboneCard:
    return BackboneCard(
        name=name,
        summary=summary,
        modality="rna",
        load=load_rnabert,
        width=width,
        max_tokens=1024 if width else None,
        licence=GENBIO,
        # The organisation renamed AIDO.RNA to GB.RNA: either name may answer.
        weights=(f"genbio-ai/AIDO.RNA-{model}", f"genbio-ai/GB.RNA-{model}"),
        parameters=parameters,
        options=EncoderOptions,
    )


def _dna(name: str, model: str, summary: str, width: int, parameters: int) -> BackboneCard:
    return BackboneCard(
        name=name,
        summary=summary,
        modality="dna",
        load=load_rnabert,
        width=width,
        max_tokens=4000,
        licence=GENBIO,
        weights=(f"genbio-ai/AIDO.DNA-{model}",),
        parameters=parameters,
        options=EncoderOptions,
    )


def _protein(name: str, model: str, summary: str, max_tokens: int | None = None) -> BackboneCard:
    return BackboneCard(
        name=name,
        summary=summary,
        modality="protein",
        load=load_fm4bio,
        width=2304,
        max_tokens=max_tokens,
        licence=GENBIO,
        weights=(f"genbio-ai/AIDO.{model}",),
        parameters=16 * BILLION,
        options=EncoderOptions,
    )


def _seeded(name: str, modality: str, summary: str, width: int) -> BackboneCard:
    return BackboneCard(
        name=name,
        summary=f"{summary}, random weights",
        modality=modality,
        load=load_fm4bio if modality == "protein" else load_rnabert,
        width=width,
        licence=OURS,
        options=EncoderOptions,
    )


def _onehot(name: str, modality: str, width: int) -> BackboneCard:
    return BackboneCard(
        name=name,
        summary="One-hot letters, a baseline without a model",
        modality=modality,
        load=load_onehot,
        width=width,
        max_tokens=512,
        licence=OURS,
        parameters=0,
        options=TokenOptions,
    )


def _rag(card: BackboneCard) -> BackboneCard:
    return replace(card, load=load_rag, takes=("msa", "str_emb"))


CARDS = (
    _rna("aido_rna_1m_mars", "1M-MARS", "RNA encoder", 128, MILLION),
    _rna("aido_rna_25m_mars", "25M-MARS", "RNA encoder", 512, 25 * MILLION),
    _rna("aido_rna_300m_mars", "300M-MARS", "RNA encoder", None, 300 * MILLION),
    _rna("aido_rna_650m", "650M", "RNA encoder", 1280, 650 * MILLION),
    _rna("aido_rna_650m_cds", "650M-CDS", "Coding RNA encoder", 1280, 650 * MILLION),
    _rna("aido_rna_1b600m", "1.6B", "RNA encoder", 2048, 1600 * MILLION),
    _rna("aido_rna_1b600m_cds", "1.6B-CDS", "Coding RNA encoder", 2048, 1600 * MILLION),
    _dna("aido_dna_300m", "300M", "DNA encoder", 1024, 300 * MILLION),
    _dna("aido_dna_7b", "7B", "DNA encoder", 4352, 7 * BILLION),
    _protein("aido_protein_16b", "Protein-16B", "Protein encoder, 8 experts", 2048),
    _protein("aido_protein_16b_v1", "Protein-16B-v1", "Protein encoder, 8 experts", 2048),
    _protein(
        "aido_protein2structoken_16b",
        "Protein2StructureToken-16B",
        "Structure tokens of a protein, 8 experts",
    ),
    _rag(
        _protein(
            "aido_protein_rag_16b",
            "Protein-RAG-16B",
            "Protein encoder with alignment and structure, 8 experts",
        )
    ),
    replace(
        _rag(
            _protein(
                "aido_protein_rag_3b",
                "Protein-RAG-3B",
                "Protein encoder with alignment and structure",
            )
        ),
        width=None,
        parameters=3 * BILLION,
    ),
    _seeded("aido_dna_debug", "dna", "DNA encoder of the smallest size", 64),
    _seeded("aido_dna_dummy", "dna", "Tiny DNA encoder for tests", 32),
    _seeded("aido_protein_debug", "protein", "Protein encoder of the smallest size", 64),
    _seeded("aido_protein_dummy", "protein", "Tiny protein encoder of 4 experts for tests", 32),
    _onehot("dna_onehot", "dna", 16),
    _onehot("protein_onehot", "protein", 44),
)


@hookimpl
def mgen_backbones() -> Sequence[BackboneCard]:
    """Every sequence backbone that ModelGenerator names."""
    return CARDS
