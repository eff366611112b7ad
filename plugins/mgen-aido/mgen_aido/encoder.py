"""The encoder that GenBio's sequence models share, on packed tokens.

Shapes: T tokens of all rows end to end, H width, A heads of d features, I inner width, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mgen_core import Inputs
from mgen_core.attention import mix
from mgen_core.dense import FUNCTIONS, activated
from mgen_core.packed import unpack
from mgen_core.rotary import Rotation, frequencies, rotate, rotation

from .config import Config
from .experts import ACTS, Experts

THETA = 10_000.0


class Form(NamedTuple):
    """How to compute, where the numbers allow a choice.

    - `fuse`: QKV, and gate and up, as one matrix each.
    - `eager`: attention step by step instead of fused: the reference's bits.
    - `head`: whether logits are wanted.
    """

    fuse: bool = False
    eager: bool = False
    head: bool = False


def norm(config: Config) -> nn.Module:
    """The norm that the config names."""
    kind: Callable[..., nn.Module] = nn.RMSNorm if config.rms else nn.LayerNorm
    return kind(config.width, eps=config.eps)


class Attention(nn.Module):
    """Every token attends to every token of its own row."""

    def __init__(self, config: Config, form: Form) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        if form.fuse:
            self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        else:
            self.query = nn.Linear(width, width, bias=config.bias)
            self.key = nn.Linear(width, width, bias=config.bias)
            self.value = nn.Linear(width, width, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)
        self.fuse = form.fuse
        self.eager, self.turns = form.eager, config.turning > 0

    def forward(self, x: Tensor, turn: Rotation | None, inputs: Inputs) -> Tensor:
        """(T, H) to (T, H)."""
        qkv = self.project(x, turn)
        steps, spans = self.eager, inputs["spans"]
        mixed = mix_eagerly(*qkv, inputs, self.turns) if steps else mix(*qkv, spans)
        return cast(Tensor, self.output(mixed.flatten(1)))

    def project(self, x: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (T, A, d), turned."""
        if self.fuse:
            heads = self.qkv(x).view(len(x), 3 * self.heads, -1)
            if turn is not None:
                rotate(heads[:, : 2 * self.heads], turn)
            query, key, value = heads.chunk(3, dim=1)
            return query, key, value
        query, key, value = (
            layer(x).view(len(x), self.heads, -1) for layer in (self.query, self.key, self.value)
        )
        if turn is not None:
            rotate(query, turn)
            rotate(key, turn)
        return query, key, value


def mix_eagerly(query: Tensor, key: Tensor, value: Tensor, inputs: Inputs, turned: bool) -> Tensor:
    """The same, padded, in the steps of the reference: its very bits, for more time and memory."""
    shape, slots = inputs["mask"].shape, inputs["slots"]
    real = inputs["real"]
    q, k, v = (
        unpack(heads.flatten(1), slots, *shape).view(*shape, heads.shape[1], -1).transpose(1, 2)
        for heads in (query, key, value)
    )
    if turned:  # the layout decides which kernel multiplies, and so the last bit
        k = k.contiguous()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    barred = ~(real[:, None, :, None] & real[:, None, None])
    shares = scores.masked_fill_(barred, torch.finfo(scores.dtype).min).softmax(-1)
    padded = (shares.masked_fill_(barred, 0) @ v).transpose(1, 2).flatten(0, 1)
    return cast(Tensor, padded if slots is None else padded[slots])


class GatedMLP(nn.Module):
    """down(up(x) * act(gate(x))); `up_gate` is both projections in one, the gate second."""

    def __init__(self, config: Config, form: Form) -> None:
        super().__init__()
        # fm4bio publishes both projections as one: there is nothing to fuse.
        self.fuse = form.fuse or "mlp.up" not in config.family.projections
        if self.fuse:
            self.up_gate = nn.Linear(config.width, 2 * config.inner, bias=config.bias)
        else:
            self.up = nn.Linear(config.width, config.inner, bias=config.bias)
            self.gate = nn.Linear(config.width, config.inner, bias=config.bias)
        self.down = nn.Linear(config.inner, config.width, bias=config.bias)
        self.act = ACTS[config.act]

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) to (T, H)."""
        if self.fuse:
            up, gate = self.up_gate(x).chunk(2, dim=-1)
            gate = FUNCTIONS[self.act](gate)
        else:
            up, gate = self.up(x), activated(self.gate, x, self.act)
        return cast(Tensor, self.down(gate.mul_(up)))


class Block(nn.Module):
    """One layer: attention, then MLP or experts."""

    def __init__(self, config: Config, form: Form) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config, form)
        self.mlp_norm = norm(config)
        self.mlp = Experts(config) if config.experts else GatedMLP(config, form)
        self.post_norm = config.post_norm
        self.skip = (2 * config.depth) ** 0.5 if config.post_norm else 1.0

    def forward(self, x: Tensor, turn: Rotation | None, inputs: Inputs) -> Tensor:
        """(T, H) to (T, H)."""
        y = self.attention_norm(x)
        x = self.attention(y, turn, inputs).add_(y if self.post_norm else x, alpha=self.skip)
        y = self.mlp_norm(x)
        return cast(Tensor, self.mlp(y).add_(y if self.post_norm else x, alpha=self.skip))


class Embeddings(nn.Module):
    """Token ids to vectors, with what the config adds to them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "absolute":
            self.positions = nn.Embedding(config.max_positions, config.width)
        if config.structure:
            self.structure = nn.Linear(config.structure, config.width, bias=False)
        self.absolute = config.positions == "absolute"

    def forward(self, inputs: Inputs) -> Tensor:
        """(T, H)."""
        x: Tensor = self.words(inputs["tokens"])
        if self.absolute:
            x = x + self.positions(inputs["positions"])
        if "structure" in inputs:
            numbers, places = inputs["structure"]["numbers"], inputs["structure"]["places"]
            x = x.index_add(0, places, self.structure(numbers.to(x.dtype)))
        return x


class LMHead(nn.Module):
    """The masked-language head. Its decoder has its own parameter, tied weights or not."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = norm(config)
        self.decoder = nn.Linear(config.width, config.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) to (T, V)."""
        return cast(Tensor, self.decoder(self.norm(activated(self.dense, x, "gelu"))))


class Encoder(nn.Module):
    """Embeddings, blocks, final norm and, where logits are wanted, a head."""

    def __init__(self, config: Config, form: Form) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, form) for _ in range(config.depth))
        self.norm = norm(config)
        self.head: nn.Module | None = None
        if form.head and config.lm_head:
            self.head = LMHead(config)
        elif form.head:
            self.head = nn.Linear(config.width, config.outputs, bias=False)
        self.turning, self.size = config.turning, config.width // config.heads

    def forward(
        self, inputs: Inputs, layers: Collection[int], logits: bool
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """The wanted hidden states (K, H) and logits (K, V) at the tokens of `inputs["keep"]`."""
        depth = len(self.blocks)
        last = depth if logits else max(layers, default=0)
        keep = inputs.get("keep", slice(None))
        x = self.embeddings(inputs)
        turn = None
        if self.turning:
            speeds = frequencies(self.turning, THETA, x.device)
            turn = rotation(inputs["positions"], speeds, self.size, x.dtype)
        hidden: dict[int, Tensor] = {}
        for number, block in enumerate(islice(self.blocks, last)):
            if number in layers:
                hidden[number] = x[keep]
            x = block(x, turn, inputs)
        x = (self.norm(x) if last == depth else x)[keep]
        if last in layers:
            hidden[last] = x
        return hidden, self.head(x) if logits and self.head is not None else None
