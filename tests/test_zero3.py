"""The sharded engine alone: what it holds, and that a pass gathers every layer whatever happens."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mgen_core import (
    Activations,
    Backbone,
    BackboneCard,
    BackboneOptions,
    Row,
    RowError,
    Task,
    TaskCard,
    Want,
)
from mgen_core.engine import LocalEngine, Placement
from mgen_core.origin import find_origin
from mgen_core.turns import Fault, OutOfMemory, attempt
from mgen_core.world import World

pytest.importorskip("deepspeed")
from mgen_core.zero3 import Group, Zero3Engine, connect, disconnect, shardable

WIDTH, DEPTH = 8, 3
ROWS = [Row(0, "a", "ACGT"), Row(1, "b", "GG")]


class Layer(nn.Module):
    """Two matrices, one stacked from two tensors of the file; a vector; a matrix in float32."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Parameter(torch.empty(2, WIDTH, WIDTH))
        self.router = nn.Linear(WIDTH, 2, bias=False)
        self.fault = None

    def forward(self, x):
        if self.fault is not None:
            raise self.fault
        shares = self.router(x.float()).softmax(-1).to(x.dtype)
        mixed = torch.einsum("blh,eho,ble->blo", x, self.experts, shares)
        return x + torch.tanh(self.up(x)) + mixed


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(128, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, codes, layers):
        x = self.words(codes)
        hidden = {0: x}
        for number, layer in enumerate(self.layers, start=1):
            if number > max(layers):
                break
            x = layer(x)
            hidden[number] = x
        return {number: hidden[number] for number in layers}


class Small(Backbone):
    keep_float32 = (r".*router\.weight",)
    depth = DEPTH

    def measure(self, row):
        return len(row.data)

    def collate(self, rows):
        codes = [torch.tensor(list(map(ord, row.data))) for row in rows]
        return {"codes": nn.utils.rnn.pad_sequence(codes, batch_first=True)}

    def build(self):
        return Model()

    def sources(self, name, keys):
        if name.endswith("experts"):
            return [f"{name}.{e}" for e in range(2)]
        return (name,)

    def forward(self, module, inputs, want):
        hidden = module(inputs["codes"], want.layers)
        return Activations(hidden, inputs["codes"] > 0)


