"""How a model is spread: what is claimed to fit does fit, and no rank is left out."""

from __future__ import annotations

import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layouts import esm2_folder
from torch import nn

from mgen_core import (
    Backbone,
    BackboneCard,
    BackboneOptions,
    MgenError,
    PluginError,
    Want,
    WeightsError,
)
from mgen_core.api import open_backbone
from mgen_core.catalog import discover
from mgen_core.checkpoint import open_checkpoint
from mgen_core.footprint import ModelSize, activation_bytes, guess_width, measure_model, weigh
from mgen_core.machine import Machine, amount, free_memory, least, this_machine
from mgen_core.strategy import USABLE, Decision, choose, describe
from mgen_core.units import units_of
from mgen_core.weights import fill, match, parameters_on_meta

GB = 10**9
LAST = Want(layers=(-1,))


# --------------------------------------------------------------------------- choosing


@st.composite
def sizes(draw):
    units = [draw(st.integers(0, 10))] * draw(st.integers(0, 40))
    rest = draw(st.integers(0, 20))
    total = sum(units) + rest
    private = draw(st.integers(0, total))
    return ModelSize(total, total, private, max(units, default=0), rest)


machines = st.builds(
    Machine, st.sampled_from(["cpu", "cuda"]), st.integers(0, 250), st.integers(0, 500)
)
hosts = st.lists(st.sampled_from("abc"), min_size=1, max_size=9)
batches = st.integers(0, 30)
asked = st.sampled_from(["auto", "replicate", "zero3"])
offloads = st.sampled_from(["none", "cpu", "nvme"])


def chosen(*given):
    try:
        return choose(*given)
    except MgenError:
        return None


def taken(size, batch, machine, hosts, decision):
    """Bytes on each device and in the memory of each host, counted rank by rank."""
    devices, memories = defaultdict(int), defaultdict(int)
    for group in decision.groups:
        for rank in group:
            if decision.strategy == "replicate":
                shard, beside = size.bytes, batch
            else:
                shard = (size.bytes - size.rest) // len(group)
                beside = size.rest + 2 * size.unit + batch
            if decision.offload == "cpu":
                memories[hosts[rank]] += shard
            elif machine.device == "cpu" and decision.strategy == "replicate":
                memories[hosts[rank]] += size.private + batch
            elif machine.device == "cpu":
                memories[hosts[rank]] += shard + beside
            elif decision.offload == "none":
                devices[rank] += shard
            devices[rank] += beside
    if machine.device == "cpu" and decision.strategy == "replicate":
        for host in memories:
            memories[host] += size.bytes - size.private
    return devices, memories


@given(sizes(), batches, machines, hosts, asked, offloads)
def test_groups_hold_every_rank_once_and_keep_to_a_host_or_take_all(
    size, batch, machine, hosts, asked, offload
):
    decision = chosen(size, batch, machine, hosts, asked, offload)
    assume(decision is not None)
    ranks = [rank for group in decision.groups for rank in group]
    assert sorted(ranks) == list(range(len(hosts)))
    for group in decision.groups:
        assert list(group) == sorted(group)
        assert len(group) == len(hosts) or len({hosts[rank] for rank in group}) == 1
    if decision.strategy == "replicate":
        assert all(len(group) == 1 for group in decision.groups)
        assert decision.offload == "none"
    if asked != "auto":
        assert decision.strategy == asked
    if offload != "none":
        assert decision.offload == offload


@given(sizes(), batches, machines, hosts, asked, offloads)
def test_what_is_claimed_to_fit_fits(size, batch, machine, hosts, asked, offload):
    decision = chosen(size, batch, machine, hosts, asked, offload)
    assume(decision is not None and decision.fits)
    devices, memories = taken(size, batch, machine, hosts, decision)
    if machine.device == "cuda":
        assert all(held <= machine.memory * USABLE for held in devices.values())
        assert all(held <= machine.host_memory for held in memories.values())
    elif "mapped" in decision.why:
        assert len(hosts) == 1 and size.private + batch <= machine.memory
    else:
        assert all(held <= machine.memory for held in memories.values())


