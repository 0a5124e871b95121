"""SAEs from a hub: a real one over HTTP, whose library runs in processes of its own, as it reads its settings once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_explain.features.readers import read_sae
from tests.features.test_readers import D_MODEL, D_SAE, write_gemma_scope, write_llama_scope, write_sae_lens
from tests.hub import Hub
from tests.serving import serving

SCRIPT = """
import json, sys
from ray_explain.errors import BadInput
from ray_explain.features.readers import read_sae
from ray_explain.ground_truth.published import commit_of, fetched
for place, layer, revision in json.loads(sys.argv[1]):
    try:
        folder = fetched(place, layer, revision)
        total = read_sae(folder, layer).directions.float().sum().item()
        told = {"folder": str(folder), "total": total, "commit": commit_of(folder)}
    except (BadInput, FileNotFoundError, ValueError) as error:
        told = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(told))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub(tmp_path / "hub")) as hub:
        yield hub


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"w_enc": (D_SAE, D_MODEL), "b_enc": (D_SAE,), "w_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    return {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}


def asked(hub: Hub, home: Path, *asks: tuple[str, int, str | None], **variables: str) -> list[dict[str, Any]]:
    """What `fetched` says, in a process whose hub this is."""
    environment = {**os.environ, **hub.environment(home), **variables}
    command = [sys.executable, "-c", SCRIPT, json.dumps(asks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_of_a_repository_of_many_saes_one_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    for layer in range(3):
        write_llama_scope(hub.root / "fnlp" / "scope", weights(layer), layer=layer)
        write_sae_lens(
            hub.root / "owner" / "lens" / f"blocks.{layer}.hook_resid_post",
            weights(10 + layer),
            metadata={"hook_name": f"blocks.{layer}.hook_resid_post"},
        )
        for l0 in (20, 71):
            write_gemma_scope(hub.root / "google" / "gemma", weights(20 + layer), layer=layer, l0=l0)
    places = ["fnlp/scope", "owner/lens", "google/gemma/layer_{layer}/width_16k/average_l0_71"]
    scope, lens, gemma = asked(hub, tmp_path / "home", *[(place, 1, None) for place in places])
    for told, original in [
        (scope, hub.root / "fnlp" / "scope" / "Llama3_1-8B-Base-L1R-32x"),
        (lens, hub.root / "owner" / "lens" / "blocks.1.hook_resid_post"),
        (gemma, hub.root / "google" / "gemma" / "layer_1" / "width_16k" / "average_l0_71"),
    ]:
        assert told["total"] == read_sae(original).directions.float().sum().item()
    assert scope["commit"] == hub.commit("fnlp/scope")
    assert sorted(name for name in hub.downloaded if not name.endswith(".json")) == [
        "Llama3_1-8B-Base-L1R-32x/checkpoints/final.safetensors",
        "blocks.1.hook_resid_post/sae_weights.safetensors",
        "layer_1/width_16k/average_l0_71/params.npz",
    ]
    assert len(hub.downloaded) == len(set(hub.downloaded)), "something came twice"


def test_what_the_hub_gave_once_is_there_without_it(hub: Hub, tmp_path: Path) -> None:
    for layer in range(2):
        write_llama_scope(hub.root / "fnlp" / "scope", weights(layer), layer=layer)
    home, commit = tmp_path / "home", hub.commit("fnlp/scope")
    [first] = asked(hub, home, ("fnlp/scope", 1, None))
    offline = asked(hub, home, ("fnlp/scope", 1, None), ("fnlp/scope", 1, commit), HF_HUB_OFFLINE="1")
    assert offline == [first, first]
    hub.down = True
    again, other_layer = asked(hub, home, ("fnlp/scope", 1, commit), ("fnlp/scope", 0, commit))
    assert again == first
    assert other_layer["error"] == "BadInput" and "503" in other_layer["text"], "of layer 0 only the settings are there"


def test_a_repository_or_revision_that_is_not_there_and_no_network_are_one_sentence_each(
    hub: Hub, tmp_path: Path
) -> None:
    write_llama_scope(hub.root / "fnlp" / "scope", weights(0), layer=0)
    home, nobody = tmp_path / "home", "fnlp/nobody"
    unknown, revision, layer = asked(
        hub, home, (nobody, 0, None), ("fnlp/scope", 0, "0" * 40), ("fnlp/scope", 7, hub.commit("fnlp/scope"))
    )
    assert unknown["error"] == "BadInput" and "'fnlp/nobody' is no folder, and no SAE can be read" in unknown["text"]
    assert revision["error"] == "BadInput" and "404" in revision["text"]
    assert layer["error"] == "FileNotFoundError"
    assert layer["text"] == "fnlp/scope: no SAE of layer 7 among ['Llama3_1-8B-Base-L0R-32x']"
    empty = tmp_path / "empty"
    [offline] = asked(hub, empty, ("fnlp/scope", 0, None), HF_HUB_OFFLINE="1")
    assert offline["error"] == "BadInput" and "offline" in offline["text"].lower()
    [unreachable] = asked(hub, empty, ("fnlp/scope", 0, None), HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable["error"] == "BadInput" and "no SAE can be read from the hub" in unreachable["text"]
    assert all("\n" not in told["text"] for told in (unknown, revision, offline, unreachable))
