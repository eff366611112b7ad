"""ESM C (ESM Cambrian), from the files published on the hub in the transformers layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgen_core import WeightsError
from mgen_core.dense import activated
from mgen_core.packed import Spans
from mgen_core.rotary import Rotation

from .esm import LETTERS, SPECIAL, Encoder, EsmBackbone, EsmConfig, Rotary, attend

VOCABULARY = 64

# Names here -> published names, below `layers.N`.
LAYER = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

DEPTHS = {960: 30, 1152: 36, 2560: 80}
ACCEPTED = {
    "model_type": ("esmc",),
    "vocab_size": (VOCABULARY, None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_theta": (10_000.0, None),  # if not in rope_parameters
}


@dataclass(frozen=True)
class EsmCConfig(EsmConfig):
    rope_parameters: Mapping[str, Any] | None = None

    accepted = ACCEPTED

    @property
    def theta(self) -> float:
        """Raises `WeightsError` for positions other than the plain rotary ones."""
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") != "default":
            raise WeightsError(
                f"config.json asks for rotary positions of type {rope['rope_type']!r}",
                "try --backbone huggingface, which takes any encoder that transformers knows",
            )
        return float(rope.get("rope_theta", 10_000.0))


class EsmCLayer(nn.Module):
    def __init__(self, config: EsmCConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.part = 1 / math.sqrt(config.num_hidden_layers / 36)  # of what a block adds
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.query_norm = nn.LayerNorm(width, bias=False)
        self.key_norm = nn.LayerNorm(width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, turn: Rotation, spans: Spans) -> Tensor:
        """(T, H) to (T, H)."""
        x = self.attention_norm(hidden)
        qkv = self.query_norm(self.query(x)), self.key_norm(self.key(x)), self.value(x)
        mixed = self.output(attend(qkv, self.heads, turn, spans))
        hidden = torch.add(hidden, mixed, alpha=self.part)
        x = self.ffn_norm(hidden)
        inner = activated(self.gate, x, "silu").mul_(self.up(x))
        return torch.add(hidden, self.down(inner), alpha=self.part)


class EsmCHead(nn.Module):
    """Hidden state to logits."""

    def __init__(self, config: EsmCConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, VOCABULARY)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.layer_norm(activated(self.dense, hidden, "gelu")))
        return logits


class EsmCEncoder(Encoder):
    def __init__(self, config: EsmCConfig, *, logits: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, config.hidden_size)
        self.rotary = Rotary(config.hidden_size // config.num_attention_heads, config.theta)
        self.layers = nn.ModuleList(EsmCLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.head = EsmCHead(config) if logits else None


class EsmC(EsmBackbone):
    config: EsmCConfig
    kind = EsmCConfig
    depths = DEPTHS
    # 33 tokens; the embedding is padded to a round number.
    vocabulary = (
        *(*SPECIAL, *LETTERS, ".", "-", "|", "<mask>"),
        *(f"<spare_{number}>" for number in range(33, VOCABULARY)),
    )
    units = ("EsmCLayer",)
    ignored = (r"(lm_head|classifier)\..*",)

    def build(self) -> nn.Module:
        return EsmCEncoder(self.config, logits=self.want.logits)

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        if name == "rotary.inv_freq":
            return ()  # not in the files
        prefix = "esmc." if "esmc.embed_tokens.weight" in keys else ""
        if name.startswith("head."):
            return ("lm_head" + name.removeprefix("head"),)
        if name.startswith("layers."):
            _, number, part, kind = name.split(".")
            return (f"{prefix}layers.{number}.{LAYER[part]}.{kind}",)
        return (prefix + name.replace("embed.", "embed_tokens."),)
