"""Weights: found, opened without reading, refused when wrong, and filled into a module."""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, bert_folder, esm2_folder, write_layout
from safetensors.torch import save_file
from torch import Tensor, nn

import mgen_core
from mgen_core import Backbone, BackboneCard, BackboneOptions, PluginError, WeightsError
from mgen_core.checkpoint import Checkpoint, TensorInfo, open_checkpoint, seeded_checkpoint
from mgen_core.hub import locate
from mgen_core.weights import fill, parameters_on_meta

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 20, 15, 11, 32, 5, 2], [0, 4, 5, 6, 7, 2, 1]])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def card(*weights: str) -> BackboneCard:
    return BackboneCard("small", "", "protein", load=Backbone, weights=weights)


class Small(Backbone):
    """A backbone around any module, with the sources given."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        sources: Mapping[str, Sequence[str]] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(card(), BackboneOptions(weights=folder))
        self.made = build
        self.given = sources or {}

    def build(self) -> nn.Module:
        return self.made()

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        return self.given.get(name, (name,))


class Esm2(Backbone):
    """ESM-2 with its language-model head, from the class of transformers."""

    ignored = (
        r"esm\.embeddings\.position_(ids|embeddings\.weight)",
        r".*\.rotary_embeddings\.inv_freq",
    )

    def build(self) -> nn.Module:
        from transformers import EsmConfig, EsmForMaskedLM

        return EsmForMaskedLM(EsmConfig(**self.options.config()))

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        if name == "esm.rotary_embeddings.inv_freq":
            return ("esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq",)
        return (name,)


class Bert(Backbone):
    ignored = (r"bert\.pooler\..*", r"bert\.embeddings\.position_ids")

    def build(self) -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(BertConfig(**self.options.config()))


def filled(backbone: Backbone, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    with parameters_on_meta():
        module = backbone.build()
    fill(module, backbone, checkpoint, dtype=dtype, device=CPU)
    return module


def opened(folder: Path, module: nn.Module, **sources: Sequence[str]) -> nn.Module:
    """The module filled from a folder."""
    backbone = Small(lambda: module, sources, folder)
    fill(module, backbone, open_checkpoint(folder), dtype=torch.float32, device=CPU)
    return module


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Whether the tensor's bytes are the mapping of that file in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file.resolve())):
            start, stop = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= stop:
                return True
    return False


def anonymous_kib() -> int:
    found = re.search(r"^Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found
    return int(found[1])


# ------------------------------------------------------------------ real models, every layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "kind"), [(esm2_folder, Esm2), (bert_folder, Bert)])
def test_a_filled_model_computes_what_transformers_computes(
    tmp_path: Path, make: Callable[..., Path], kind: type[Backbone], layout: str
) -> None:
    from transformers import AutoModelForMaskedLM

    folder = make(tmp_path / "model", layout=layout)
    backbone = kind(card(), BackboneOptions(weights=folder))
    module = filled(backbone, open_checkpoint(folder), torch.float32)
    expected = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = IDS % expected.config.vocab_size
    with torch.no_grad():
        ours = module(ids, output_hidden_states=True)
        theirs = expected(ids, output_hidden_states=True)
    assert torch.equal(ours.logits, theirs.logits)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_they_are_and_widened(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = esm2_folder(tmp_path / "model", dtype=dtype)
    backbone = Esm2(card(), BackboneOptions(weights=folder))
    checkpoint = open_checkpoint(folder)
    key = "lm_head.dense.weight"
    assert checkpoint.keys[key] == TensorInfo(dtype, (32, 32))
    same = filled(backbone, checkpoint, dtype).get_parameter(key)
    wide = filled(backbone, checkpoint, torch.float32).get_parameter(key)
    assert same.dtype == dtype and wide.dtype == torch.float32
    assert is_mapped(same, folder / "model.safetensors")
    assert torch.equal(same.float(), wide)


# ------------------------------------------------------------------ mapping


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_on_the_cpu_are_the_mapped_file(tmp_path: Path, layout: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    folder = write_layout(tmp_path, module.state_dict(), layout)
    with parameters_on_meta():
        empty = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    opened(folder, empty)
    files = [file for file in folder.iterdir() if file.suffix != ".json"]
    for parameter in empty.parameters():
        assert any(is_mapped(parameter, file) for file in files)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_write_to_a_parameter_never_reaches_the_file(tmp_path: Path, layout: str) -> None:
    folder = write_layout(tmp_path, {"weight": torch.ones(2, 2)}, layout)
    module = opened(folder, nn.Linear(2, 2, bias=False))
    module.weight.data.zero_()
    assert open_checkpoint(folder).tensor("weight").tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_opening_reads_nothing_and_filling_copies_nothing(tmp_path: Path, layout: str) -> None:
    size = 4096
    folder = write_layout(tmp_path, {"weight": torch.ones(size, size)}, layout)  # 64 MiB
    with parameters_on_meta():
        module = nn.Linear(size, size, bias=False)
    before, began = anonymous_kib(), time.perf_counter()
    checkpoint = open_checkpoint(folder)
    checkpoint.digest()
    seconds = time.perf_counter() - began
    fill(module, Small(lambda: module), checkpoint, dtype=torch.float32, device=CPU)
    assert float(module.weight.sum()) == size * size
    assert anonymous_kib() - before < 16 * 1024
    assert seconds < 0.5


def test_a_file_larger_than_memory_opens_at_once(tmp_path: Path) -> None:
    policy = Path("/proc/sys/vm/overcommit_memory")
    if policy.exists() and policy.read_text().strip() == "2":
        pytest.skip("this machine is set to refuse mappings larger than memory")
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"weight": about}).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    began = time.perf_counter()
    checkpoint = open_checkpoint(file)
    assert time.perf_counter() - began < 0.5
    assert checkpoint.flat("weight", size // 4 - 3, size // 4).tolist() == [0, 0, 0]


def test_every_dtype_is_read_in_every_layout(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16]
    stored = {str(dtype): torch.tensor([[0, 1], [2, 3]]).to(dtype) for dtype in dtypes}
    stored |= {"eight": torch.ones(3).to(torch.float8_e4m3fn), "none": torch.zeros(0, 4)}
    stored["scalar"] = torch.tensor(7)
    for layout in LAYOUTS:
        checkpoint = open_checkpoint(write_layout(tmp_path / layout, stored, layout))
        for key, value in stored.items():
            assert checkpoint.keys[key] == TensorInfo(value.dtype, tuple(value.shape))
            assert torch.equal(checkpoint.tensor(key).double(), value.double())


def test_tensors_at_odd_offsets_are_read(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "odd": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]},
        }
    ).encode()
    values = torch.arange(6.0)
    file = tmp_path / "model.safetensors"
    content = len(header).to_bytes(8, "little") + header + b"\7" + values.numpy().tobytes()
    file.write_bytes(content)
    odd = open_checkpoint(file).tensor("odd")
    assert odd.data_ptr() % 4 != 0
    assert torch.equal(odd @ torch.eye(3), values.view(2, 3))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Checkpoint, Tensor]]:
    """One tensor, in each layout and drawn from a seed, with its true values."""
    true = torch.randn(7, 11, 13, generator=torch.Generator().manual_seed(0))
    stored = {"x": true, "other": torch.zeros(3)}
    seeded = seeded_checkpoint(nn.ParameterDict({"x": nn.Parameter(true)}), seed=1)
    made = [
        open_checkpoint(write_layout(tmp_path_factory.mktemp(layout), stored, layout))
        for layout in LAYOUTS
    ]
    return [(checkpoint, true) for checkpoint in made] + [(seeded, seeded.tensor("x"))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flat_slice_is_a_slice_of_the_flattened_tensor(
    checkpoints: list[tuple[Checkpoint, Tensor]], data: st.DataObject
) -> None:
    checkpoint, true = data.draw(st.sampled_from(checkpoints))
    start = data.draw(st.integers(0, true.numel()))
    stop = data.draw(st.integers(start, true.numel()))
    assert torch.equal(checkpoint.flat("x", start, stop), true.flatten()[start:stop])


# ------------------------------------------------------------------ digest


def test_the_digest_names_the_weights_and_not_the_layout(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 300), "b": torch.randn(5), "c": torch.tensor(2)}
    digests = {
        open_checkpoint(write_layout(tmp_path / layout, tensors, layout)).digest()
        for layout in LAYOUTS
    }
    assert len(digests) == 1


def test_a_training_step_or_another_name_shape_or_precision_changes_the_digest() -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 2000)
    seen = [Checkpoint(None, module.state_dict()).digest()]
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    module(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    weight = module.state_dict()["weight"]
    for tensors in (
        module.state_dict(),
        {"weight": weight},
        {"wait": weight},
        {"weight": weight.view(2000, 8, 8)},
        {"weight": weight.bfloat16()},
    ):
        seen.append(Checkpoint(None, tensors).digest())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("start", range(0, 100_000, 10_000))
def test_a_change_to_a_tenth_of_a_tensor_changes_the_digest(start: int) -> None:
    changed = torch.zeros(100_000)
    before = Checkpoint(None, {"a": changed.clone()}).digest()
    changed[start : start + 10_000] = 1e-6
    assert Checkpoint(None, {"a": changed}).digest() != before


# ------------------------------------------------------------------ files that are wrong


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    return caught.value.what


class Attack:
    """Unpickled by a careless loader, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, form: str) -> None:
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    content = {"weight": torch.zeros(3), "extra": Attack(mark)}
    if form == "plain":
        file.write_bytes(pickle.dumps({"weight": Attack(mark)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    asks = r"asks for (posix|nt)\.system.*nothing ran"
    reason = "not one of PyTorch" if form == "plain" else asks
    assert re.search(reason, refused(tmp_path))
    assert not mark.exists()


def test_a_harmless_foreign_class_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3), "a": argparse.Namespace()}, tmp_path / "pytorch_model.bin")
    assert "argparse.Namespace" in refused(tmp_path)


