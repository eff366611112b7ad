"""Any encoder that transformers knows, built from its config.json; its code is never fetched."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mgen_core import (
    Activations,
    Backbone,
    BackboneCard,
    Inputs,
    PluginError,
    Row,
    RowError,
    Want,
    WeightsError,
)

from .plugin import AutoOptions
from .tokens import Tokens

# Keys of config.json that choose what code runs, not what it computes.
CODE = re.compile("_.*|auto_map|attn_implementation|experts_implementation")

STOP = "*"  # ends a translated gene; most models have no token for it

# Families in which a row's numbers depend on its neighbours: padding leaks in, or randomness.
UNSTEADY = ("convbert", "fnet", "nystromformer", "yoso")

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
RENAMED = re.compile("|".join(OLD_NAMES))


class AutoEncoder(Backbone):
    """A tokenizer and a model as a folder describes them."""

    def __init__(self, card: BackboneCard, options: AutoOptions) -> None:
        super().__init__(card, options)
        if options.weights is None:
            raise WeightsError(
                "the huggingface backbone has no weights of its own",
                "give --weights DIR_OR_HUB_ID of a model that transformers knows",
            )
        folder = options.weights if options.weights.is_dir() else options.weights.parent
        self.config = model_config(options.config())
        self.depth: int = self.config.num_hidden_layers
        self.tokens = Tokens(folder, self.config.vocab_size)
        self.cls_position = 0 if self.tokens.starts_with_special() else None
        if type(self.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            self.vocabulary = self.tokens.names
        auto = options.spaces == "auto"
        self.spaces = self.tokens.wants_spaces() if auto else bool(options.spaces)
        auto = options.upper == "auto"
        self.upper = self.tokens.lacks_lower_case() if auto else bool(options.upper)
        self.drops_stop = not self.tokens.knows(STOP)
        self._examine()

    def _examine(self) -> None:
        """Complete the card and the contract from a model that takes no memory."""
        with torch.device("meta"):
            model = encoder(self.config)
        self.max_positions = positions(model, self.config)
        width, longest = self.config.hidden_size, self.max_positions
        self.card = replace(self.card, width=width, max_tokens=longest)
        self.units = blocks(model, self.depth)
        self.prefix: str = model.base_model_prefix
        inside = "|".join(name for name, _ in model.named_children())
        self.ignored = (
            # What is outside the encoder is some head; a layer too many inside is a mistake.
            rf"(?!({self.prefix}\.)?({inside})\.).*",
            r".*\.position_ids",
            r".*\binv_freq",
            *(f".*({known}).*" for known in model._keys_to_ignore_on_load_unexpected or ()),
        )

    # -- without weights -------------------------------------------------------------------

    def prepare(self, row: Row) -> Row:
        if not isinstance(row.data, str):
            kind = "no sequence" if row.data is None else f"not a sequence: {row.data!r:.40}"
            raise RowError(kind)
        text = "".join(row.data.split()) if self.spaces else row.data.strip()
        text = text.upper() if self.upper else text
        if self.drops_stop:
            text = text.removesuffix(STOP)
        if not text:
            raise RowError("empty sequence")
        if self.tokens.unknown in self._ids(text):
            for position, letter in enumerate(text, start=1):
                if not self.tokens.knows(letter):
                    raise RowError(f"illegal character {letter!r} at position {position}")
            raise RowError("letters in an order that the tokenizer does not know")
        return row.with_data(text)

    def note(self, row: Row, prepared: Row) -> str | None:
        dropped = row.data.rstrip().endswith(STOP) and not prepared.data.endswith(STOP)
        return f"trailing {STOP!r} dropped" if dropped else None

    def measure(self, row: Row) -> int:
        return len(self._ids(row.data))

    def truncate(self, row: Row, tokens: int) -> Row:
        def measured(letters: int) -> int:
            return len(self._ids(row.data[:letters]))

        letters = bisect_right(range(len(row.data) + 1), tokens, key=measured) - 1
        while letters > 0 and measured(letters) > tokens:  # a longer text may have fewer tokens
            letters -= 1
        return row.with_data(row.data[: max(letters, 0)])

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """`model`: what the tokenizer makes, each (B, L); `residues` (B, L) bool."""
        batch = self.tokens.batch([self._text(row.data) for row in rows])
        return {"model": batch, "residues": self.tokens.residues(batch)}

    def _text(self, letters: str) -> str:
        return " ".join(letters) if self.spaces else letters

    def _ids(self, letters: str) -> list[int]:
        return self.tokens.ids(self._text(letters))

    # -- with weights ----------------------------------------------------------------------

    def build(self) -> nn.Module:
        masked = transformers.AutoModelForMaskedLM
        module: nn.Module = (
            from_config(masked, self.config) if self.want.logits else encoder(self.config)
        )
        self._buffers = {name for name, _ in module.named_buffers()}
        return module

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        """The key of the same name, a prefix more or less, or as old files called it."""
        names = [name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")]
        names += [RENAMED.sub(lambda part: OLD_NAMES[part[0]], name) for name in names]
        found = [name for name in names if name in keys]
        if name.endswith("rotary_embeddings.inv_freq"):  # once each layer of ESM2 had its own
            found = [key for key in keys if key.endswith("rotary_embeddings.inv_freq")]
        if not found and name not in self._buffers:
            return (name,)
        return found[:1]

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        # Of a masked-language model, the hidden states are the only way to the last layer.
        last_alone = set(want.layers) <= {self.depth} and not want.logits
        output = module(
            **inputs["model"], output_hidden_states=bool(want.layers) and not last_alone
        )
        hidden: dict[int, Tensor] = {}
        if want.layers and last_alone:
            hidden = {self.depth: output.last_hidden_state}
        elif want.layers:
            self._check_states(module, len(output.hidden_states))
            hidden = {layer: output.hidden_states[layer] for layer in want.layers}
        logits = output.logits if want.logits else None
        tokens = inputs["model"]["attention_mask"].bool()
        return Activations(hidden, inputs["residues"], logits, tokens)

    def _check_states(self, module: nn.Module, states: int) -> None:
        if states != self.depth + 1:
            raise PluginError(
                f"{type(module).__name__} gives {states} hidden states, not {self.depth + 1}",
                "ask for the last layer only: --layers -1",
            )


def model_config(found: Mapping[str, Any]) -> Any:
    """The transformers config of a config.json. Raises `WeightsError` for an unfit model."""
    kind = found.get("model_type")
    if "quantization_config" in found:
        raise WeightsError("these weights are quantized", "take the unquantized ones")
    settings = {k: v for k, v in found.items() if not CODE.fullmatch(k) and k != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(str(kind), **settings)
    except Exception as error:  # each kind of config checks itself in its own way
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"transformers {transformers.__version__} has no model of type {kind!r}, "
            f"or not with these settings: {reason}",
            "it brings Python code of its own, which mgen never runs; write a plugin for it"
            if "auto_map" in found
            else "a newer transformers may know it",
        ) from error
    # BigBird's sparse attention gives way to the full one for good after the first short batch.
    if kind in UNSTEADY or getattr(config, "attention_type", None) == "block_sparse":
        raise WeightsError(
            f"in a model of type {kind!r} a row's numbers depend on the other rows of its batch",
            "take another model (for BigBird, set attention_type to original_full in config.json)",
        )
    return config


def encoder(config: Any) -> Any:
    """The model without a head and without weights. Raises `WeightsError` where there is none."""
    half = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # T5's encoder, not T5
    if config.is_encoder_decoder and not half:
        raise WeightsError(
            f"a model of type {config.model_type!r} is an encoder and a decoder",
            "take an encoder; of this family transformers has none",
        )
    auto = transformers.AutoModelForTextEncoding if half else transformers.AutoModel
    model = from_config(auto, config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # published masked-language models come without its weights
    return model


def from_config(auto: Any, config: Any) -> Any:
    # Of a copy, since a model may write into its config.
    return auto.from_config(deepcopy(config), dtype=torch.float32, trust_remote_code=False)


def positions(model: nn.Module, config: Any) -> int | None:
    """Tokens that fit a table of absolute positions; None where the model has no such table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # RoBERTa and its kin count positions from behind the padding token's.
            start = 0 if module.padding_idx is None else module.padding_idx + 1
            rows = module.num_embeddings - start
            return min(rows, getattr(config, "max_position_embeddings", rows))
    return None


def blocks(model: nn.Module, depth: int) -> tuple[str, ...]:
    """The class of the blocks: of a list as long as the model is deep."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return tuple(sorted({type(block).__name__ for found in lists for block in found}))
