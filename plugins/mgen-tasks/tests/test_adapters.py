"""Adapters: the reference's numbers from its own tensors, and rows that mind their own business."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_tasks import adapters
from mgen_tasks.adapters import ADAPTERS, activation, check_adapter, make_adapter, mirror
from safetensors.torch import load_file

from mgen_core import MgenError
from mgen_core.weights import parameters_on_meta

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "adapters"
INDEX = GOLDEN / "index.json"
CASES = json.loads(INDEX.read_text())["adapters"] if INDEX.exists() else {}
HIDDEN = {"hidden_sizes": [10, 6]}
SMALL = {"channels": 6, "num_blocks": 2}
ARGS = {
    "MLPAdapter.tanh": HIDDEN,
    "MLPAdapter.relu_nomiddledropout_nobias": {
        **HIDDEN,
        "activation_layer": {"class_path": "torch.nn.ReLU"},
        "bias": False,
        "dropout": 0.1,
        "dropout_in_middle": False,
    },
    "MLPPoolAdapter.mean": HIDDEN,
    "MLPPoolAdapter.mean_nomask": HIDDEN,
    "MLPPoolAdapter.cls": {**HIDDEN, "pooling": "cls_pooling"},
    "MLPAdapterWithoutOutConcat": HIDDEN,
    "MLPAdapter.on_outer_concat": HIDDEN,
    "ResNet1DAdapter.nomask": {**SMALL, "dropout": 0.2},
    "ResNet1DAdapter.boolmask_true_is_padding": SMALL,
    "ResNet2DAdapter": {"conv_channels": 7},
}
WIDTH = 16
OF_ROWS = [name for name, (_, gives) in ADAPTERS.items() if "rows" in gives]
OF_PAIRS = [name for name, (_, gives) in ADAPTERS.items() if "pairs" in gives]
OWN_ARGS = {
    "MLPPoolAdapter": HIDDEN,
    "MLPAdapter": HIDDEN,
    "MLPAdapterWithoutOutConcat": HIDDEN,
    "ResNet1DAdapter": SMALL,
    "ResNet2DAdapter": {"conv_channels": 7},
}


def adapter(name, **options):
    """One with random weights, 16 features a token and 3 outputs."""
    pair = name in OF_PAIRS and name != "MLPAdapterWithoutOutConcat"
    outputs = 1 if name == "ResNet2DAdapter" else 3
    made = make_adapter(
        name, OWN_ARGS.get(name, {}), WIDTH * (2 if pair else 1), outputs, **options
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return made.eval()


def batch(lengths, left_in_padding=float("nan")):
    """Hidden states of rows, and which of them are real."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(lengths), max(lengths), WIDTH, generator=generator)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    hidden[~real] = left_in_padding
    return hidden, real


def outer_concat(hidden):
    """(..., L, H) to (..., L, L, 2H): what the reference builds for pairs, and we never do."""
    place = torch.arange(hidden.shape[-2])
    low, high = torch.minimum(place[:, None], place), torch.maximum(place[:, None], place)
    return torch.stack([hidden[..., low, :], hidden[..., high, :]], dim=-1).flatten(-2)


# --------------------------------------------------------------------------- the reference


@pytest.mark.skipif(not CASES, reason="no golden data in ../shared/golden")
@pytest.mark.parametrize("case", CASES or ["none"])
@torch.inference_mode()
def test_the_references_numbers_from_its_own_tensors(case):
    inputs = load_file(GOLDEN / "inputs.safetensors")
    golden = load_file(GOLDEN / f"{case}.safetensors")
    hidden = inputs["hidden_states"]
    name, concat = case.split(".")[0], CASES[case]["input"] == "outer_concat"
    outputs = 1 if "ResNet" in name else 3
    with parameters_on_meta():
        made = make_adapter(
            name, ARGS.get(case, {}), WIDTH * (1 + concat), outputs, as_reference=True
        )
    weights = {key.removeprefix("weight/"): v for key, v in golden.items() if key != "output"}
    made.load_state_dict(weights, strict=True, assign=True)
    made.eval()
    if concat or name == "MLPAdapterWithoutOutConcat":
        found = torch.stack([mirror(made.triangle(row), len(row)) for row in hidden])
    elif "rows" in ADAPTERS[name][1]:
        found = made(hidden, inputs["attention_mask"].bool() if CASES[case]["mask"] else None)
    else:
        found = made(hidden)
    found = found.squeeze(-1) if outputs == 1 else found
    assert found.shape == golden["output"].shape
    # The last: as far from the truth (the same computed in float64) as the reference itself.
    tolerance = 2e-6 if name == "ResNet2DAdapter" else 1e-6
    assert float((found - golden["output"]).abs().max()) <= tolerance


@pytest.mark.skipif(not CASES, reason="no golden data in ../shared/golden")
def test_pairs_are_the_references():
    inputs = load_file(GOLDEN / "inputs.safetensors")
    assert torch.equal(outer_concat(inputs["hidden_states"]), inputs["outer_concat"])


# --------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", OF_ROWS)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
@torch.inference_mode()
def test_a_rows_numbers_are_its_own(name, lengths):
    made = adapter(name)
    hidden, real = batch(lengths)
    together = made(hidden, real)
    alone = torch.cat([made(row[None, :n]) for row, n in zip(hidden, lengths)])
    assert together.shape == (len(lengths), 3)
    assert float((together - alone).abs().max()) <= 1e-6


