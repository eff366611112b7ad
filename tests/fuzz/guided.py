"""A coverage-guided fuzzer over the targets: `python guided.py [SECONDS [TARGET...]]`.

One process a target; a line each says how many inputs it tried, in how many seconds, and what it
found. What it found lies in `.fuzz/TARGET/`; `python guided.py FILE TARGET` tries a file again.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FOUND = Path(".fuzz")
SECONDS = 60
MOST_MB = 3000  # torch and pyarrow take a third of it
HANG = 30


def main(words: list[str]) -> int:
    if words[:1] == ["--one"]:
        return one(*words[1:])
    if words and Path(words[0]).is_file():
        return again(Path(words[0]), words[1])
    if importlib.util.find_spec("atheris") is None:
        print("skipped: atheris has no wheel for this Python and system")
        return 0
    return all_of(int(words[0]) if words else SECONDS, words[1:])


def again(file: Path, target: str) -> int:
    from targets import targets

    targets()[target].run(file.read_bytes())
    print("ends well")
    return 0


def all_of(seconds: int, names: list[str]) -> int:
    """Fuzz the targets one after another; gives 1 where anything was found."""
    from targets import targets

    findings = 0
    print(f"{'target':<24}{'executions':>12}{'seconds':>9}{'findings':>10}")
    for name in names or targets():
        place = FOUND / name.replace("/", "-")
        place.mkdir(parents=True, exist_ok=True)
        known = set(place.iterdir())
        began = time.monotonic()
        words = [sys.executable, __file__, "--one", name, str(seconds), f"{place}/"]
        ended = subprocess.run(words, capture_output=True, text=True, errors="replace")
        took = time.monotonic() - began
        tried = re.findall(r"stat::number_of_executed_units:\s*(\d+)", ended.stderr)
        new = set(place.iterdir()) - known
        failed = ended.returncode != 0
        findings += failed
        print(f"{name:<24}{int((tried or [0])[-1]):>12,}{took:>9.1f}{int(failed):>10}", flush=True)
        if failed:
            print(ended.stderr[-3000:], *sorted(map(str, new)), sep="\n")
    return int(findings > 0)


def one(name: str, seconds: str, place: str) -> int:
    """Fuzz a target in this process. libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["mgen_core", "mgen_formats", "yaml", "json"]):
        from targets import folder, targets

        target = targets()[name]
        for seed in target.seeds:
            target.run(seed)  # imports what it needs, instrumented
    corpus = folder() / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    words = folder() / "words"
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    options = {
        "max_total_time": seconds,
        "timeout": HANG,
        "rss_limit_mb": MOST_MB,
        "max_len": 1 << 16,
        "dict": words,
        "artifact_prefix": place,
        "print_final_stats": 1,
        "verbosity": 0,
    }
    told = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup([__file__, *told, str(corpus)], target.run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main(sys.argv[1:]))
