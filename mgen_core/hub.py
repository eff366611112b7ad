"""Where weights are: a folder, an installed package, the hub's cache, or the hub itself.

What is on this machine wins over the network, so that a run starts without the hub, starts again
with the same weights, and every rank sees the same files. `--revision` chooses other ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

from .api import BackboneCard
from .errors import WeightsError

# In the order in which transformers looks for them: a repository may hold several.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SMALL_FILES = ("*.json", "*.txt", "*.model")  # config, vocabulary, tokenizer
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
FILE_SUFFIXES = (".safetensors", ".bin", ".json", ".ckpt", ".pt", ".pth")
PATIENCE_S = 5.0


def locate(
    weights: str | None, card: BackboneCard, revision: str | None, *, download: bool = True
) -> Path | None:
    """The local folder or file of the weights; None for a card that has none.

    `weights` is what the user gave: a path, a hub id, or `package:NAME/PATH`, where PATH counts
    from the package's own folder or from where packages are installed. Without it the card's
    places are tried in order. Without `download` the answer is None unless the weights are on
    this machine already. Raises `WeightsError` with the command that brings them here.
    """
    places = card.weights
    if weights is not None:
        path = Path(weights).expanduser()
        if weights and path.exists():
            return path
        _check_place(weights)
        places = (weights,)
    else:
        revision = revision or card.revision
    for place in places:
        if found := _present(place, revision):
            return found
    return _download_first(places, revision) if places and download else None


def choose_weights(names: Iterable[str]) -> str | None:
    """The file to open first among those of a folder or repository: the weights or their index."""
    present = set(names)
    return next((name for name in WEIGHT_FILES if name in present), None)


def _check_place(weights: str) -> None:
    if "://" in weights:
        raise WeightsError(
            f"weights are not read from a URL: {weights}",
            "copy them to a disk here, then give that",
        )
    is_hub_id = HUB_ID.fullmatch(weights) and not weights.endswith(FILE_SUFFIXES)
    if not is_hub_id and not weights.startswith("package:"):
        raise WeightsError(
            f"no weights at {weights!r}: no such file or folder",
            "give a folder, a weights file, or a hub id like ORG/NAME",
        )


def _present(place: str, revision: str | None) -> Path | None:
    if place.startswith("package:"):
        return _in_package(place)
    return _in_cache(place, revision)


def _in_package(place: str) -> Path | None:
    name, _, inside = place.removeprefix("package:").partition("/")
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    for root in (name.replace("-", "_"), ""):
        path = Path(str(distribution.locate_file(root)), inside)
        if path.exists():
            return path
    return None


def _in_cache(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Whether an earlier download got as far as the last weights file."""
    chosen = choose_weights(path.name for path in folder.iterdir())
    if chosen is None or not chosen.endswith(".index.json"):
        return chosen is not None
    try:
        shards = set(json.loads((folder / chosen).read_text())["weight_map"].values())
    except (ValueError, KeyError):
        return False
    return all((folder / shard).exists() for shard in shards)


def _download_first(places: Iterable[str], revision: str | None) -> Path:
    failures = []
    for place in places:
        try:
            return _download(place, revision)
        except WeightsError as failure:
            failures.append(failure)
    raise WeightsError(
        "; ".join(failure.what for failure in failures),
        "; or ".join(dict.fromkeys(failure.hint for failure in failures)),
    )


def _download(place: str, revision: str | None) -> Path:
    if place.startswith("package:"):
        name, _, inside = place.removeprefix("package:").partition("/")
        raise WeightsError(
            f"no {inside} in the Python package {name}, or it is not installed",
            f"pip install --upgrade {name}",
        )
    try:
        return _fetch(place, revision)
    except WeightsError:
        raise
    # The HTTP library under the hub client (requests, httpx, httpx2) changes with its version,
    # and with it the classes of a network that is down.
    except Exception as error:
        raise _explained(error, place, revision) from error


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # snapshot_download alone waits for minutes where a firewall swallows packets.
    about = HfApi().model_info(repo, revision=revision, timeout=PATIENCE_S)
    wanted = _wanted(repo, [file.rfilename for file in about.siblings or ()])
    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=wanted, etag_timeout=PATIENCE_S)
    )


def _explained(error: Exception, repo: str, revision: str | None) -> WeightsError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return WeightsError(
            f"{repo} is given only to those who accepted its terms",
            f"accept them on the hub page of {repo}, then run: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return WeightsError(
            f"no folder {repo} here, and the hub has no such model, or it is private",
            "check the name; for a private model run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(
            f"{repo} has no revision {revision!r}", "give another --revision, or leave it out"
        )
    reason = str(error).strip().partition("\n")[0]
    folder = repo.rpartition("/")[2]
    version = f" --revision {revision}" if revision else ""
    return WeightsError(
        f"cannot download {repo}: {type(error).__name__}: {reason}",
        f"where the hub can be reached run: hf download {repo}{version} --local-dir {folder}, "
        f"then give --weights {folder}",
    )


def _wanted(repo: str, names: list[str]) -> list[str]:
    """The files that a run needs: one format of the weights, and the small files beside it."""
    chosen = choose_weights(names)
    if chosen is None:
        raise WeightsError(
            f"{repo} holds no weights that can be read: {', '.join(names[:8]) or 'no files'}",
            f"one of these is needed: {', '.join(WEIGHT_FILES)}",
        )
    shards = ""
    if chosen.endswith(".index.json"):
        stem, suffix = chosen.removesuffix(".index.json").split(".")
        shards = f"{stem}-*.{suffix}"
    return [
        name
        for name in names
        if name == chosen
        or fnmatch(name, shards)
        or (
            "/" not in name
            and not name.endswith(".index.json")
            and any(fnmatch(name, pattern) for pattern in SMALL_FILES)
        )
    ]
