"""`mgen --help` answers at once: nothing heavy is imported, and it costs little more than Typer."""

import importlib.metadata
import json
import resource
import statistics
import subprocess
import sys

import pytest
from layouts import esm2_folder

HEAVY = ["torch", "deepspeed", "transformers", "numpy", "pyarrow", "datasets", "pandas", "pydantic"]


def test_help_imports_nothing_heavy_and_no_plugin():
    plugins = {p.module.split(".")[0] for p in importlib.metadata.entry_points(group="mgen")}
    code = (
        "import sys, json\n"
        "from mgen_core.cli import main\n"
        "sys.argv = ['mgen', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert not set(HEAVY) & set(modules)
    assert plugins and not plugins & set(modules)


SMALLEST = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"


def test_help_takes_at_most_twice_what_the_help_of_any_typer_program_takes():
    def seconds(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ratios = []
    for _ in range(7):  # in turn, and processor time: the machine may be busy
        typer = seconds(sys.executable, "-c", SMALLEST)
        ratios.append(seconds(sys.executable, "-m", "mgen_core", "--help") / typer)
    assert statistics.median(ratios) <= 2


UNUSED = {
    *("pandas", "transformers", "tokenizers", "datasets", "deepspeed", "duckdb", "scipy"),
    *("huggingface_hub", "fsspec", "anndata", "h5py", "matplotlib", "sympy", "sklearn"),
    *("torch._dynamo", "torch._inductor", "pyarrow.dataset", "rich.progress", "yaml"),
}


@pytest.mark.parametrize("backbone", ["esm2_8m", "aido_dna_dummy", "antiberty"])
def test_a_run_imports_only_what_it_uses(backbone, tmp_path):
    (tmp_path / "in.csv").write_text("id,sequence\na,ACGT\n")
    words = f"mgen embed in.csv --backbone {backbone}"
    if backbone == "esm2_8m":
        words += f" --weights {esm2_folder(tmp_path / 'esm2')}"
    code = (
        "import sys, json\n"
        "from mgen_core.cli import main\n"
        f"sys.argv = {words!r}.split()\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" in modules and (tmp_path / "predictions/run.json").exists()
    assert not UNUSED & modules
