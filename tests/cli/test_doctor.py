"""`mgen doctor`: what is here, and whether a model would fit, with its weights or without."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import typer
from layouts import esm2_folder
from typer.testing import CliRunner

from mgen_core import MgenError, PluginError, WeightsError
from mgen_core.catalog import Catalog, Plugin, discover
from mgen_core.cli.doctor import doctor, machine_lines, plan
from mgen_core.footprint import ModelSize
from mgen_core.machine import Machine

GB = 10**9
app = typer.Typer()
app.command()(doctor)


def asked(*words):
    """What doctor prints. Raises what it raises."""
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def lines(text):
    """Label and text of each line."""
    return [(line[:10].strip(), line[11:]) for line in text.splitlines()]


@pytest.fixture
def memory(monkeypatch):
    """Give the machine so much memory."""

    def set_memory(free, device="cpu"):
        machine = Machine(device, free, free)
        monkeypatch.setattr("mgen_core.machine.this_machine", lambda device: machine)

    return set_memory


def test_the_machine(memory):
    memory(int(21.2 * GB))
    told = dict(lines(asked()))
    assert list(told) == ["mgen", "device", "deepspeed"]
    assert metadata.version("mgen") in told["mgen"] and torch.__version__ in told["mgen"]
    assert re.fullmatch(r"cpu, \d+ cores, 21\.2 GB of free memory", told["device"])


def test_deepspeed_is_not_imported_and_not_needed(monkeypatch):
    code = (
        "import sys; from mgen_core.cli.doctor import doctor; doctor(); "
        "print(sorted({'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    version = metadata.version

    def without(name):
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    assert ("deepspeed", "not installed: pip install deepspeed") in lines(asked())


def test_broken_plugins_are_told(monkeypatch):
    broken = Plugin("x", "mgen-x", "1.0", problem="ImportError: no y")
    catalog = Catalog((*discover().plugins, broken))
    monkeypatch.setattr("mgen_core.catalog.discover", lambda: catalog)
    assert ("broken", "plugin mgen-x: ImportError: no y") in lines(asked())


def test_gpus_in_words():
    found = {
        "mgen": "1.0", "python": "3.12.0", "torch": "2.13", "deepspeed": "0.19.8",
        "device": "GPU X", "devices": 4, "device_memory": 80 * GB, "host_memory": 500 * GB,
        "cores": None, "broken_plugins": {},
    }  # fmt: skip
    told = dict(machine_lines(found))
    assert told["device"] == "4 x GPU X, 80.0 GB free"
    assert told["host"] == "500.0 GB of free memory"


def test_a_model_with_its_weights(tmp_path, memory):
    memory(16 * GB)
    folder = esm2_folder(tmp_path, hidden=64, layers=3, dtype=torch.bfloat16)
    found = json.loads(asked("-b", "esm2_8m", "--weights", folder, "--devices", 2, "--json"))
    model = found["model"]
    assert model["weights"] == str(folder) and model["missing"] == ""
    assert model["size"]["exact"]
    assert model["size"]["private"] > 0.9 * model["size"]["bytes"]  # fp32 is not what is stored
    assert [(p["ranks"], p["fits"], p["strategy"]) for p in model["plans"]] == [
        (1, True, "replicate"),
        (2, True, "replicate"),
    ]
    told = dict(lines(asked("-b", "esm2_8m", "--weights", folder, "--precision", "bf16")))
    assert told["weights"] == str(folder)
    assert re.match(r"esm2_8m: [\d,]+ parameters, [\d.]+ kB in bf16$", told["model"])
    assert told["batch"].startswith("up to 1,024 tokens: at most about ")
    assert told["runs"].startswith("1 rank, with the whole model: ")


def test_random_parameters_and_none():
    told = dict(lines(asked("--backbone", "aido_protein_dummy")))
    assert told["weights"] == "random"
    assert dict(lines(asked("--backbone", "dna_onehot")))["weights"] == "none needed"


def test_a_model_whose_weights_are_not_here(memory, monkeypatch):
    monkeypatch.setattr("mgen_core.hub.locate", lambda *given, **also: None)
    memory(16 * GB)
    told = lines(asked("-b", "aido_rna_650m", "--devices", 2))
    assert "646,730,112 parameters, 2.6 GB in fp32" in dict(told)["model"]
    assert "hf download genbio-ai/AIDO.RNA-650M --local-dir AIDO.RNA-650M" in dict(told)["weights"]
    assert [text[:6] for label, text in told if label == "runs"] == ["1 rank", "2 rank"]
    # Not even its sizes are known: the card tells how many parameters.
    told = dict(lines(asked("-b", "esm2_15b")))
    assert told["model"] == "esm2_15b: 15,129,098,273 parameters, 60.5 GB in fp32, about"
    assert "the weights are mapped" in told["runs"]
    told = dict(lines(asked("-b", "antiberty")))
    assert told["weights"] == "not here: pip install antiberty"


def test_a_model_that_is_too_large(memory, monkeypatch):
    monkeypatch.setattr("mgen_core.hub.locate", lambda *given, **also: None)
    memory(16 * GB)
    told = lines(asked("-b", "esm2_15b", "--devices", 4))
    assert [label for label, _ in told][-2:] == ["runs", "too large"]
    assert "try: --devices 1 maps the weights" in told[-1][1]
    found = json.loads(asked("-b", "esm2_15b", "--devices", 4, "--json"))
    assert [plan["fits"] for plan in found["model"]["plans"]] == [True, False]


def test_a_model_that_no_number_of_gpus_holds():
    size = ModelSize(GB, 4 * GB, 4 * GB, 2 * GB, 2 * GB)
    found = plan({"size": size, "batch_bytes": GB}, Machine("cuda", 3 * GB, 99 * GB), 1)
    assert found["fits"] is False and found["why"].startswith("1 rank: 4.0 GB of parameters")


def test_a_model_of_which_nothing_is_known(memory):
    memory(16 * GB)
    told = dict(lines(asked("-b", "huggingface")))
    assert told["model"] == "huggingface: of unknown size"
    assert told["weights"].startswith("yours to give: --weights")
    assert told["unknown"] == "only the weights would tell its size"


def test_mistakes(tmp_path):
    with pytest.raises(PluginError, match="no backbone 'esm2_8mm'"):
        asked("-b", "esm2_8mm")
    with pytest.raises(MgenError, match="no such file or folder"):
        asked("-b", "esm2_8m", "--weights", tmp_path / "gone")
    folder = esm2_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match="does not fit esm2_8m"):
        asked("-b", "esm2_8m", "--weights", folder)