RANKING = [("replicate", "none"), ("zero3", "none"), ("zero3", "cpu"), ("zero3", "nvme")]


def rank_of(decision):
    return RANKING.index((decision.strategy, decision.offload)) if decision else len(RANKING)


@given(sizes(), batches, machines, hosts, st.integers(0, 300), st.integers(0, 300))
def test_more_memory_never_makes_it_worse(size, batch, machine, hosts, more, more_on_host):
    larger = machine._replace(
        memory=machine.memory + more, host_memory=machine.host_memory + more_on_host
    )
    before = chosen(size, batch, machine, hosts)
    after = chosen(size, batch, larger, hosts)
    assert rank_of(after) <= rank_of(before)
    if before and after and rank_of(after) == rank_of(before) == 1:
        assert len(after.groups) >= len(before.groups)  # more copies of the model


@given(sizes(), batches, machines, hosts)
def test_auto_shards_nothing_that_fits_whole(size, batch, machine, hosts):
    decision = chosen(size, batch, machine, hosts)
    whole = choose(size, batch, machine, hosts, "replicate")
    if whole.fits or (machine.device == "cpu" and len(hosts) == 1):
        assert decision == whole
    elif decision:
        assert decision.strategy == "zero3" and decision.fits


@given(sizes(), batches, machines, hosts)
def test_what_the_error_advises_works(size, batch, machine, hosts):
    try:
        choose(size, batch, machine, hosts)
    except MgenError as error:
        assert error.hint
        assert "--devices 1" not in error.hint or choose(size, batch, machine, ["a"]).fits
        if found := re.search(r"(\d+) hosts", error.hint):
            busiest = max(hosts.count(host) for host in hosts)
            enough = [f"host {n}" for n in range(int(found[1])) for _ in range(busiest)]
            assert choose(size, batch, machine, enough).fits


@given(sizes(), batches, st.integers(1, 40))
def test_the_number_of_devices_that_would_do_does(size, batch, left):
    memory = round((size.rest + 2 * size.unit + batch + left) / USABLE) + 1
    machine = Machine("cuda", memory, 10**6)
    decision = choose(size, batch, machine, ["a"])
    if found := re.search(r"(\d+) devices would hold", decision.why):
        enough = choose(size, batch, machine, [f"host {n}" for n in range(int(found[1]))])
        assert (enough.strategy, enough.offload) == ("zero3", "none")


