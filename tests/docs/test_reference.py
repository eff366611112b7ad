"""The reference names everything that there is, and nothing that there is not."""

import dataclasses
import inspect
import json
import re

import pytest
from docs.pages import DOCS, first_cells, section

import mgen_core
from mgen_core import ReaderCard, WriterCard, api, errors, hookspecs, testing
from mgen_core.catalog import discover
from mgen_core.config import RunConfig
from mgen_core.manifest import Done
from mgen_core.plan import Failure

CONTRACTS = DOCS / "reference/contracts.md"
RUN_DIRECTORY = DOCS / "reference/run-directory.md"
CLASSES = [
    found
    for name, found in vars(api).items()
    if inspect.isclass(found) and found.__module__ == api.__name__
]


def signature(function):
    """`name(arguments) -> result` as the source has it, without `self`."""
    found = inspect.signature(function)
    kept = [p for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=kept))
    return function.__name__ + re.sub(r"'([^']*)'", r"\1", text)


def members(cls):
    """Fields by name, methods by signature; what the core assigns in `__init__` is a field."""
    if dataclasses.is_dataclass(cls):
        fields = [field.name for field in dataclasses.fields(cls)]
    elif issubclass(cls, tuple):
        fields = list(cls._fields)
    else:
        created = inspect.getsource(cls.__init__) if "__init__" in vars(cls) else ""
        fields = re.findall(r"self\.(\w+) = ", created)
    yield from fields
    for name, found in vars(cls).items():
        if name.startswith("_") or name in fields:
            continue
        yield signature(found) if inspect.isfunction(found) else name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_contracts_are_complete(cls):
    documented = first_cells(section(CONTRACTS, cls.__name__))
    assert sorted(documented) == sorted(members(cls))


def test_every_public_name_is_told():
    text = "".join(path.read_text() for path in DOCS.rglob("*.md"))
    missing = [name for name in mgen_core.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_hooks_stand_with_their_signatures():
    page = DOCS / "reference/hooks.md"
    hooks = [
        function
        for name, function in vars(hookspecs).items()
        if name.startswith("mgen_") and inspect.isfunction(function)
    ]
    headings = re.findall(r"^### (.*)$", page.read_text(), re.MULTILINE)
    assert headings == [signature(hook) for hook in hooks]
    for hook in hooks:
        assert inspect.getdoc(hook) in section(page, signature(hook))


def test_errors_stand_with_their_parents():
    page = section(DOCS / "reference/errors.md", "The tree")
    told = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)
    there = [
        (name, found.__base__.__name__)
        for name, found in vars(errors).items()
        if inspect.isclass(found) and issubclass(found, Exception)
    ]
    assert sorted(told) == sorted(there)


def test_config_keys_and_their_defaults():
    text = (DOCS / "reference/config.md").read_text()
    cells = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    told = {key.strip(" `"): default.strip() for key, default in cells}
    defaults = {}
    for field in dataclasses.fields(RunConfig):
        value = None if field.default is dataclasses.MISSING else field.default
        missing = field.default is dataclasses.MISSING
        shown = f"`{value}`" if value and not isinstance(value, bool) else json.dumps(value)
        defaults[field.name] = "" if missing else shown
    assert told == defaults


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    mgen_core.embed(["ACGT"], backbone="aido_dna_dummy", output=folder)
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("heading", ["run.json", "identity", "plan"])
def test_keys_of_run_json(record, heading):
    found = record if heading == "run.json" else record[heading]
    text = section(RUN_DIRECTORY, heading).split("### ")[0]
    assert first_cells(text) == list(found)


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("The done-log", [field.name for field in dataclasses.fields(Done)]),
        ("Failed rows", list(Failure._fields)),
    ],
)
def test_keys_of_the_logs(heading, fields):
    assert first_cells(section(RUN_DIRECTORY, heading)) == fields


def test_every_reader_and_writer():
    page = DOCS / "reference/formats.md"
    offers = discover().offers
    readers = {
        offer.card.name: offer.card
        for offer in offers(ReaderCard)
        if offer.distribution == "mgen-formats"
    }
    writers = {
        offer.card.name: offer.card
        for offer in offers(WriterCard)
        if offer.distribution == "mgen-formats"
    }
    told = section(page, "Readers")
    assert sorted(first_cells(told)) == sorted(readers)
    for card in readers.values():
        for suffix in {re.sub(r"(?<=\w)\.(gz|bz2|zst)$", "", suffix) for suffix in card.suffixes}:
            assert f"`{suffix}`" in told
    told = section(page, "Writers")
    assert sorted(first_cells(told)) == sorted(writers)
    for card in writers.values():
        assert f"| `{card.name}` | `{card.suffix}` |" in told


def test_the_contract_checks():
    page = section(DOCS / "plugins/testing.md", "Does it keep the contract?")
    checks = [name for name in vars(testing) if name.startswith("check_")]
    assert sorted(first_cells(page)) == sorted(checks)
    parameters = set(inspect.signature(testing.check_backbone).parameters) - {"name"}
    assert set(re.findall(r"^- `(\w+)`:", page, re.MULTILINE)) == parameters