def test_old_torch_files_are_read_too(tmp_path: Path) -> None:
    stored = {"weight": torch.arange(6.0).view(2, 3)}
    file = tmp_path / "pytorch_model.bin"
    torch.save(stored, file, _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(tmp_path).tensor("weight"), stored["weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_named(tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path, {"a": torch.randn(50, 50), "b": torch.randn(50, 50)}, layout)
    file = max(tmp_path.iterdir(), key=lambda file: (file.suffix != ".json", file.name))
    file.write_bytes(file.read_bytes()[:-900])
    assert f"cannot read {file}" in refused(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_never_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    layout = data.draw(st.sampled_from(["safetensors", "bin"]))
    write_layout(folder, {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}, layout)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + 40] = data.draw(st.binary(max_size=40))
    file.write_bytes(content)
    with contextlib.suppress(WeightsError):
        open_checkpoint(folder).digest()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_layout(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(3)}, "bin-sharded")
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    what = refused(tmp_path)
    assert "1 of 2 files" in what and "pytorch_model-00002-of-00002.bin" in what


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_layout(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(3)}, "safetensors-sharded")
    save_file({"z": torch.zeros(3)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "promises tensors that its files lack: b" in refused(tmp_path)


def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    write_layout(tmp_path, {"a": torch.zeros(3)}, "safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside its folder" in refused(inside)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert f"{index} is not an index" in refused(tmp_path)


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "Git LFS pointer" in refused(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tf_model.h5").write_text("")
    assert "it holds config.json, tf_model.h5" in refused(tmp_path)
    assert "no such file or folder" in refused(tmp_path / "absent")


def test_a_bin_without_a_state_dict_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(3)}}, tmp_path / "pytorch_model.bin")
    assert "epoch, state_dict" in refused(tmp_path)


# ------------------------------------------------------------------ seeded


def test_seeded_values_are_pinned() -> None:
    module = nn.Linear(3, 2)
    drawn = seeded_checkpoint(module, seed=7)
    assert drawn.tensor("weight").flatten().tolist() == [
        0.5941305756568909,
        -0.2578478455543518,
        -0.17299896478652954,
        -0.56424480676651,
        -0.0774572491645813,
        -0.5976352095603943,
    ]
    assert drawn.tensor("bias").tolist() == [-0.003154984675347805, 0.018286937847733498]


def test_seeded_values_depend_on_seed_and_name_alone() -> None:
    one = seeded_checkpoint(nn.Linear(3, 3), seed=0)
    in_company = seeded_checkpoint(nn.ModuleDict({"a": nn.Linear(9, 9)}), seed=0)
    again = seeded_checkpoint(nn.Linear(3, 3), seed=0)
    other = seeded_checkpoint(nn.Linear(3, 3), seed=1)
    assert torch.equal(one.tensor("weight"), again.tensor("weight"))
    assert not torch.equal(one.tensor("weight"), other.tensor("weight"))
    assert in_company.tensor("a.weight").flatten()[0] != one.tensor("weight").flatten()[0]
    assert one.digest() == again.digest() != other.digest()


def test_a_seeded_model_neither_dies_nor_explodes() -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(64, 4, 256, norm_first=True, batch_first=True)
        return nn.TransformerEncoder(layer, 24, norm=nn.LayerNorm(64), enable_nested_tensor=False)

    with parameters_on_meta():
        module = build()
    checkpoint = seeded_checkpoint(module, seed=0)
    fill(module, Small(build), checkpoint, dtype=torch.float32, device=CPU)
    x = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before_last_norm = nn.Sequential(*module.layers)(x)
    assert 1 < float(before_last_norm.std()) < 10


def test_a_seeded_model_needs_no_sources() -> None:
    """A backbone whose `sources` speak of published names still runs from a seed."""
    with parameters_on_meta():
        module = nn.BatchNorm1d(4)
    backbone = Small(lambda: module, {"weight": ("published.name",)})
    checkpoint = seeded_checkpoint(module, seed=0)
    fill(module, backbone, checkpoint, dtype=torch.float32, device=CPU)
    assert torch.equal(module.weight, checkpoint.tensor("weight"))
    assert torch.equal(module.running_var, torch.ones(4))


# ------------------------------------------------------------------ building on meta


class Tied(nn.Module):
    """One parameter under three names, one of them given before it was registered."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(4, 4))
        self.first = shared
        self.linear = nn.Linear(4, 4)
        self.linear.weight = shared
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.linear.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_parameters_are_meta_and_buffers_are_real() -> None:
    from transformers import BertConfig, BertModel, EsmConfig, EsmModel

    esm = EsmConfig(
        vocab_size=33, pad_token_id=1, hidden_size=1280, num_hidden_layers=33,
        num_attention_heads=20, intermediate_size=5120, position_embedding_type="rotary",
    )  # fmt: skip
    before, began = anonymous_kib(), time.perf_counter()
    with parameters_on_meta():
        modules = [
            EsmModel(esm),
            BertModel(BertConfig()),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True), 24),
            nn.LSTM(512, 512),
        ]
    assert time.perf_counter() - began < 5  # building the first for real takes ten
    assert anonymous_kib() - before < 64 * 1024  # of 8 GB
    for module in modules:
        assert all(parameter.is_meta for parameter in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
    assert modules[0].rotary_embeddings.inv_freq[1] == pytest.approx(10000 ** (-2 / 64))
    assert modules[1].embeddings.position_ids[0, :3].tolist() == [0, 1, 2]
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_patch_is_undone_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("stored_as", ["first", "linear.weight", "last.weight", "all"])
def test_tied_parameters_stay_tied_and_may_be_stored_under_any_name(
    tmp_path: Path, stored_as: str
) -> None:
    names = ["first", "linear.weight", "last.weight"] if stored_as == "all" else [stored_as]
    value = torch.randn(4, 4)
    folder = write_layout(
        tmp_path, {name: value for name in names} | {"linear.bias": torch.ones(4)}, "bin"
    )
    with parameters_on_meta():
        module = Tied()
    opened(folder, module)
    assert module.first is module.linear.weight is module.last.weight
    assert torch.equal(module.first, value)
    assert torch.equal(module.table, torch.arange(4.0))


# ------------------------------------------------------------------ filling


def test_several_sources_make_a_fused_parameter(tmp_path: Path) -> None:
    parts = {name: torch.randn(3, 5) for name in "qkv"}
    folder = write_layout(tmp_path, parts, "safetensors")
    module = opened(folder, nn.Linear(5, 9, bias=False), weight=tuple("qkv"))
    assert torch.equal(module.weight, torch.cat(list(parts.values())))


def test_experts_are_stacked_with_their_biases(tmp_path: Path) -> None:
    parts = {f"w{i}": torch.randn(6, 5) for i in range(4)}
    parts |= {f"b{i}": torch.randn(6) for i in range(4)}
    folder = write_layout(tmp_path, parts, "bin-sharded")
    experts = nn.ParameterDict({"w": torch.empty(4, 6, 5), "b": torch.empty(4, 6)})
    opened(folder, experts, w=[f"w{i}" for i in range(4)], b=[f"b{i}" for i in range(4)])
    for expert in range(4):
        assert torch.equal(experts["w"][expert], parts[f"w{expert}"])
        assert torch.equal(experts["b"][expert], parts[f"b{expert}"])


def test_some_parameters_stay_float32_and_buffers_keep_their_dtype(tmp_path: Path) -> None:
    module = nn.ModuleDict({"router": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    stored = {name: torch.rand_like(x.float()) for name, x in module.state_dict().items()}
    folder = write_layout(tmp_path, stored, "safetensors")
    backbone = Small(lambda: module)
    backbone.keep_float32 = (r"router\.weight",)
    fill(module, backbone, open_checkpoint(folder), dtype=torch.bfloat16, device=CPU)
    assert module["router"].weight.dtype == torch.float32
    assert module["router"].bias.dtype == module["norm"].weight.dtype == torch.bfloat16
    assert torch.equal(module["norm"].running_mean, stored["norm.running_mean"])
    assert module["norm"].num_batches_tracked.dtype == torch.int64


def test_a_buffer_without_sources_stays_as_built(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(2, affine=False)
    stored = {"running_var": torch.tensor([3.0, 4.0])}
    folder = write_layout(tmp_path, stored, "safetensors")
    opened(folder, module, running_mean=(), num_batches_tracked=())
    assert module.running_var.tolist() == [3, 4]
    assert module.running_mean.tolist() == [0, 0]


def unfit(folder: Path, module: nn.Module, **sources: Sequence[str]) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        opened(folder, module, **sources)
    return caught.value


def test_what_does_not_fit_is_listed_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_layout(
        tmp_path, {"weight": torch.zeros(3, 4), "gamma": torch.zeros(2)}, "safetensors"
    )
    (folder / "config.json").write_text('{"model_type": "esm", "hidden_size": 4}')
    with parameters_on_meta():
        module = nn.Linear(4, 5)
    error = unfit(folder, module)
    assert "1 missing (bias)" in error.what
    assert "1 unexpected (gamma)" in error.what
    assert "1 of another shape (weight is (3, 4) in the file, (5, 4) in the model)" in error.what
    assert "config.json says model_type esm, hidden_size 4" in error.hint
    assert module.weight.is_meta


def test_long_lists_are_cut(tmp_path: Path) -> None:
    stored = {"weight": torch.zeros(2, 2)} | {f"x{i}": torch.zeros(1) for i in range(11)}
    error = unfit(write_layout(tmp_path, stored, "bin"), nn.Linear(2, 2, bias=False))
    assert "11 unexpected (x0, x1, x2, x3, x4, x5, x6, x7, and 3 more)" in error.what


@pytest.mark.parametrize("shapes", [[(4, 3)], [(12,)], [(3, 2), (3, 2)], [(2, 4), (2, 4)]])
def test_a_transposed_or_partial_weight_is_refused(
    tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    stored = {f"part{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    folder = write_layout(tmp_path, stored, "bin")
    error = unfit(folder, nn.Linear(4, 3, bias=False), weight=list(stored))
    assert "of another shape (part0 is" in error.what


def test_ignored_keys_are_matched_in_full(tmp_path: Path) -> None:
    stored = {"weight": torch.zeros(2, 2), "head.weight": torch.zeros(1)}
    checkpoint = open_checkpoint(write_layout(tmp_path, stored, "bin"))
    module = nn.Linear(2, 2, bias=False)
    backbone = Small(lambda: module)
    backbone.ignored = (r"head", r".*\.bias")
    with pytest.raises(WeightsError, match=r"1 unexpected \(head\.weight\)"):
        fill(module, backbone, checkpoint, dtype=torch.float32, device=CPU)
    backbone.ignored = (r"head", r".*\.weight")
    fill(module, backbone, checkpoint, dtype=torch.float32, device=CPU)


def test_a_buffer_left_on_meta_is_a_defect_of_the_plugin(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = Tied()
    folder = write_layout(tmp_path, {"first": torch.zeros(4, 4)}, "bin")
    with pytest.raises(PluginError, match="buffer table"):
        opened(folder, module)


# ------------------------------------------------------------------ locating, on this machine


def test_a_card_without_weights_has_none() -> None:
    assert locate(None, card(), None) is None


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_layout(tmp_path / "org" / "name", {"a": torch.zeros(1)}, "bin")
    for text in (str(file), "org/name", "./org/name", "~/org/name"):
        found = locate(text, card("other/model"), None)
        assert found is not None and found.resolve() == file.resolve()


@pytest.mark.parametrize(
    "given", ["./model", "~/model", "/no/model", "model", "a/b/c", "folder/model.safetensors", ""]
)
@pytest.mark.parametrize("download", [True, False])
def test_a_path_that_is_not_there_is_an_error(given: str, download: bool) -> None:
    with pytest.raises(WeightsError, match="no such file or folder"):
        locate(given, card(), None, download=download)


def test_weights_inside_a_package_are_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "tiny_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
    package = tmp_path / "tiny_weights"
    folder = write_layout(package / "model", {"a": torch.zeros(1)}, "bin")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for inside in ("model", "tiny_weights/model", "model/pytorch_model.bin"):
        found = locate(None, card(f"package:tiny-weights/{inside}"), None)
        assert found is not None and found.exists()
        assert found == folder or found.parent == folder
    with pytest.raises(WeightsError, match="no other in the Python package tiny-weights"):
        locate(None, card("package:tiny-weights/other"), None)


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(WeightsError) as caught:
        locate(None, card("package:no-such-package/model"), None)
    assert caught.value.hint == "pip install --upgrade no-such-package"
    assert locate(None, card("package:no-such-package/model"), None, download=False) is None


# ------------------------------------------------------------------ locating, on the hub

SHA = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
import mgen_core.hub as hub
from mgen_core import BackboneCard, WeightsError
hub.PATIENCE_S = 1.0
given, places, revision, of_card, download = json.loads(sys.argv[1])
card = BackboneCard("small", "", "dna", load=None, weights=tuple(places), revision=of_card)
try:
    print(json.dumps(["found", str(hub.locate(given, card, revision, download=download))]))
except WeightsError as error:
    print(json.dumps(["error", error.what, error.hint]))
"""


def ask(
    home: Path,
    *places: str,
    given: str | None = None,
    revision: str | None = None,
    of_card: str | None = None,
    download: bool = True,
    **env: str,
) -> list[str]:
    """`locate` in a fresh process: the hub client reads its settings when it is imported."""
    path = str(Path(mgen_core.__file__).parents[1])
    env = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": path, **env}
    question = json.dumps([given, places, revision, of_card, download])
    command = [sys.executable, "-c", ASK, question]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    words: list[str] = json.loads(answer.stdout.splitlines()[-1])
    return words


def cached(home: Path, repo: str, layout: str = "safetensors", revision: str = "main") -> Path:
    """A repository as the hub client leaves it in its cache."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(SHA)
    snapshot = folder / "snapshots" / SHA
    write_layout(snapshot, {"a": torch.zeros(2), "b": torch.zeros(2)}, layout)
    (snapshot / "config.json").write_text("{}")
    return snapshot


NOWHERE = "http://127.0.0.1:9"


def test_a_complete_cache_needs_no_network(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        home = tmp_path / layout
        snapshot = cached(home, "org/new", layout, revision="v2")
        words = ask(home, "org/old", "org/new", revision="v2", HF_ENDPOINT=NOWHERE)
        assert words == ["found", str(snapshot)]
        words = ask(home, given="org/new", revision="v2", download=False, HF_HUB_OFFLINE="1")
        assert words == ["found", str(snapshot)]


def test_the_revision_of_the_card_is_for_its_own_weights(tmp_path: Path) -> None:
    found = ["found", str(cached(tmp_path, "org/model", revision="v2"))]
    ours = {"of_card": "v2", "download": False}
    assert ask(tmp_path, "org/model", **ours) == found
    assert ask(tmp_path, "org/model", revision="v3", **ours) == ["found", "None"]
    assert ask(tmp_path, given="org/model", **ours) == ["found", "None"]


def test_half_a_download_does_not_count(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "org/model", "bin-sharded")
    (snapshot / "pytorch_model-00002-of-00002.bin").unlink()
    assert ask(tmp_path, "org/model", download=False) == ["found", "None"]
    assert ask(tmp_path, "org/model", HF_HUB_OFFLINE="1")[0] == "error"


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}])
def test_without_the_hub_the_command_to_run_elsewhere_is_given(
    tmp_path: Path, env: dict[str, str]
) -> None:
    kind, what, hint = ask(tmp_path, "org/model", revision="v2", **env)
    assert kind == "error" and "cannot download org/model" in what
    assert "hf download org/model --revision v2 --local-dir model" in hint
    assert "--weights model" in hint


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The few answers of a hub that a download needs."""

    files: dict[str, bytes]
    fetched: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/gone"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/org/gated"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.files.items())
            ]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models/org/model"):
            if path.endswith("/revision/v9"):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            about = {
                "id": "org/model",
                "sha": SHA,
                "siblings": [{"rfilename": n} for n in self.files],
            }
            self.answer(200, json.dumps(about).encode())
        else:
            name = path.rpartition(f"/resolve/{SHA}/")[2]
            number = list(self.files).index(name)
            if self.command == "GET":
                self.fetched.append(name)
            named = {"ETag": f'"{number:040x}"', "X-Repo-Commit": SHA}
            self.answer(200, self.files[name], named)

    do_HEAD = do_GET

    def answer(self, code: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[FakeHub]]]:
    """A hub whose model has both formats and files that no run needs."""
    source = bert_folder(tmp_path / "source", layers=1, layout="safetensors-sharded")
    bert_folder(source, layers=1, layout="bin")
    for name in ("tf_model.h5", "README.md", "training_args.bin"):
        (source / name).write_text("not needed")
    files = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
    files["onnx/config.json"] = b"{}"
    handler = type("Handler", (FakeHub,), {"files": files, "fetched": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()


def test_a_download_takes_one_format_and_what_the_model_needs(
    tmp_path: Path, hub: tuple[str, type[FakeHub]]
) -> None:
    endpoint, handler = hub
    kind, folder = ask(tmp_path, "org/gone", "org/model", HF_ENDPOINT=endpoint)
    assert kind == "found"
    expected = {
        "config.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
        "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert set(handler.fetched) == expected
    assert "cls.predictions.bias" in open_checkpoint(Path(folder)).keys
    handler.fetched.clear()
    assert ask(tmp_path, "org/model", HF_ENDPOINT=NOWHERE) == ["found", folder]
    assert ask(tmp_path, "org/model", HF_ENDPOINT=endpoint) == ["found", folder]
    assert not handler.fetched


def test_what_the_hub_refuses_is_said_in_words(
    tmp_path: Path, hub: tuple[str, type[FakeHub]]
) -> None:
    endpoint, handler = hub
    asked = {"HF_ENDPOINT": endpoint}
    assert "no such model" in ask(tmp_path, "org/gone", **asked)[1]
    _, what, hint = ask(tmp_path, "org/gated", **asked)
    assert "accepted its terms" in what and "hf auth login" in hint
    assert "no revision 'v9'" in ask(tmp_path, "org/model", revision="v9", **asked)[1]
    handler.files = {"tf_model.h5": b""}
    assert "no weights that can be read: tf_model.h5" in ask(tmp_path, "org/model", **asked)[1]


def test_a_hub_that_never_answers_is_given_up_soon(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and says nothing
        began = time.perf_counter()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kind, what, _ = ask(tmp_path, "org/model", HF_ENDPOINT=endpoint)
        assert kind == "error" and "Timeout" in what
        assert time.perf_counter() - began < 10