def sized(total_gb, private_gb=0.0):
    total, unit = int(total_gb * GB), int(total_gb * GB) // 40
    return ModelSize(total // 4, total, int(private_gb * GB), unit, unit)


def gpus(memory_gb, host_gb=500):
    return Machine("cuda", int(memory_gb * GB), host_gb * GB)


def cpu(memory_gb):
    return Machine("cpu", int(memory_gb * GB), int(memory_gb * GB))


TWO_HOSTS = ["a"] * 4 + ["b"] * 4


@pytest.mark.parametrize(
    ("size", "machine", "hosts", "told"),
    [
        (
            sized(3.2),
            gpus(80),
            ["a"] * 4,
            "4 ranks, each with the whole model: 3.2 GB of parameters and 1.0 GB for a batch fit "
            "on each of 4 devices with 80.0 GB free (73.6 GB to use)",
        ),
        (
            sized(32.1),
            gpus(24),
            TWO_HOSTS,
            "8 ranks, sharded in 2 groups of 4: 32.1 GB of parameters and 1.0 GB for a batch do "
            "not fit on a device with 24.0 GB free (22.1 GB to use): sharded over the 4 ranks of "
            "each host",
        ),
        (
            sized(100),
            gpus(24),
            TWO_HOSTS,
            "8 ranks, sharded: 100.0 GB of parameters and 1.0 GB for a batch do not fit on a "
            "device with 24.0 GB free (22.1 GB to use): sharded over all 8 ranks",
        ),
        (
            sized(60),
            gpus(24),
            ["a"],
            "1 rank, one layer at a time, shards in host memory: 60.0 GB of parameters and 1.0 GB "
            "for a batch do not fit on a device with 24.0 GB free (22.1 GB to use), sharded "
            "neither; 4 devices would hold the shards",
        ),
        (
            sized(60),
            gpus(24, host_gb=32),
            ["a"],
            "1 rank, one layer at a time, shards in files on disk: 60.0 GB of parameters and "
            "1.0 GB for a batch do not fit on a device with 24.0 GB free (22.1 GB to use), sharded "
            "neither; 4 devices would hold the shards",
        ),
        (
            sized(3),
            cpu(16),
            ["a", "a"],
            "2 ranks, each with the whole model: 3.0 GB of parameters and 1.0 GB for a batch "
            "(5.0 GB for 2 ranks) fit in 16.0 GB of free memory",
        ),
        (
            sized(60),
            cpu(16),
            ["a"],
            "1 rank, with the whole model: 60.0 GB of parameters and 1.0 GB for a batch are more "
            "than 16.0 GB of free memory: the weights are mapped, and read from disk again in "
            "each batch",
        ),
    ],
)
def test_the_decision_in_a_line(size, machine, hosts, told):
    assert describe(choose(size, GB, machine, hosts), len(hosts)) == told


def test_groups_of_unlike_hosts():
    decision = choose(sized(32), GB, gpus(24), ["a", "b", "a", "b", "b"], "zero3")
    assert decision.groups == ((0, 2), (1, 3, 4))
    assert describe(decision, 5).startswith("5 ranks, sharded in 2 groups of 3 and 2: as asked, ")


def test_zero3_as_asked_takes_all_ranks_where_a_host_has_one():
    decision = choose(sized(1), GB, gpus(24), ["a", "b"], "zero3")
    assert decision == Decision(
        "zero3", ((0, 1),), "none", "as asked, 487.5 MB of 1.0 GB of parameters on a rank"
    )


@pytest.mark.parametrize(
    ("strategy", "offload", "size", "machine", "told"),
    [
        ("replicate", "none", sized(60), gpus(24), "60.0 GB .* do not seem to fit on a device"),
        ("replicate", "none", sized(60), cpu(24), "do not seem to fit in 24.0 GB of free memory"),
        ("zero3", "none", sized(90), gpus(24), "though this does not seem to fit"),
        ("auto", "cpu", sized(90), gpus(24, 60), "does not seem to fit 60.0 GB of free host"),
        ("zero3", "nvme", sized(900), gpus(24), "which does not seem to fit"),
    ],
)
def test_what_is_asked_for_is_obeyed_with_a_warning(strategy, offload, size, machine, told):
    decision = choose(size, GB, machine, ["a", "a"], strategy, offload)
    assert not decision.fits and re.search(told, decision.why)


def test_a_cpu_that_cannot_map_is_warned_of():
    decision = choose(sized(60, private_gb=60), GB, cpu(24), ["a"])
    assert not decision.fits and "60.0 GB of parameters cannot be the mapped file" in decision.why


@pytest.mark.parametrize(
    ("machine", "strategy", "offload", "what", "hint"),
    [
        (cpu(24), "auto", "cpu", "no device to offload from", "leave out --offload"),
        (gpus(24), "replicate", "cpu", "--strategy replicate makes none", "leave out one"),
        (gpus(3), "auto", "none", "5.5 GB are needed there even with", "smaller --batch-tokens"),
        (cpu(24), "auto", "none", "do not fit in 24.0 GB of free memory", "--devices 1 maps"),
    ],
)
def test_what_cannot_be(machine, strategy, offload, what, hint):
    with pytest.raises(MgenError, match=re.escape(what)) as caught:
        choose(sized(60), GB, machine, ["a", "a"], strategy, offload)
    assert hint in caught.value.hint


# --------------------------------------------------------------------------- measuring


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)


