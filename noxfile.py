"""The project's checks: `nox` runs them all, `nox -s tests` one of them."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

PLUGINS = sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml"))
PACKAGES = [str(path.parent) for path in Path("plugins").glob("*/*/plugin.py")]
# The programs among what lies in bench: those that their first lines say how to start.
BENCHES = sorted(
    path.stem for path in Path("bench").glob("*.py") if "nox -s bench -- " in path.read_text()
)


def install(session: nox.Session, *groups: str) -> None:
    """The core, all plugins and the tools of the groups, at the pinned versions."""
    session.install("-c", "constraints.txt", ".", *PLUGINS, *tools(*groups))


def tools(*groups: str) -> tuple[str, ...]:
    """What the dependency groups of pyproject.toml name."""
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), *groups)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, those of the documentation included, on the CPU."""
    install(session, "tests")
    # Two processes of one thread each: tests are many and small.
    session.run("pytest", "-n", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's links, references and code blocks alone."""
    install(session, "tests")
    session.run("pytest", *(session.posargs or ["tests/docs"]))


@nox.session
def nodes(session: nox.Session) -> None:
    """Ranks on two hosts, which are namespaces of this one: Linux, as root, some minutes."""
    install(session, "tests")
    words = session.posargs or ["tests/nodes", "--durations=0"]
    session.run("pytest", *words, env={"MGEN_TEST_NODES": "1"})


@nox.session
def faults(session: nox.Session) -> None:
    """Disks that fail, processes that are killed, what came of it: Linux, best as root; long."""
    install(session, "tests")
    words = session.posargs or ["-n", "2", "tests/faults", "tests/test_kill.py", "tests/remote"]
    session.run("pytest", *words, env={"MGEN_TEST_FAULTS": "1", "OMP_NUM_THREADS": "1"})


@nox.session
def fuzz(session: nox.Session) -> None:
    """A coverage-guided fuzzer, a process and a minute for each reader: `-- SECONDS TARGET...`."""
    install(session, "tests")
    session.run("pip", "install", "--quiet", "--only-binary=:all:", "atheris", success_codes=[0, 1])
    tests = "plugins/mgen-formats/tests/test_formats_untrusted.py"
    session.run("pytest", tests, env={"OMP_NUM_THREADS": "1", "MGEN_TEST_BOMBS": "1"})
    session.run("python", "tests/fuzz/guided.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and the direction of dependencies."""
    session.install("-c", "constraints.txt", *tools("lint"))  # reads the source, runs nothing
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", env={"PYTHONPATH": "."})


@nox.session
def types(session: nox.Session) -> None:
    """Types of the core and of every plugin."""
    install(session, "types")
    session.run("mypy", "mgen_core", *PACKAGES)


@nox.session
def bench(session: nox.Session) -> None:
    """A benchmark, with its options: `nox -s bench -- ceiling --models esm2_8m`."""
    if not session.posargs or session.posargs[0] not in BENCHES:
        session.error(f"name one of {', '.join(BENCHES)}")
    install(session, "tests")
    name, *words = session.posargs
    session.run("python", f"bench/{name}.py", *words)
