"""Speed of the interventions against what one would use otherwise: one run, the same model, the same prompts.

`make bench`, or `OMP_NUM_THREADS=1 python tests/benchmarks/bench_interventions.py [shape ...]`; prints Markdown. On a
CPU, times are CPU seconds of the process, so that waiting for other programs does not count; each is the best of
several rounds in which all contestants take turns. Tools that are not installed get a row that says so.
"""

import argparse
import copy
import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from ray_explain.interventions.extraction import residuals
from ray_explain.interventions.hooks import Patch, capturing, writing
from ray_explain.interventions.patching import Intervention, patch_sweep

NOT_INSTALLED = "not installed"
os.environ.setdefault("TQDM_DISABLE", "1")  # TransformerLens draws a bar a round


@dataclass(frozen=True)
class Shape:
    """A model with random weights (speed does not depend on them), and how much of the work each contestant does."""

    config: Callable[..., hf.PreTrainedConfig]
    sizes: dict[str, int]
    dtype: torch.dtype
    full_batch: int  # rows
    rounds: int
    slow_every: int  # those that run one patch at a time do every so-manieth patch
    texts: int  # for extraction
    text_length: int


SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN_8B = LLAMA_8B | {"vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36}
SHAPES = {
    "12x256": Shape(hf.LlamaConfig, SMALL, torch.float32, 64, 5, 8, 32, 64),
    "llama-3.1-8b": Shape(hf.LlamaConfig, LLAMA_8B, torch.bfloat16, 128, 3, 16, 64, 256),
    "qwen3-8b": Shape(hf.Qwen3Config, QWEN_8B, torch.bfloat16, 128, 3, 16, 64, 256),
}
N_TOKENS = 16


class Sweep:
    """Every layer x position of one prompt, as each contestant would do it: hooks at their best (no cache of keys,
    logits only at the last position), the other tools as their manuals show it."""

    def __init__(self, model: Any, shape: Shape, device: str):
        self.model, self.shape, self.device = model, shape, device
        self.n_layers, self.d_model = shape.sizes["num_hidden_layers"], shape.sizes["hidden_size"]
        self.prompt = torch.randint(3, shape.sizes["vocab_size"], (N_TOKENS,)).tolist()
        self.ids = torch.tensor([self.prompt], device=device)
        self.sites = [(layer, p) for layer in range(self.n_layers) for p in range(N_TOKENS)]
        self.vectors = torch.randn(len(self.sites), self.d_model).to(device, shape.dtype)

    def ours(self) -> int:
        changes = [
            Intervention(base=0, positions=(p,), first_layer=layer, last_layer=layer, vectors=vector[None])
            for (layer, p), vector in zip(self.sites, self.vectors, strict=True)
        ]
        budget = 1 << (30 if self.device == "cpu" else 33)
        return sum(len(indices) for indices, _ in patch_sweep(self.model, [self.prompt], changes, memory_budget=budget))

    def full_batches(self) -> int:
        """Whole rows, one hook per layer and batch; as many layers share a batch as fit."""
        at_once = max(1, self.shape.full_batch // N_TOKENS)
        for first in range(0, self.n_layers, at_once):
            layers = range(first, min(first + at_once, self.n_layers))
            batch = self.ids.expand(len(layers) * N_TOKENS, -1)
            handles = []
            for i, layer in enumerate(layers):
                values = self.vectors[layer * N_TOKENS : (layer + 1) * N_TOKENS]
                hook = partial(_write_diagonal, rows=slice(i * N_TOKENS, (i + 1) * N_TOKENS), values=values)
                handles.append(self.model.model.layers[layer].register_forward_hook(hook))
            self.model(batch, use_cache=False, logits_to_keep=1)
            for handle in handles:
                handle.remove()
        return len(self.sites)

    def some(self) -> list[int]:
        return list(range(0, len(self.sites), self.shape.slow_every))

    def one_by_one(self) -> int:
        for i in self.some():
            layer, p = self.sites[i]
            at = torch.tensor([p], device=self.device)
            with writing(self.model, Patch(layer=layer, positions=at, values=self.vectors[i : i + 1])):
                self.model(self.ids, use_cache=False, logits_to_keep=1)
        return len(self.some())

    def nnsight(self) -> int:
        from nnsight import NNsight

        traced = NNsight(self.model)
        for i in self.some():
            layer, p = self.sites[i]
            with traced.trace(self.ids):
                traced.model.layers[layer].output[:, p] = self.vectors[i]
                traced.lm_head.output[:, -1].save()
        return len(self.some())

    def transformer_lens(self) -> int:
        """Its own loop over layers and positions; it keeps no subset, so all of them."""
        from transformer_lens import patching

        _, cache = self.lens.run_with_cache(self.ids)
        patching.get_act_patch_resid_pre(self.lens, self.ids, cache, lambda logits: logits[0, -1, 0])
        return len(self.sites)

    @cached_property
    def lens(self) -> Any:
        """A wrapped copy: wrapping changes the model."""
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        kind = type(self.model).__name__
        return build_bridge_from_module(copy.deepcopy(self.model), kind, hf_config=self.model.config).eval()

    def pyvene(self) -> int:
        import pyvene

        for layer in range(self.n_layers):
            here = [i for i in self.some() if self.sites[i][0] == layer]
            where = {"layer": layer, "component": "block_output", "intervention_type": pyvene.VanillaIntervention}
            wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([where]), model=self.model)
            wrapped.set_device(self.device)
            for i in here:
                source = self.vectors[i][None, None]
                at = {"sources->base": self.sites[i][1]}
                wrapped({"input_ids": self.ids}, unit_locations=at, source_representations=[source])
        return len(self.some())


def _write_diagonal(module: Any, args: Any, output: torch.Tensor, rows: slice, values: torch.Tensor) -> torch.Tensor:
    written = output.clone()
    at = torch.arange(rows.start, rows.stop, device=output.device)
    written[at, torch.arange(len(values), device=output.device)] = values
    return written


class Extraction:
    """The residual stream after the middle block, at every token of some texts."""

    def __init__(self, model: Any, shape: Shape, device: str, ragged: bool):
        self.model, self.device = model, device
        self.layer = shape.sizes["num_hidden_layers"] // 2
        shortest = shape.text_length // 4 if ragged else shape.text_length
        lengths = torch.linspace(shortest, shape.text_length, shape.texts).int().tolist()
        self.texts = [torch.randint(3, shape.sizes["vocab_size"], (n,)).tolist() for n in lengths]
        self.n_tokens = sum(lengths)
        longest = max(lengths)
        padded = [[0] * (longest - len(ids)) + ids for ids in self.texts]
        self.batch = torch.tensor(padded, device=device)
        self.mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)

    def ours(self) -> int:
        residuals(self.model, self.texts, [self.layer])
        return self.n_tokens

    def transformers(self) -> int:
        """Without the unembedding, which nobody reads here."""
        given = {"input_ids": self.batch, "attention_mask": self.mask, "use_cache": False}
        streams = self.model.model(**given, output_hidden_states=True).hidden_states
        assert len(streams[self.layer + 1][self.mask.bool()]) == self.n_tokens
        return self.n_tokens

    def hook(self) -> int:
        with capturing(self.model, [self.layer]) as streams:
            self.model.model(input_ids=self.batch, attention_mask=self.mask, use_cache=False)
        assert len(streams[self.layer][self.mask.bool()]) == self.n_tokens
        return self.n_tokens

    def nnsight(self) -> int:
        """Stopped after the block."""
        from nnsight import NNsight

        traced = NNsight(self.model)
        with traced.trace(self.batch, attention_mask=self.mask, use_cache=False) as tracer:
            stream = traced.model.layers[self.layer].output.save()
            tracer.stop()
        assert len(stream[self.mask.bool()]) == self.n_tokens
        return self.n_tokens


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def rates(contestants: dict[str, Callable[[], int]], rounds: int, device: str) -> dict[str, float | str]:
    """Units per second, the best of some rounds; or why a contestant could not run."""
    best: dict[str, float | str] = {}
    for round_ in range(rounds + 1):
        for name, run in contestants.items():
            if isinstance(best.get(name), str):
                continue
            try:
                begin = clock(device)
                n = run()
                rate = n / (clock(device) - begin)
            except ModuleNotFoundError as missing:
                best[name] = f"{NOT_INSTALLED} ({missing.name})"
            else:
                if round_ > 0:  # the first one warms up
                    best[name] = max(rate, float(best.get(name, 0.0)))
    return best


