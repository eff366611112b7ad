"""Properties of the encoders that hold for any weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_aido import plugin
from mgen_aido.backbone import EncoderBackbone
from mgen_aido.config import parse
from mgen_aido.experts import Experts
from mgen_aido.families import FM4BIO, RNABERT
from mgen_aido.geometry import GEOMETRY
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mgen_core import Row, Want, WeightsError
from mgen_core.catalog import Catalog
from mgen_core.checkpoint import open_checkpoint
from mgen_core.testing import check_backbone, check_card, check_light

CATALOG = Catalog.of(plugin)
CARDS = {card.name: card for card in plugin.CARDS}
NUCLEOTIDES = ["ACGTN", "GATTACAGATTACA", "A", "CCGGT"]
RESIDUES = ["MKVLA", "GATTACAGHHKLMN", "W", "CCGGY"]
MIXTURE = {"moe": True, "num_experts": 5, "experts_per_token": 2, "use_lm_head": False}
CONFIGS = [
    ("rnabert", {}),
    ("rnabert", {"normalization_type": "LayerNorm", "add_linear_bias": False}),
    ("rnabert", {"position_embedding_type": "absolute", "tie_word_embeddings": False}),
    ("rnabert", {"rotary_percent": 0.5}),
    ("fm4bio", {"hidden_act": "geglu", "apply_residual_connection_post_layernorm": True}),
    ("fm4bio", {**MIXTURE, "tie_word_embeddings": False, "output_vocab_size": 50}),
    ("fm4bio", {**MIXTURE, "add_linear_bias": False}),
]
CARD_OF = {"rnabert": "aido_dna_dummy", "fm4bio": "aido_protein_dummy"}


def test_the_cards_are_those_of_the_reference() -> None:
    for card in plugin.CARDS:
        check_card(card)
    check_light(plugin.CARDS[0])
    assert len(CARDS) == len(plugin.CARDS) == 20
    rna = [card for card in plugin.CARDS if card.modality == "rna"]
    assert all(weights.startswith("genbio-ai/") for card in rna for weights in card.weights)
    assert {len(card.weights) for card in rna} == {2}


@pytest.mark.parametrize("name", sorted(GEOMETRY))
def test_a_card_says_what_its_sizes_say(name: str) -> None:
    card = CARDS[name]
    backbone = card.load(card, card.options())
    assert isinstance(backbone, EncoderBackbone)
    assert backbone.known.width == card.width
    if card.weights:
        assert backbone.known.max_positions == card.max_tokens


def test_sizes_that_only_the_weights_know() -> None:
    card = CARDS["aido_rna_300m_mars"]
    backbone = card.load(card, card.options())
    assert backbone.depth is None
    assert backbone.measure(backbone.prepare(Row(0, "", "acgu"))) == 6
    with pytest.raises(WeightsError, match="in the config"):
        backbone.build()


@pytest.mark.parametrize(
    "name",
    [card.name for card in plugin.CARDS if not card.weights] + ["aido_rna_1m_mars"],
)
@pytest.mark.parametrize("tokens", ["clean", "reference"])
def test_a_row_does_not_depend_on_its_neighbours(name: str, tokens: str) -> None:
    check_backbone(name, catalog=CATALOG, options={"tokens": tokens})


@pytest.mark.parametrize(("model_type", "fields"), CONFIGS)
def test_nor_with_any_other_config(
    model_type: str, fields: dict[str, Any], published: Callable[..., Path]
) -> None:
    check_backbone(CARD_OF[model_type], catalog=CATALOG, weights=published(model_type, **fields))


@pytest.mark.parametrize(("model_type", "fields"), CONFIGS)
@pytest.mark.parametrize("tokens", ["clean", "reference"])
def test_fused_and_plain_agree(
    model_type: str,
    fields: dict[str, Any],
    tokens: str,
    published: Callable[..., Path],
    open_model: Any,
    rows: Any,
) -> None:
    weights = published(model_type, **fields)
    batch = rows(*(NUCLEOTIDES if model_type == "rnabert" else RESIDUES))
    plain, fused = (
        open_model(CARD_OF[model_type], weights, tokens=tokens, fuse=fuse)(batch)
        for fuse in (False, True)
    )
    for number, hidden in plain.hidden.items():
        assert torch.allclose(hidden, fused.hidden[number], atol=1e-5), number
    assert torch.allclose(plain.logits, fused.logits, atol=1e-5)


@pytest.mark.parametrize("model_type", ["rnabert", "fm4bio"])
def test_only_what_is_wanted_is_built_and_run(
    model_type: str, published: Callable[..., Path], open_model: Any, rows: Any
) -> None:
    weights = published(model_type)
    batch = rows(*NUCLEOTIDES)
    everything = open_model(CARD_OF[model_type], weights)(batch)
    model = open_model(CARD_OF[model_type], weights, logits=False)
    assert not [name for name, _ in model.module.named_parameters() if "head" in name]
    ran: list[int] = []
    for number, block in enumerate(model.module.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    found = model(batch, Want((0, 2)))
    assert ran == [0, 1] and sorted(found.hidden) == [0, 2] and found.logits is None
    for number in (0, 2):
        assert torch.equal(found.hidden[number], everything.hidden[number])


def test_a_prefix_or_none(published: Callable[..., Path], open_model: Any, rows: Any) -> None:
    weights = published("rnabert")
    expected = open_model("aido_dna_dummy", weights, logits=False)(rows(*NUCLEOTIDES))
    tensors = load_file(weights / "model.safetensors")
    bare = {k.removeprefix("bert."): v.clone() for k, v in tensors.items() if "cls" not in k}
    # A table that old files hold and nobody needs.
    bare["encoder.layer.0.attention.self.rotary_pos_emb.inv_freq"] = torch.ones(4)
    save_file(bare, weights / "model.safetensors")
    found = open_model("aido_dna_dummy", weights, logits=False)(rows(*NUCLEOTIDES))
    assert torch.equal(found.layer(3), expected.layer(3))


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("rnabert", "hidden_act", "geglu"),
        ("rnabert", "hidden_act", "gelu"),
        ("fm4bio", "hidden_act", "relu"),
        ("rnabert", "position_embedding_type", "relative_key"),
        ("fm4bio", "position_embedding_type", "rope_2d"),
        ("fm4bio", "normalization_type", "BatchNorm"),
        ("fm4bio", "is_decoder", True),
        ("fm4bio", "add_cross_attention", True),
        ("fm4bio", "num_attention_heads", 5),
        ("fm4bio", "rotary_percent", 0.01),
        ("fm4bio", "rotary_percent", "all"),
        ("fm4bio", "vocab_size", 40),
        ("rnabert", "vocab_size", 15),
        ("rnabert", "hidden_size", -8),
        ("rnabert", "num_hidden_layers", "many"),
        ("rnabert", "add_linear_bias", "yes"),
        ("rnabert", "layer_norm_eps", None),
        ("fm4bio", "str_embedding_in", "wide"),
        ("fm4bio", "model_type", "rnabert"),
        ("rnabert", "model_type", "esm"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(
    model_type: str, field: str, value: object
) -> None:
    family = {"rnabert": RNABERT, "fm4bio": FM4BIO}[model_type]
    with pytest.raises(WeightsError, match=f"{field} is {value!r}"):
        parse({"hidden_size": 32, "num_attention_heads": 4, field: value}, family)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_experts": 1, "experts_per_token": 1}, "num_experts"),
        ({"num_experts": 4, "experts_per_token": 0}, "experts_per_token"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token"),
    ],
)
def test_a_mixture_that_cannot_be_computed_is_refused(fields: dict[str, int], field: str) -> None:
    with pytest.raises(WeightsError, match=f"{field} is"):
        parse({"moe": True, **fields}, FM4BIO)


def test_weights_of_another_size_are_refused(
    published: Callable[..., Path], open_model: Any
) -> None:
    weights = published("rnabert")
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(WeightsError, match="another shape"):
        open_model("aido_dna_dummy", weights)


def test_absolute_positions_end(published: Callable[..., Path]) -> None:
    weights = published("rnabert", position_embedding_type="absolute", max_position_embeddings=20)
    card = CARDS["aido_rna_1m_mars"]
    backbone = card.load(card, card.options(weights=weights))
    assert backbone.max_positions == 20 and backbone.card.max_tokens == 20
    rotary = card.load(card, card.options(weights=published("rnabert", rotary_percent=0.5)))
    assert rotary.max_positions is None and rotary.card.max_tokens == 1024


# --------------------------------------------------------------------------- mixture of experts


def mixture(experts: int, chosen: int, bias: bool, width: int = 16, inner: int = 24) -> Experts:
    fields = {"num_experts": experts, "experts_per_token": chosen, "add_linear_bias": bias}
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": inner}
    module = Experts(parse({"moe": True, **fields, **sizes}, FM4BIO))
    generator = torch.Generator().manual_seed(experts)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        parameter.requires_grad_(False)
    return module


def one_by_one(module: Experts, x: torch.Tensor) -> torch.Tensor:
    """Each token through each of its experts, as the formula says."""
    rows = []
    for token in x:
        logits, experts = (module.router_weight @ token).topk(module.chosen)
        total = torch.zeros_like(token)
        for share, expert in zip(logits.softmax(0), experts):
            both = module.up_gate_weight[expert] @ token
            if module.up_gate_bias is not None:
                both = both + module.up_gate_bias[expert]
            up, gate = both.chunk(2)
            answer = module.down_weight[expert] @ (up * F.silu(gate))
            if module.down_bias is not None:
                answer = answer + module.down_bias[expert]
            total = total + share * answer
        rows.append(total)
    return torch.stack(rows)


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(2, 9),
    chosen=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_experts_equal_one_token_at_a_time(
    tokens: int, experts: int, chosen: int, bias: bool, seed: int
) -> None:
    module = mixture(experts, min(chosen, experts), bias)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(module(x), one_by_one(module, x), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_one_kernel_and_the_loop_over_experts_agree(bias: bool) -> None:
    # On a GPU the grouped kernel runs; it has a CPU form, which is what can be tested anywhere.
    module = mixture(6, 2, bias)
    x, shares = torch.randn(40, 16), torch.rand(40, 2)
    chosen = torch.randint(0, 5, (80,))  # nobody visits the last
    expert, order = chosen.sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(1, 7))
    looped = module.looped(x, shares, order, [0, *ends.tolist()])
    assert torch.allclose(module.grouped(x, shares, order, expert, ends), looped, atol=1e-5)


def test_the_router_stays_float32(published: Callable[..., Path], open_model: Any) -> None:
    weights = published("fm4bio", **MIXTURE)
    model = open_model("aido_protein_dummy", weights, dtype=torch.bfloat16)
    stored = open_checkpoint(weights)
    for name, parameter in model.module.named_parameters():
        if "router" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(
                parameter, stored.tensor(model.backbone.sources(name, stored.keys)[0])
            )
        else:
            assert parameter.dtype == torch.bfloat16
    # Experts 0 and 1 differ by less than bfloat16 can tell; the router must still choose 1.
    experts = mixture(2, 1, bias=False)
    experts.router_weight.data = torch.tensor([[1.0] * 16, [1.0 + 2**-12] * 16])
    narrow = experts.to(torch.bfloat16)
    narrow.router_weight.data = torch.tensor([[1.0] * 16, [1.0 + 2**-12] * 16])
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    up, gate = (narrow.up_gate_weight[1] @ x[0]).chunk(2)
    expected = narrow.down_weight[1] @ F.silu(gate).mul(up)
    assert torch.allclose(narrow(x)[0], expected, atol=0.05)


@pytest.mark.parametrize("name", ["aido_dna_dummy", "aido_protein_dummy"])
def test_bfloat16_is_near_float32(name: str, open_model: Any, rows: Any) -> None:
    batch = rows("GATTACA" * 50, "ACGT" * 9)
    wide, narrow = (
        open_model(name, dtype=dtype)(batch) for dtype in (torch.float32, torch.bfloat16)
    )
    difference = (wide.layer(2) - narrow.layer(2).float())[wide.mask]
    assert float(difference.norm() / wide.layer(2)[wide.mask].norm()) < 0.02
