"""What encoders share: attention over packed rows, rotary positions, linear layers on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mgen_core import attention, dense
from mgen_core.packed import pack, unpack
from mgen_core.rotary import frequencies, rotate, rotation


@pytest.fixture
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor where PyTorch by itself is slow; skips where PyTorch has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(dense, "onednn_wins", lambda dtype: dtype == torch.float32)
    with torch.inference_mode():
        yield


@given(rows=st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=6))
def test_rows_come_back_where_they_were(rows: list[bytes]) -> None:
    inputs = pack(rows)
    padded = unpack(inputs["tokens"][:, None], inputs["slots"], *inputs["mask"].shape)[..., 0]
    assert [bytes(line[seen].tolist()) for line, seen in zip(padded, inputs["mask"])] == rows
    assert not padded[~inputs["mask"]].any()


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_every_token_attends_to_its_own_row_alone(lengths: list[int]) -> None:
    torch.manual_seed(0)
    spans = pack([bytes(length) for length in lengths])["spans"]
    q, k, v = (torch.randn(sum(lengths), 3, 8) for _ in range(3))
    found = attention.mix(q, k, v, spans)
    start = 0
    for length in sorted(lengths, reverse=True):
        own = slice(start, start + length)
        shares = torch.einsum("qad,kad->aqk", q[own], k[own]).div(8**0.5).softmax(-1)
        expected = torch.einsum("aqk,kad->qad", shares, v[own])
        torch.testing.assert_close(found[own], expected, atol=1e-5, rtol=1e-5)
        start += length


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 5),
    length=st.integers(1, 40),
    tile=st.integers(1, 2000),
)
def test_attention_does_not_depend_on_its_tiles(
    rows: int, heads: int, length: int, tile: int
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, length, heads, 8).transpose(1, 2) for _ in range(3))
    before, attention.TILE = attention.TILE, tile
    try:
        found = attention.attend_in_tiles(q, k, v)
    finally:
        attention.TILE = before
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("turning", [4, 6, 8])
def test_pairs_of_features_turn_by_their_positions(parts: int, turning: int) -> None:
    torch.manual_seed(0)
    size = 8
    positions = torch.randint(0, 500, (parts, 5))
    speeds = frequencies(turning, 10_000.0)
    heads = torch.randn(5, 3, parts * size, dtype=torch.float64)
    found = heads.clone()
    rotate(found, rotation(positions, speeds, parts * size, torch.float64))
    half = turning // 2
    for part in range(parts):
        first = slice(part * size, part * size + half)
        second = slice(first.stop, first.stop + half)
        plane = torch.complex(heads[..., first], heads[..., second])
        angles = (positions[part, :, None].float() * speeds).double()[:, None]
        turned = plane * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(found[..., first], turned.real, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[..., second], turned.imag, atol=1e-6, rtol=0)
        rest = slice(second.stop, (part + 1) * size)
        assert torch.equal(found[..., rest], heads[..., rest])


@pytest.mark.parametrize("act", ["none", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (1, 24), (0, 24), (24,)], ids=str)
@pytest.mark.usefixtures("with_onednn")
def test_onednn_gives_what_pytorch_gives(
    shape: tuple[int, ...], bias: bool, act: dense.Act
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape)
    expected = dense.activated(layer, x, act)
    dense.quicken(layer)
    torch.testing.assert_close(dense.activated(layer, x, act), expected, atol=1e-5, rtol=1e-5)
    if act == "none":
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_quick_layer_can_still_be_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    dense.quicken(model)
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None
