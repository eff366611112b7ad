"""Options of these backbones (`--option KEY=VALUE`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgen_core import BackboneOptions


@dataclass(frozen=True)
class TokenOptions(BackboneOptions):
    """`tokens`: read sequences as people write them, or exactly as ModelGenerator reads them.

    `pads`: compute padding too, for heads whose numbers depend on it there by mistake.
    """

    tokens: Literal["clean", "reference"] = "clean"
    pads: bool = False


@dataclass(frozen=True)
class EncoderOptions(TokenOptions):
    """`fuse`: QKV, and gate and up, as one matrix each.

    Off, since CPUs gain nothing by it, and a matrix joined from a mapped file is a copy in memory.
    """

    fuse: bool = False
