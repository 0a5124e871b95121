"""SAEs that others published, brought to this machine: of a folder, of S3 or of the Hugging Face hub, one at a time."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import pyarrow.fs as fs
from huggingface_hub import HfApi, scan_cache_dir, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    CacheNotFound,
    HFValidationError,
    HTTPError,  # type: ignore[attr-defined]  # of the client it is built on: also no connection, and a timeout
    LocalEntryNotFoundError,
)

from ray_explain import records, storage
from ray_explain.errors import BadInput
from ray_explain.features.readers import find_folder, layout_of

_SMALL_BYTES = 1 << 20  # files up to this size are configurations, not weights


def fetched(place: str, layer: int, revision: str | None = None) -> Path:
    """A local folder with the SAE of `layer`, from a folder, an s3:// path or a hub id; only that SAE is fetched.

    "{layer}" in `place` stands for the number of the layer. A hub id may go on into the repository: owner/name/folder.
    What the hub gave once is there without a network too.

    Raises:
        FileNotFoundError, ValueError: as `find_folder`.
        BadInput: the hub cannot be read, and had not given it before.
    """
    place = place.replace("{layer}", str(layer))
    if storage.is_remote(place):
        return _fetched_from_storage(place, layer)
    if Path(place).exists() or place.startswith((".", "/")):
        return find_folder(place, layer)
    return _fetched_from_hub(place, layer, revision)


def commit_of(folder: Path) -> str | None:
    """The commit of the hub that `fetched` gave this folder from; None for other places."""
    if not folder.is_relative_to(HF_HUB_CACHE):
        return None
    names = folder.relative_to(HF_HUB_CACHE).parts  # models--owner--name, snapshots, the commit
    return names[2]


@storage.patient
def _fetched_from_storage(place: str, layer: int) -> Path:
    system, root = storage.filesystem(place)
    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = {info.path[len(root) :].strip("/"): info for info in found if info.type == fs.FileType.File}

    def read(name: str) -> bytes:
        with system.open_input_stream(f"{root}/{name}") as stream:
            return stream.readall()

    own = _where(files, _small({name: info.size for name, info in files.items()}), layer, read, place)
    # What was replaced there since is fetched anew: else machines would read different SAEs by the same name.
    stand = [(name, info.size, info.mtime_ns) for name, info in sorted(files.items()) if Path(name).is_relative_to(own)]
    local = storage.own_scratch() / "saes" / records.content_id(place, stand) / own
    if not local.exists():  # new_folder: whole or not at all, also when several actors fetch it at once
        with storage.new_folder(str(local)) as folder:
            fs.copy_files(f"{root}/{own}", folder, source_filesystem=system)
    return local


@cache  # stages ask for it with every slice; the hub limits how often it answers
def _fetched_from_hub(place: str, layer: int, revision: str | None) -> Path:
    repository, inside = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    try:
        return _downloaded(repository, inside, layer, revision)
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise
        if kept := _kept(repository, inside, layer, revision):
            return kept
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{place!r} is no folder, and no SAE can be read from the hub: {reason}") from error


def _downloaded(repository: str, inside: str, layer: int, revision: str | None) -> Path:
    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    below = f"{inside}/" if inside else ""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if file.rfilename.startswith(below)}
    small = _small(sizes)
    configurations = Path(snapshot_download(repository, revision=info.sha, allow_patterns=small)) if small else Path()
    names = {name.removeprefix(below): size for name, size in sizes.items()}
    own = _where(
        names,
        [name.removeprefix(below) for name in small],
        layer,
        lambda name: (configurations / below / name).read_bytes(),
        f"{repository}/{inside}".rstrip("/"),
    )
    pattern = below + ("*" if own == "." else f"{own}/*")
    return Path(snapshot_download(repository, revision=info.sha, allow_patterns=[pattern]), inside, own)


def _kept(repository: str, inside: str, layer: int, revision: str | None) -> Path | None:
    """What an earlier download left of it: at this revision, or else at the last one that was looked at."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return None
    found = [
        kept
        for own in repositories
        if (own.repo_id, own.repo_type) == (repository, "model")
        for kept in own.revisions
        if revision in (None, kept.commit_hash, *kept.refs)
    ]
    for kept in sorted(found, key=lambda kept: kept.last_modified, reverse=True):
        with suppress(FileNotFoundError):
            folder = find_folder(kept.snapshot_path / inside, layer)
            if layout_of(folder).weights.exists():  # configurations of all layers are there, weights of some
                return folder
    return None


def _small(sizes: Mapping[str, int]) -> list[str]:
    return [name for name, size in sizes.items() if name.endswith(".json") and size <= _SMALL_BYTES]


def _where(
    names: Iterable[str], configurations: Iterable[str], layer: int, read: Callable[[str], bytes], place: str
) -> str:
    """The folder, below `place`, of the SAE of a layer: found in a copy of the tree whose weights are empty files."""
    known = set(configurations)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read(name) if name in known else b"")
        try:
            return str(find_folder(folder, layer).relative_to(folder))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(str(error).replace(folder, place)) from error
