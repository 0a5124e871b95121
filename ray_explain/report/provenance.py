"""What the numbers rest on, by kind of artifact: what all of a kind have in common is told once."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_explain.artifacts import Manifest
from ray_explain.report import numbers

MOST_OF_KIND = 1_000  # artifacts; the others stand in tables.md and scores.json
MOST_CONFIG = 6_000  # characters of a kind's config
MOST_OWN = 300  # characters of what tells an artifact from others of its kind


@dataclass(frozen=True, kw_only=True)
class Made:
    """One artifact."""

    manifest: Manifest
    own: str  # what of its config, versions and commit not all of its kind have; empty where it is alone


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All artifacts of one kind."""

    name: str
    number: int
    rows: int
    dropped: Mapping[str, int]
    seconds: float
    config: str  # JSON of what all have in common
    versions: Mapping[str, str]  # the same, with the commit
    made: Sequence[Made]  # at most MOST_OF_KIND


def kinds(manifests: Sequence[Manifest]) -> list[Kind]:
    """By kind, in the order in which a kind is first made."""
    return [
        _kind(name, [it for it in manifests if it.kind == name]) for name in dict.fromkeys(it.kind for it in manifests)
    ]


def _kind(name: str, manifests: list[Manifest]) -> Kind:
    configs = [_texts(it.config) for it in manifests]
    builds = [{"commit": it.commit, **it.versions} for it in manifests]
    config, build = _common(configs), _common(builds)
    own = [_own(one, config) + _own(versions, build) for one, versions in zip(configs, builds, strict=True)]
    shared = {key: value for key, value in manifests[0].config.items() if key in config}
    return Kind(
        name=name,
        number=len(manifests),
        rows=sum(it.rows for it in manifests),
        dropped=sum((Counter(it.dropped) for it in manifests), Counter()),
        seconds=sum(it.seconds for it in manifests),
        config=numbers.clip(json.dumps(shared, indent=2, sort_keys=True, default=str), MOST_CONFIG),
        versions=build,
        made=[
            Made(manifest=it, own=numbers.clip(", ".join(told), MOST_OWN))
            for it, told in zip(manifests[:MOST_OF_KIND], own)
        ],
    )


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in config.items()}


def _common(given: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {key: value for key, value in given[0].items() if all(key in it and it[key] == value for it in given)}


def _own(given: Mapping[str, str], common: Mapping[str, str]) -> list[str]:
    return [f"{key} {value}" for key, value in given.items() if key not in common]
