"""Features at size: exemplar search in one pass, and the decoder directions of a large SAE read through into questions.

    python tests/benchmarks/bench_features.py exemplars [tokens]
    python tests/benchmarks/bench_features.py directions [features] [width]

`exemplars`: against materialising all latents first, which is how delphi does it. Same target (random Llama, 6 layers
of width 128), same SAE (top-32 of 4,096 features, after layer 3), same random tokens, contexts of 256 in windows of 64,
one thread. The second is written from delphi's description of itself: dense latents of each batch, their non-zeros and
places kept and joined, saved in 5 parts in half precision, read back, sorted by latent, and windows built for each
latent in turn. Bars: at least twice as fast, with a peak of memory under a third.

`directions`: random directions on disk (131,072 x 4,096, 2 GiB in float32, unless given), with a description each,
through the stage that makes effects and then into questions, as the jobs do it. Bar: at most 1 GiB resident.

Each measurement runs in a process of its own, so that its peak is its own; pages of mapped files count.
"""

import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ray_explain.features.exemplars import TopWindows, Windows, search
from ray_explain.features.sae import SAE
from ray_explain.interventions.extraction import residuals

D_MODEL, D_SAE, K, LAYER, CONTEXT, WINDOW, BATCH, VOCABULARY = 128, 4096, 32, 3, 256, 64, 32, 512
TOP, RANDOM = 20, 10
PARTS = 5
SLICE = 256

Found = dict[int, list[tuple[int, float]]]  # of each feature, its top windows with their highest activations


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


def in_one_pass(n_tokens: int) -> Found:
    model, per_context = target(), CONTEXT // WINDOW

    def batches():
        start = 0
        for batch in contexts(n_tokens).split(BATCH):
            read = torch.cat(residuals(model, batch.tolist(), [LAYER], memory_budget=1 << 25)).reshape(
                -1, WINDOW, D_MODEL
            )
            ids = torch.arange(start, start + len(read))
            yield Windows(ids, read, torch.ones(len(read), WINDOW, dtype=torch.bool))
            start += per_context * len(batch)

    found = search(an_sae(), batches(), TopWindows(D_SAE, WINDOW, top=TOP, random=RANDOM, near=0))
    return {
        feature: [(own.window, float(own.activations.max())) for own in windows if own.kind == "top"]
        for feature, windows in found
    }


@torch.no_grad()
def by_materialising(n_tokens: int) -> Found:
    model, sae, batches = target().model, an_sae(), contexts(n_tokens).split(BATCH)
    places: Any = []
    values: Any = []
    for number, batch in enumerate(batches):
        kept: list[torch.Tensor] = []
        hook = model.layers[LAYER].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        model(batch)
        hook.remove()
        pre = torch.nn.functional.linear(kept[0], sae.encoder, sae.encoder_bias).relu()
        top = pre.topk(K, dim=-1, sorted=False)
        latents = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
        place = torch.nonzero(latents.abs() > 1e-5)
        values.append(latents[latents.abs() > 1e-5])
        place[:, 0] += number * BATCH
        places.append(place)
    places, values = torch.cat(places), torch.cat(values)  # the parts are let go, as there
    with tempfile.TemporaryDirectory() as folder:
        save_parts(Path(folder), places, values)
        del places, values
        return read_parts(Path(folder), torch.cat(batches).reshape(-1, WINDOW))


def save_parts(folder: Path, places: torch.Tensor, values: torch.Tensor) -> None:
    bounds = torch.linspace(0, D_SAE, PARTS + 1).long().tolist()
    for start, stop in pairwise(bounds):
        mask = (places[:, 2] >= start) & (places[:, 2] < stop)
        own = places[mask].numpy()
        own[:, 2] -= start
        small = own[:, 2].max() < 2**16 and own[:, 0].max() < 2**16
        part = {"places": own.astype(np.uint16 if small else np.uint32), "values": values[mask].half().numpy()}
        save_file(part, folder / f"{start}.safetensors")


def read_parts(folder: Path, windows: torch.Tensor) -> Found:
    found = {}
    for path in folder.iterdir():
        part = load_file(path)
        places, values = torch.from_numpy(part["places"].astype(np.int64)), torch.from_numpy(part["values"])
        places[:, 2] += int(path.stem)
        order = places[:, 2].argsort(stable=True)
        places, values = places[order], values[order]
        latents, counts = places[:, 2].unique_consecutive(return_counts=True)
        split = zip(latents.tolist(), places.split(counts.tolist()), values.split(counts.tolist()), strict=True)
        for latent, place, value in split:
            found[latent] = windows_of_latent(place, value, windows)
    return found


