"""Artifacts: a directory, and a manifest that is written last and says what made it.

An artifact's place is known before it is made: its fingerprint comes from its config and from its parents'
fingerprints, and is part of its path. So another config makes another directory, nothing is ever overwritten, and
whether a step still has to be done is one look at the disk.
"""

import hashlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray_explain import storage

MANIFEST = "manifest.json"
# Raised whenever the same config and parents would give other content: old artifacts are then made anew.
FORMAT = 1
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_VERSIONS_OF = ("ray_explain", "torch", "transformers", "ray", "deepspeed", "peft", "pyarrow")


@dataclass(frozen=True, kw_only=True, eq=False)
class Artifact:
    """A thing to be made, or made: what it is, what defines it, and what it is made from."""

    kind: str  # "patching_effects"
    label: str  # for people: "llama", "qwen3-of-llama-s0"
    config: Mapping[str, Any]  # all that defines it besides its parents; pools and paths are not in it
    parents: tuple["Artifact", ...] = ()

    def __post_init__(self) -> None:
        """Raises: ValueError: kind or label is not one plain name, and so could lead out of the storage root."""
        for name in (self.kind, self.label):
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be part of an artifact's path: letters, digits and ._+- only")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of kind, config and parents.

        Raises:
            TypeError: the config holds something without a stable JSON form.
        """
        what = [FORMAT, self.kind, self.config, [parent.fingerprint for parent in self.parents]]
        return hashlib.sha256(json.dumps(what, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Artifact) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def path(self, root: str) -> str:
        """Its directory below the storage root."""
        return f"{root}/{self.kind}/{self.label}-{self.fingerprint[:10]}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What made an artifact. `rows` + the sum of `dropped` is the number of rows it was made from, where it has any."""

    kind: str
    label: str
    fingerprint: str
    config: dict[str, Any]
    parents: tuple[str, ...]
    rows: int
    dropped: dict[str, int]  # reason -> count
    seconds: float  # of wall time, over all attempts it can know of
    measured: dict[str, Any] = field(default_factory=dict)  # what was seen in the making: losses, recall, counts
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    made_at: str = ""


def finished(artifact: Artifact, root: str) -> Manifest | None:
    """Its manifest, or None until it is whole.

    A manifest that cannot be read, or that belongs to another fingerprint, counts as none.
    """
    try:
        found = storage.read_json(f"{artifact.path(root)}/{MANIFEST}")
        manifest = Manifest(**{**found, "parents": tuple(found["parents"])})
    except (FileNotFoundError, json.JSONDecodeError, TypeError, KeyError):
        return None
    return manifest if manifest.fingerprint == artifact.fingerprint else None


def finish(
    artifact: Artifact,
    root: str,
    *,
    rows: int = 0,
    dropped: Mapping[str, int] | None = None,
    seconds: float = 0.0,
    measured: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the manifest: from now on the artifact is whole."""
    manifest = Manifest(
        kind=artifact.kind,
        label=artifact.label,
        fingerprint=artifact.fingerprint,
        config=dict(artifact.config),
        parents=tuple(parent.fingerprint for parent in artifact.parents),
        rows=rows,
        dropped=dict(sorted((dropped or {}).items())),
        seconds=round(seconds, 2),
        measured=dict(measured or {}),
        commit=commit(),
        versions=versions(),
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    storage.write_json(manifest.__dict__, f"{artifact.path(root)}/{MANIFEST}")
    return manifest


@lru_cache
def commit() -> str:
    """The git commit of the code, with "+changes" when the tree differs from it; "" outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if head and git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:  # no git on this machine
        return ""


@lru_cache
def versions() -> dict[str, str]:
    """Version of Python and of each library that numbers may depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS_OF}