@torch.inference_mode()
def test_the_transformer_attends_within_a_row_and_over_the_batch_only_as_reference():
    hidden, real = batch([7, 7, 7])
    within, over = (adapter("LinearTransformerAdapter", as_reference=flag) for flag in (0, 1))
    # Seen from one side, the first tokens of a batch are a row.
    expected = over(hidden, real)[0]
    torch.testing.assert_close(within(hidden[:, :1].transpose(0, 1))[0], expected)
    assert not torch.allclose(within(hidden, real)[0], expected)


@torch.inference_mode()
def test_convolutions_of_a_row_without_padding_are_the_references():
    hidden, real = batch([7, 7])
    ours, theirs = (adapter("ResNet1DAdapter", as_reference=flag) for flag in (0, 1))
    torch.testing.assert_close(ours(hidden, real), theirs(hidden, real))
    hidden, real = batch([7, 4], left_in_padding=1.0)
    assert not torch.allclose(ours(hidden, real)[1], theirs(hidden, real)[1])


# --------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("name", ["LinearAdapter", "MLPAdapter", "MLPAdapterWithoutOutConcat"])
@pytest.mark.parametrize("length", [1, 2, 9])
@torch.inference_mode()
def test_pairs_without_the_outer_concat_are_those_with_it(name, length, monkeypatch):
    monkeypatch.setattr(adapters, "PAIRS", 7)
    made = adapter(name)
    hidden, _ = batch([length])
    found = mirror(made.triangle(hidden[0]), length)
    layers = list(made.layers if name.startswith("MLPAdapterW") else made.children())
    x = outer_concat(hidden[0])
    if name.startswith("MLPAdapterW"):
        x = x @ made.first_linear.T + made.first_bias
    for layer in layers:
        x = layer(x)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, found.transpose(0, 1))


def test_a_batch_of_pairs_is_the_rows():
    made = adapter("MLPAdapterWithoutOutConcat")
    hidden, _ = batch([5, 5])
    assert torch.equal(made(hidden)[1], mirror(made.triangle(hidden[1]), 5))


@torch.inference_mode()
def test_no_pair_of_a_token_with_itself_in_resnet2d():
    made = adapter("ResNet2DAdapter")
    for length in (1, 6):
        found = mirror(made.triangle(batch([length])[0][0]), length)[..., 0]
        assert not found.diagonal().any() and torch.equal(found, found.T)


def test_memory_of_pairs_is_half_a_square_of_outputs():
    made = adapter("MLPAdapterWithoutOutConcat")
    hidden = torch.zeros(300, WIDTH)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                largest = max(largest, found.numel())
            return found

    with torch.inference_mode(), Watch():
        made.triangle(hidden)
    assert largest <= 300 * 301 // 2 * 10  # the pairs, by the widest layer; not 300 x 300 x 32


# --------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", ADAPTERS)
@torch.inference_mode()
def test_bfloat16_weights_take_any_hidden_states(name):
    exact, made = adapter(name), adapter(name).to(torch.bfloat16)
    hidden, real = batch([6, 4], left_in_padding=0.0)
    for x in (hidden, hidden.bfloat16()):
        arguments = (x, real) if name in OF_ROWS else (x,)
        if name in OF_PAIRS:
            found, expected = made.triangle(x[0]), exact.triangle(hidden[0])
        else:
            found, expected = made(*arguments), exact(hidden, *arguments[1:])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_parameters_may_be_on_meta(name):
    with parameters_on_meta():
        made = make_adapter(name, OWN_ARGS.get(name, {}), 32, 1)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert not list(made.buffers())


@pytest.mark.parametrize(
    "given",
    ["torch.nn.GELU", "GELU", {"class_path": "GELU"},
     {"class_path": "torch.nn.GELU", "init_args": {"approximate": "none"}}],
)  # fmt: skip
def test_activations_as_configs_spell_them(given):
    x = torch.linspace(-2, 2, 5)
    assert torch.equal(activation(given)(x), torch.nn.functional.gelu(x))


def test_what_is_not_there_is_refused():
    with pytest.raises(MgenError, match="no adapter 'LinearCLSAdaptor'") as raised:
        make_adapter("LinearCLSAdaptor", {}, 16, 3)
    assert "did you mean LinearCLSAdapter?" in raised.value.hint
    with pytest.raises(MgenError, match="MLPAdapter has no argument 'hiden_sizes'") as raised:
        make_adapter("MLPAdapter", {"hiden_sizes": [3]}, 16, 3)
    assert "did you mean hidden_sizes?" in raised.value.hint
    with pytest.raises(MgenError, match="MLPAdapter does not give numbers for rows") as raised:
        check_adapter("MLPAdapter", {}, "rows")
    assert "MLPPoolAdapter" in raised.value.hint
    with pytest.raises(MgenError, match=r"no activation 'os\.system'"):
        make_adapter("MLPAdapter", {"hidden_sizes": [3], "activation_layer": "os.system"}, 16, 3)
    with pytest.raises(MgenError, match="no pooling 'max_pooling'"):
        make_adapter("MLPPoolAdapter", {"pooling": "max_pooling"}, 16, 3)
    with pytest.raises(MgenError, match="cannot be made of"):
        make_adapter("MLPAdapter", {"hidden_sizes": "12"}, 16, 3)
    with pytest.raises(MgenError, match="no hidden_sizes"):
        make_adapter("MLPAdapterWithoutOutConcat", {}, 16, 3)
    with pytest.raises(MgenError, match="8 heads"):
        make_adapter("LinearTransformerAdapter", {}, 44, 3)
    with pytest.raises(MgenError, match="one number a pair"):
        make_adapter("ResNet2DAdapter", {}, 32, 2)
