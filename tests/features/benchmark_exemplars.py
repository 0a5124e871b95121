"""Exemplar search in one pass against materialising all latents first, which is how delphi does it.

    python tests/features/benchmark_exemplars.py [tokens]

Same target (random Llama, 6 layers of width 128), same SAE (top-32 of 4,096 features, after layer 3), same random
tokens, contexts of 256 in windows of 64, one thread. Each runs in a process of its own, so that its peak is its own.
The second is written from delphi's description of itself: dense latents of each batch, their non-zeros and places kept
and joined, saved in 5 parts in half precision, read back, sorted by latent, and windows built for each latent in turn.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ray_explain.features.exemplars import TopWindows, Windows, search
from ray_explain.features.sae import SAE
from ray_explain.interventions.extraction import residuals

D_MODEL, D_SAE, K, LAYER, CONTEXT, WINDOW, BATCH, VOCABULARY = 128, 4096, 32, 3, 256, 64, 32, 512
TOP, RANDOM = 20, 10
PARTS = 5


def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "intermediate_size": 4 * D_MODEL,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def an_sae() -> SAE:
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(D_SAE, D_MODEL, generator=generator) / D_MODEL**0.5
    zeros: dict[str, Any] = {"encoder_bias": torch.zeros(D_SAE), "decoder_bias": torch.zeros(D_MODEL)}
    return SAE(encoder=encoder, directions=encoder, activation="topk", k=K, **zeros)


def contexts(n_tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (n_tokens // CONTEXT, CONTEXT), generator=torch.Generator().manual_seed(2))


def in_one_pass(n_tokens: int) -> dict[int, list[int]]:
    model, per_context = target(), CONTEXT // WINDOW

    def batches():
        start = 0
        for batch in contexts(n_tokens).split(BATCH):
            read = torch.cat(residuals(model, batch.tolist(), [LAYER], memory_budget=1 << 27)).reshape(
                -1, WINDOW, D_MODEL
            )
            ids = torch.arange(start, start + len(read))
            yield Windows(ids, batch.reshape(-1, WINDOW), read, torch.ones(len(read), WINDOW, dtype=torch.bool))
            start += per_context * len(batch)

    found = search(an_sae(), batches(), TopWindows(D_SAE, WINDOW, top=TOP, random=RANDOM, near=0))
    return {feature: [own.window for own in windows if own.kind == "top"] for feature, windows in found}


@torch.no_grad()
def by_materialising(n_tokens: int) -> dict[int, list[int]]:
    model, sae, batches = target(), an_sae(), contexts(n_tokens).split(BATCH)
    places, values = [], []
    for number, batch in enumerate(batches):
        kept: list[torch.Tensor] = []
        hook = model.model.layers[LAYER].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        model(batch)
        hook.remove()
        pre = torch.nn.functional.linear(kept[0], sae.encoder, sae.encoder_bias).relu()
        top = pre.topk(K, dim=-1, sorted=False)
        latents = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
        place = torch.nonzero(latents.abs() > 1e-5)
        values.append(latents[latents.abs() > 1e-5])
        place[:, 0] += number * BATCH
        places.append(place)
    with tempfile.TemporaryDirectory() as folder:
        save_parts(Path(folder), torch.cat(places), torch.cat(values))
        del places, values
        return read_parts(Path(folder), torch.cat(batches).reshape(-1, WINDOW))


def save_parts(folder: Path, places: torch.Tensor, values: torch.Tensor) -> None:
    bounds = torch.linspace(0, D_SAE, PARTS + 1).long().tolist()
    for start, stop in pairwise(bounds):
        mask = (places[:, 2] >= start) & (places[:, 2] < stop)
        part = {"places": places[mask].to(torch.int32), "values": values[mask].half()}
        save_file(part, folder / f"{start}.safetensors")


def read_parts(folder: Path, windows: torch.Tensor) -> dict[int, list[int]]:
    found = {}
    for path in folder.iterdir():
        part = load_file(path)
        places, values = part["places"].long(), part["values"].float()
        order = places[:, 2].argsort(stable=True)
        places, values = places[order], values[order]
        latents, counts = places[:, 2].unique_consecutive(return_counts=True)
        split = zip(latents.tolist(), places.split(counts.tolist()), values.split(counts.tolist()), strict=True)
        for latent, place, value in split:
            found[latent] = windows_of_latent(place, value, windows)
    return found


def windows_of_latent(place: torch.Tensor, value: torch.Tensor, windows: torch.Tensor) -> list[int]:
    flat = place[:, 0] * CONTEXT + place[:, 1]
    own, inverse, lengths = (flat // WINDOW).unique_consecutive(return_inverse=True, return_counts=True)
    inactive = torch.ones(len(windows), dtype=torch.bool)
    inactive[own] = False
    highest = torch.segment_reduce(value, "max", lengths=lengths)
    activations = torch.zeros(len(own), WINDOW)
    activations[inverse, flat % WINDOW] = value
    order = highest.argsort(descending=True)
    examples = list(zip(windows[own][order], activations[order], strict=True))  # all of them, as there
    others = inactive.nonzero().squeeze(1)
    assert len(windows[others[torch.randperm(len(others))[:RANDOM]]]) <= RANDOM
    assert len(examples) == len(own)
    return own[order[:TOP]].tolist()


def measured(name: str, n_tokens: int) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    found = {"in_one_pass": in_one_pass, "by_materialising": by_materialising}[name](n_tokens)
    figures = {
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_above_start_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }
    print(json.dumps({"figures": figures, "found": found}))


def main(n_tokens: int) -> None:
    results = {}
    for name in ("in_one_pass", "by_materialising"):
        command = [sys.executable, __file__, name, str(n_tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(name, results[name]["figures"], flush=True)
    ours, theirs = (results[name]["found"] for name in ("in_one_pass", "by_materialising"))
    shared = [len(set(ours[f]) & set(theirs.get(f, []))) / max(1, len(ours[f])) for f in ours]
    print(f"top windows in common: {sum(shared) / len(shared):.4f} (half precision there)")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measured(sys.argv[1], int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 1_000_000)