def test_units_are_the_outermost_of_their_class_else_the_items_of_lists():
    inner = nn.ModuleList([Layer(), Layer()])
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(1, 1), nn.ReLU()]), "inner": inner})
    assert units_of(model, ("Layer",)) == units_of(model, ()) == [*inner]
    assert units_of(model, ("Linear",)) == [model["heads"][0], *(layer.dense for layer in inner)]
    assert units_of(model, ("Layer", "Linear")) == [model["heads"][0], *inner]
    assert units_of(nn.Linear(1, 1), ("Layer",)) == []
    nested = nn.ModuleList([nn.ModuleList([Layer(), Layer()]) for _ in range(2)])
    assert units_of(nested, ()) == [*nested]
    shared = Layer()
    assert units_of(nn.ModuleList([shared, shared, Layer()]), ("Layer",))[0] is shared
    assert len(units_of(nn.ModuleList([shared, shared]), ("Layer",))) == 1


class Small(Backbone):
    """A backbone around any module."""

    def __init__(self, build, **facts) -> None:
        card = BackboneCard("small", "", "protein", load=Backbone, **facts)
        super().__init__(card, BackboneOptions())
        self.build = build


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(7), persistent=False)


def test_a_model_is_measured_in_the_precision_of_the_run():
    backbone = Small(Model)
    backbone.keep_float32 = (r"layers\.1\.dense\.weight",)
    size = measure_model(backbone, LAST, torch.bfloat16)
    # 40 tied numbers, 3 layers of 16 and 4, 7 float32 of a table; nothing of it in a file.
    total = 40 * 2 + 3 * 20 * 2 + 16 * 2 + 7 * 4
    assert size == ModelSize(100, total, total, 20 * 2 + 16 * 2, 40 * 2 + 7 * 4)
    assert backbone.want == LAST


def test_weights_that_are_elsewhere_are_taken_to_be_float32():
    away = Small(Model, weights=("org/name",))
    assert measure_model(away, LAST, torch.float32).private == 7 * 4
    assert measure_model(away, LAST, torch.bfloat16).private == 100 * 2 + 7 * 4
    away.sources = lambda name, keys: (f"{name}.a", f"{name}.b")
    assert measure_model(away, LAST, torch.float32).private == 100 * 4 + 7 * 4


def no_config():
    raise AttributeError("config")


def test_a_backbone_that_cannot_be_built_without_its_weights():
    away = Small(no_config, weights=("org/name",), parameters=320)
    assert measure_model(away, LAST, torch.float32) == ModelSize(320, 1280, 0, 40, 40, False)
    with pytest.raises(WeightsError, match="only its weights tell how large small is"):
        measure_model(Small(no_config, weights=("org/name",)), LAST, torch.float32)
    with pytest.raises(PluginError, match="AttributeError: config"):  # not a lack of weights
        measure_model(Small(no_config, parameters=320), LAST, torch.float32)


def opened(name, folder=None):
    card = discover().find(BackboneCard, name)
    return open_backbone(card, card.options(weights=folder))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measure_is_what_the_filled_model_takes(tmp_path, stored, dtype):
    folder = esm2_folder(tmp_path, dtype=stored, layout="safetensors-sharded")
    backbone = opened("esm2_8m", folder)
    size = measure_model(backbone, Want(logits=True), dtype)
    with parameters_on_meta():
        module = backbone.build()
    checkpoint = open_checkpoint(folder)
    keys = match(module, backbone, checkpoint)
    fill(module, backbone, checkpoint, dtype=dtype, device=torch.device("cpu"))
    held = [*module.parameters(), *module.buffers()]
    mapped = {checkpoint.tensor(key).data_ptr() for found in keys.values() for key in found}
    assert size.bytes == sum(tensor.nbytes for tensor in held)
    assert size.private == sum(t.nbytes for t in held if t.data_ptr() not in mapped)
    assert (size.private < size.bytes / 100) == (stored == dtype)
    assert size.parameters == sum(parameter.numel() for parameter in module.parameters())
    layers = units_of(module, backbone.units)
    assert [type(layer).__name__ for layer in layers] == ["Esm2Layer"] * 2
    assert size.unit == sum(parameter.nbytes for parameter in layers[0].parameters())
    assert size.rest == size.bytes - 2 * size.unit