class Last(Task):
    def __init__(self, backbone, layer):
        self.needs = Want(layers=(layer,))
        super().__init__(TaskCard("last", "", load=None), None, backbone)

    def columns(self, activations, rows):
        return {"last": activations.layer(*self.needs.layers)[:, 0]}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    tensors = {"words.weight": torch.randn(128, WIDTH)}
    for n in range(DEPTH):
        for name, shape in {
            "up.weight": (WIDTH, WIDTH),
            "up.bias": (WIDTH,),
            "router.weight": (2, WIDTH),
            "experts.0": (WIDTH, WIDTH),
            "experts.1": (WIDTH, WIDTH),
        }.items():
            tensors[f"layers.{n}.{name}"] = torch.randn(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return tmp_path


@pytest.fixture
def group():
    connect(None, World(), torch.device("cpu"))
    yield Group([[0]])
    disconnect()


def backbone(weights):
    card = BackboneCard("small", "", "protein", load=Small, width=WIDTH, max_tokens=64)
    return Small(card, BackboneOptions(weights=weights))


def engines(weights, group, precision="fp32", layer=DEPTH, offload="none"):
    place = Placement(torch.device("cpu"), precision)
    models = backbone(weights), backbone(weights)
    origin = find_origin(weights, None, None)
    whole = LocalEngine(models[0], Last(models[0], layer), place, origin)
    return whole, Zero3Engine(
        models[1], Last(models[1], layer), place, origin, group, [Row(9, "f", "A")], offload
    )


def forward(engine, rows=ROWS):
    return engine.forward(rows, engine.backbone.collate(rows))["last"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_the_same_bits_as_the_whole_model(weights, group, precision, offload):
    whole, sharded = engines(weights, group, precision, offload=offload)
    assert whole.parameters == sharded.parameters
    for _ in range(3):  # the third pass is prefetched by the trace of the first two
        assert torch.equal(forward(whole), forward(sharded))
    routers = [layer.router.weight for layer in sharded.module.layers]
    assert {router.dtype for router in routers} == {torch.float32}


def test_only_matrices_of_layers_are_sharded(weights, group):
    model = backbone(weights).build()
    chosen = shardable(model, list(model.layers), backbone(weights))
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    layers = range(DEPTH)
    assert names == {f"layers.{n}.{kind}" for n in layers for kind in ("up.weight", "experts")}


def test_a_matrix_that_two_layers_share_stays_whole(weights):
    model = backbone(weights).build()
    model.layers[1].up.weight = model.layers[0].up.weight
    chosen = shardable(model, list(model.layers), backbone(weights))
    assert id(model.layers[0].up.weight) not in chosen
    assert id(model.layers[2].up.weight) in chosen


def test_a_released_layer_is_not_held(weights, group):
    _, sharded = engines(weights, group)
    for _ in range(3):
        forward(sharded)
        assert all(p.data.numel() == 0 for p in sharded.layers.parameters())


def test_layers_beyond_the_wanted_one_are_never_gathered(weights, group):
    whole, sharded = engines(weights, group, layer=1)
    assert len(sharded.guard.order) == 1
    assert torch.equal(forward(whole), forward(sharded))


@pytest.mark.parametrize("at", range(DEPTH))
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemory),
        (ValueError("a bug"), RowError),
    ],
)
def test_a_fault_in_a_layer_still_gathers_them_all(weights, group, at, fault, told):
    whole, sharded = engines(weights, group)
    forward(sharded)
    gathered = []
    for number, layer in enumerate(sharded.module.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: gathered.append(number))
    sharded.module.layers[at].fault = fault
    with pytest.raises(told):
        forward(sharded)
    assert gathered == list(range(DEPTH))
    sharded.module.layers[at].fault = None
    assert torch.equal(forward(whole), forward(sharded))  # and the next pass is right
    gc.collect()


def test_a_fault_before_the_layers_still_gathers_them_all(weights, group, monkeypatch):
    whole, sharded = engines(weights, group)
    gathered = []
    for number, layer in enumerate(sharded.module.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: gathered.append(number))
    monkeypatch.setattr(sharded.module.words, "forward", lambda codes: 1 / 0)
    with pytest.raises(RowError, match="small failed with ZeroDivisionError"):
        forward(sharded)
    assert gathered == list(range(DEPTH))
    monkeypatch.undo()
    assert torch.equal(forward(whole), forward(sharded))


def test_a_model_whose_path_depends_on_the_data_is_refused(weights, group):
    _, sharded = engines(weights, group)
    sharded.guard.order.reverse()
    with pytest.raises(Exception, match="another order"):
        forward(sharded)


def test_rows_that_no_layer_sees_do_not_keep_a_model_from_being_sharded(weights, group):
    whole, _ = engines(weights, group)

    class Picky(Small):
        def collate(self, rows):
            if any(len(row.data) < 2 for row in rows):
                raise ValueError("too short")
            return super().collate(rows)

    picky = Picky(whole.backbone.card, whole.backbone.options)
    place, origin = whole.placement, find_origin(weights, None, None)
    fillers = [Row(9, "f", "A"), Row(8, "g", "ACG")]
    sharded = Zero3Engine(picky, Last(picky, DEPTH), place, origin, group, fillers)
    assert torch.equal(forward(whole), forward(sharded))
    sharded.idle()


def test_a_pass_that_failed_leaves_nothing_in_memory(weights, group):
    gc.collect()
    gc.disable()
    try:
        for engine in engines(weights, group):
            seen = []
            layers = engine.module.layers
            layers[0].register_forward_hook(lambda *given: seen.append(weakref.ref(given[2])))  # noqa: B023
            layers[1].fault = ValueError  # made anew where it is raised
            inputs = engine.collate(ROWS)
            assert isinstance(attempt(lambda: engine.forward(ROWS, inputs)), Fault)  # noqa: B023
            assert seen and all(tensor() is None for tensor in seen)
    finally:
        gc.enable()