def ceiling(shape: Shape, device: str) -> float:
    """Operations per second of a large matrix product."""
    n = 1024 if device == "cpu" else 8192
    one = torch.randn(n, n).to(device, shape.dtype)
    other, best = one.clone(), 0.0
    for _ in range(10):
        begin = clock(device)
        for _ in range(4):
            one @ other
        best = max(best, 8 * n**3 / (clock(device) - begin))
    return best


def table(title: str, unit: str, measured: dict[str, float | str], first: str) -> None:
    print(f"\n### {title}\n\n| | {unit} | {first} is faster by |\n| --- | ---: | ---: |")
    ours = float(measured[first])
    for name, rate in measured.items():
        if isinstance(rate, str):
            print(f"| {name} | {rate} | |")
        else:
            print(f"| {name} | {rate:,.0f} | {ours / rate:.2f}x |")


def bench(name: str, device: str) -> None:
    shape = SHAPES[name]
    torch.manual_seed(0)
    with torch.device(device):
        config = shape.config(**shape.sizes, bos_token_id=1, eos_token_id=2)
        model: Any = hf.AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval().requires_grad_(False)
    sweep = Sweep(model, shape, device)
    ours = "ray_explain, patch_sweep"
    measured = rates(
        {
            ours: sweep.ours,
            f"full batches of {shape.full_batch} with hooks": sweep.full_batches,
            "one hook per forward pass": sweep.one_by_one,
            "nnsight, one trace per patch": sweep.nnsight,
            "TransformerLens, patching loop": sweep.transformer_lens,
            "pyvene, one call per patch": sweep.pyvene,
        },
        shape.rounds,
        device,
    )
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    title = f"{name}, {N_TOKENS} tokens, every layer x position ({len(sweep.sites)}), {shape.dtype}, {where}"
    table(title, "interventions/s", measured, ours)
    with FlopCounterMode(display=False) as counter:
        sweep.ours()
    achieved, most = counter.get_total_flops() * float(measured[ours]) / len(sweep.sites), ceiling(shape, device)
    print(f"\npatch_sweep: {counter.get_total_flops() / len(sweep.sites) / 1e9:.3f} GFLOP per intervention, ", end="")
    print(f"{achieved / 1e12:.3f} of {most / 1e12:.3f} TFLOP/s of a large matrix product: {achieved / most:.0%}")
    for ragged in (False, True):
        reading = Extraction(model, shape, device, ragged)
        ours = "ray_explain, residuals"
        contestants = {
            ours: reading.ours,
            "transformers, output_hidden_states": reading.transformers,
            "one hook": reading.hook,
            "nnsight, stopped after the block": reading.nnsight,
        }
        kind = f"{shape.text_length // 4} to {shape.text_length}" if ragged else f"{shape.text_length}"
        title = f"{name}, layer {reading.layer} of {shape.texts} texts of {kind} tokens"
        table(title, "tokens/s", rates(contestants, shape.rounds, device), ours)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["llama-3.1-8b", "qwen3-8b"] if gpu else ["12x256"])
    shapes = parser.parse_args().shapes
    if not gpu:
        torch.set_num_threads(1)
    packages = ["torch", "transformers", "nnsight", "transformer-lens", "pyvene"]
    versions = [f"{p} {_version(p)}" for p in packages]
    print("python tests/benchmarks/bench_interventions.py", *shapes, "with", ", ".join(versions))
    with torch.no_grad():
        for name in shapes:
            bench(name, "cuda" if gpu and name != "12x256" else "cpu")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


if __name__ == "__main__":
    main()