def test_experts_are_joined_and_cannot_be_mapped():
    size = measure_model(opened("aido_protein_16b"), LAST, torch.float32)
    assert size.exact and size.parameters > 15 * 10**9
    assert size.private > 0.9 * size.bytes
    assert 36 * size.unit + size.rest == size.bytes


def test_activations_grow_with_tokens_and_with_what_is_kept():
    assert activation_bytes(10, 100, 4) == 80_000
    assert activation_bytes(10, 100, 2, layers=3, outputs=7) == 100 * 2 * (10 * 23 + 7)


def test_a_batch_is_weighed_by_what_the_task_needs():
    backbone = Small(Model, width=4)
    backbone.vocabulary = "ABC"
    assert weigh(backbone, LAST, torch.bfloat16, 10)[1] == 10 * 2 * 4 * 21
    assert weigh(backbone, Want(logits=True), torch.float32, 10)[1] == 10 * 4 * (4 * 20 + 3)
    unknown = Small(no_config, weights=("org/name",), parameters=12 * 32 * 9)
    assert guess_width(unknown.card.parameters) == 3
    assert weigh(unknown, LAST, torch.float32, 10)[1] == 10 * 4 * 3 * 21


# --------------------------------------------------------------------------- the machine


def fake_host(root, cgroup, files):
    """A /proc and a /sys/fs/cgroup with 1000 kB available."""
    proc, groups = root / "proc", root / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   1000 kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, groups


def group(folder, limit, used, cached=0):
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 1\ninactive_file {cached}\nactive_file 0\n",
    }


def group_1(folder, limit, used, cached=0):
    return {
        f"memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{used}\n",
        f"memory/{folder}memory.stat": f"inactive_file 9\ntotal_inactive_file {cached}\n",
    }


NO_LIMIT_1 = 2**63 - 4096


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("", {}, 1_024_000),
        ("0::/\n", {}, 1_024_000),
        ("0::/a/b\n", group("a/b/", "max", 5), 1_024_000),
        ("0::/a/b\n", group("a/b/", 5000, 1000), 4000),
        ("0::/a/b\n", {**group("a/b/", 5000, 1000), **group("a/", 4000, 3000, 500)}, 1500),
        ("0::/\n", group("", 5000, 1000), 4000),  # as a container sees its own group
        ("0::/../x\n", group("", 5000, 1000), 4000),
        ("0::/gone\n", group("", 5000, 6000), 0),
        ("4:memory:/a/b\n0::/\n", group_1("a/b/", NO_LIMIT_1, 1000), 1_024_000),
        ("4:cpu,memory:/a/b\n0::/\n", group_1("a/", 5000, 1000, 200), 4200),
        ("4:memory:/elsewhere\n3:cpu:/\n", group_1("", 5000, 1000), 4000),
        ("4:cpu:/a\n", group_1("a/", 5000, 1000), 1_024_000),
    ],
)
def test_limits_of_containers_and_batch_systems_count(tmp_path, cgroup, files, free):
    assert free_memory(*fake_host(tmp_path, cgroup, files)) == free


def test_without_proc_it_is_all_there_is(tmp_path):
    assert free_memory(tmp_path, tmp_path) > 10**8


def test_the_machine(monkeypatch):
    found = this_machine(torch.device("cpu"))
    assert found.device == "cpu" and found.memory > 0 and found.host_memory > 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 + device.index, 99))
    found = this_machine(SimpleNamespace(type="cuda", index=1))
    assert (found.device, found.memory) == ("cuda", 8)


def test_the_least_of_several_machines():
    assert least([Machine("cuda", 5, 9), Machine("cuda", 7, 8)]) == Machine("cuda", 5, 8)


def test_amounts():
    told = [amount(count) for count in (0, 999, 1000, 3_200_000_000, 5 * 10**12)]
    assert told == ["0 bytes", "999 bytes", "1.0 kB", "3.2 GB", "5.0 TB"]