def windows_of_latent(place: torch.Tensor, value: torch.Tensor, windows: torch.Tensor) -> list[tuple[int, float]]:
    flat = place[:, 0] * CONTEXT + place[:, 1]
    inactive = torch.ones(len(windows), dtype=torch.bool)
    inactive[(flat // WINDOW).unique()] = False
    own, inverse, lengths = (flat // WINDOW).unique_consecutive(return_inverse=True, return_counts=True)
    highest = torch.segment_reduce(value, "max", lengths=lengths)
    activations = torch.zeros(len(own), WINDOW, dtype=value.dtype)
    activations[inverse, flat % WINDOW] = value
    order = highest.argsort(descending=True)
    examples = list(zip(windows[own][order], activations[order], strict=True))  # all of them, as there
    others = inactive.nonzero().squeeze(1)
    assert len(windows[others[torch.randint(len(others), (RANDOM,))]]) == RANDOM
    assert len(examples) == len(own)
    return list(zip(own[order[:TOP]].tolist(), highest[order[:TOP]].tolist(), strict=True))


def made_questions(folder: str, d_sae: int, d_model: int) -> int:
    """The features of `write_directions` as questions, slice by slice; returns how many."""
    import pyarrow as pa

    from ray_explain import records, storage
    from ray_explain.ground_truth.describers import DESCRIBED
    from ray_explain.ground_truth.description_scores import ScoreStage
    from ray_explain.ground_truth.features import split_features
    from ray_explain.questions.features import features_questions

    settings = {"source": "sae", "sae": {"path": f"{folder}/sae", "revision": None}, "folder": "", "d_model": d_model}
    stage = ScoreStage(settings | {"simulator": None, "detector": None, "gold_from": -1.0, "seed": 0})
    for start in range(0, d_sae, SLICE):
        rows = [described(number) for number in range(start, min(start + SLICE, d_sae))]
        made = stage(records.rows_table([dict.fromkeys(DESCRIBED.names) | row for row in rows], DESCRIBED)).table
        storage.write_table(made, f"{folder}/effects/part-{start:010d}.parquet", row_group_size=SLICE)
    n = 0
    with storage.table_writer(f"{folder}/questions/table.parquet", row_group_size=SLICE) as write:
        for effects in storage.read_tables(f"{folder}/effects"):
            questions: pa.Table = features_questions(*split_features(effects), wording="paper", seed=0).table
            write(questions)
            n += questions.num_rows
    return n


def described(number: int) -> dict[str, Any]:
    told = [{"description": f"description {number}", "origin": "nobody"}]
    own = {"case_id": f"case {number}", "group": f"group {number}", "split": "train", "layer": 0, "source": "sae"}
    return own | {"feature_id": number, "fired": 1, "seen": 1, "windows": [], "descriptions": told}


def write_directions(folder: Path, d_sae: int, d_model: int) -> None:
    """A safetensors file in our own layout, written part by part; its encoder is small numbers nobody reads."""
    folder.mkdir(parents=True)
    sizes = {
        "directions": ("F32", [d_sae, d_model], 4 * d_sae * d_model),
        "encoder": ("BF16", [d_sae, d_model], 2 * d_sae * d_model),
        "encoder_bias": ("F32", [d_sae], 4 * d_sae),
        "decoder_bias": ("F32", [d_model], 4 * d_model),
    }
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with open(folder / "sae.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, d_sae, 1024):
            file.write(torch.randn(min(1024, d_sae - start), d_model, generator=generator).numpy().tobytes())
        file.truncate(8 + len(text) + end)
    settings = {item.name: item.default for item in fields(SAE) if item.default is not MISSING}
    settings = {name: value for name, value in settings.items() if name != "threshold"} | {"declared": {}}
    (folder / "sae.json").write_text(json.dumps(settings))


def measured(name: str, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    if name == "directions":
        found: Any = made_questions(sys.argv[2], *numbers)
    else:
        found = {"in_one_pass": in_one_pass, "by_materialising": by_materialising}[name](*numbers)
    figures = {
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_above_start_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }
    print(json.dumps({"figures": figures, "found": found}))


def in_a_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "measure", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def exemplars(n_tokens: int = 1_000_000) -> None:
    results = {name: in_a_child(name, str(n_tokens)) for name in ("in_one_pass", "by_materialising")}
    for name, result in results.items():
        print(name, result["figures"], flush=True)
    ours, theirs = (results[name]["figures"] for name in ("in_one_pass", "by_materialising"))
    print(f"CPU time: {theirs['cpu_s'] / ours['cpu_s']:.2f} x as fast (at least 2)")
    print(f"peak of memory: {ours['peak_mib'] / theirs['peak_mib']:.2f} of theirs (under 0.33)")
    found, other = (results[name]["found"] for name in ("in_one_pass", "by_materialising"))
    found = {feature: own for feature, own in found.items() if own}
    assert found.keys() == other.keys(), "a feature that only one of the two found active"
    pairs = [(found[f], other[f]) for f in found]
    shared = sum(len({w for w, _ in a} & {w for w, _ in b}) for a, b in pairs) / sum(len(a) for a, _ in pairs)
    apart = max(abs(x / y - 1) for a, b in pairs for (_, x), (_, y) in zip(a, b, strict=True))
    print(f"top windows in common: {shared:.4f}; activations of the same rank: at most {apart:.1e} apart")
    print("(kept in half precision there, so windows whose activations are that near may change places)")


def directions(d_sae: int = 131_072, d_model: int = 4096) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_directions(Path(folder, "sae"), d_sae, d_model)
        result = in_a_child("directions", folder, str(d_sae), str(d_model))
        print(f"{d_sae} x {d_model}: {result['found']} questions", result["figures"])
        print(f"resident: {result['figures']['peak_mib']} MiB at most (bar: 1024)")


if __name__ == "__main__":
    name, *rest = sys.argv[1:] or ["exemplars"]
    if name == "measure":
        sys.argv = sys.argv[1:]
        measured(rest[0], [int(number) for number in rest[1:] if number.isdigit()])
    else:
        {"exemplars": exemplars, "directions": directions}[name](*map(int, rest))
