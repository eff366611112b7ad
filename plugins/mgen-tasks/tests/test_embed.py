"""Pools run over residues alone; all of them come from one forward pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mgen_tasks.embed import Embed
from mgen_tasks.plugin import EmbedOptions, mgen_tasks

from mgen_core import Activations, Backbone, BackboneCard, BackboneOptions, MgenError

CARD = mgen_tasks()[0]


def task(cls_position=0, depth=3, **options):
    card = BackboneCard("b", "", "protein", load=Backbone, width=5)
    backbone = Backbone(card, BackboneOptions())
    backbone.depth, backbone.cls_position = depth, cls_position
    return Embed(CARD, EmbedOptions(**options), backbone)


def activations(lengths, layers=(3,), width=5):
    """[CLS] residues [SEP] padding, where everything that is no residue is NaN but [CLS]."""
    longest = max(lengths) + 2
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 1 : 1 + length] = True
    generator = torch.Generator().manual_seed(0)
    hidden = {n: torch.randn(*mask.shape, width, generator=generator) for n in layers}
    for value in hidden.values():
        value[~mask] = float("nan")
        value[:, 0] = 7
    return Activations(hidden, mask)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_special_tokens_and_padding_never_enter(lengths):
    found = activations(lengths)
    columns = task(pool=("mean", "max", "cls", "tokens")).columns(found, [])
    for row, length in enumerate(lengths):
        residues = found.layer(3)[row, 1 : 1 + length]
        torch.testing.assert_close(columns["embedding_mean_-1"][row], residues.mean(0))
        assert torch.equal(columns["embedding_max_-1"][row], residues.amax(0))
        assert torch.equal(columns["embedding_cls_-1"][row], torch.full((5,), 7.0))
    tokens = columns["embedding_tokens_-1"]
    assert list(tokens.lengths) == lengths and len(tokens.values) == sum(lengths)
    assert not tokens.values.isnan().any()


def test_layers_count_from_both_ends_and_columns_keep_the_users_number():
    chosen = task(layers=(-1, 0, 3, -2))
    assert chosen.needs.layers == (0, 2, 3)
    columns = chosen.columns(activations([2], layers=(0, 2, 3)), [])
    assert set(columns) == {f"embedding_mean_{n}" for n in (-1, 0, 3, -2)}
    assert torch.equal(columns["embedding_mean_-1"], columns["embedding_mean_3"])


def test_one_pool_of_one_layer_is_called_embedding():
    assert set(task().columns(activations([2]), [])) == {"embedding"}


def test_a_sum_of_many_bfloat16_keeps_its_digits():
    hidden = torch.ones(1, 4000, 5, dtype=torch.bfloat16)
    found = Activations(hidden, torch.ones(1, 4000, dtype=torch.bool))
    assert torch.equal(task().columns(found, [])["embedding"], torch.ones(1, 5))


def test_what_is_not_there_is_refused():
    with pytest.raises(MgenError, match="no CLS token"):
        task(cls_position=None, pool=("cls",))
    with pytest.raises(MgenError, match="no layer 4"):
        task(layers=(4,))


def test_the_estimate_counts_every_number():
    chosen = task(pool=("mean", "tokens"), layers=(0, -1))
    assert chosen.values(rows=3, tokens=40) == (3 + 40) * 2 * 5
