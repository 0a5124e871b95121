"""Planned and measured memory of training steps: `python tests/benchmarks/bench_memory.py`; each has its own process.

Measured is how much the resident memory grows, from the imports to the peak of three steps. CPU, one worker, random
weights; prints Markdown.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SIZES = {  # d_model, layers, d_vocab
    "20M": (384, 8, 8_000),
    "60M": (640, 10, 8_000),
    "130M": (896, 10, 16_000),
}
KINDS: list[dict[str, Any]] = [{}, {"precision": "bfloat16"}, {"lora": {"rank": 64}}, {"gradient_checkpointing": True}]
ROWS, TOKENS, ANSWER = 8, 48, 8


def config_of(size: str) -> Any:
    from transformers import LlamaConfig

    d_model, n_layers, d_vocab = SIZES[size]
    return LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=d_model * 11 // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 64,
        num_key_value_heads=d_model // 64,
        head_dim=64,
    )


def planned(size: str, train: dict[str, Any]) -> Any:
    from ray_explain.explainer.memory import footprint, peak

    made = footprint(
        config_of(size),
        dtype=train.get("precision", "float32"),
        lora_rank=train["lora"]["rank"] if "lora" in train else None,
        n_beside=3 * SIZES[size][0] if "lora" in train else 0,
        gradient_checkpointing=train.get("gradient_checkpointing", False),
        rows=ROWS,
        tokens=TOKENS,
        answer_tokens=ANSWER,
    )
    return peak(made, zero_stage=train["zero_stage"], workers=1, offload=False)


def measured(size: str, train: dict[str, Any]) -> int:
    """Bytes, in a child process."""
    # With these glibc gives freed pages back at once: only what is in use is to be counted.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_MMAP_MAX_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    child = [sys.executable, __file__, "--child", size, json.dumps(train)]
    done = subprocess.run(child, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.strip().splitlines()[-1])


def _measure(size: str, train: dict[str, Any]) -> int:
    import deepspeed  # noqa: F401 - before the first look
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from ray_explain.config import TrainConfig
    from ray_explain.distributed.training_setup import new_engine
    from ray_explain.explainer.batches import answer_tokens, collate
    from ray_explain.explainer.markers import Markers
    from ray_explain.explainer.module import Explainer
    from ray_explain.explainer.optimise import with_lora
    from ray_explain.explainer.projection import Projection

    config, section = config_of(size), TrainConfig.model_validate({"batch_size": ROWS, **train})
    os.environ.update({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = resident()
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, section.precision))
    if section.lora is not None:
        model.requires_grad_(False)
        model = with_lora(model, **section.lora.model_dump())
    markers = Markers("<b>", "<v>", "<e>", 5, 6, 7, added=False)
    projection = Projection("identity", config.hidden_size, config.hidden_size)
    explainer = Explainer(model, markers, projection, train_markers=section.lora is not None)
    if section.gradient_checkpointing:
        explainer.checkpoint_gradients()
    engine = new_engine(explainer, section, 1)
    examples = _examples(config.hidden_size)
    engine.train()
    highest = Highest()
    for _ in range(3):
        outcome = engine(collate(examples, 0), n_answer_tokens=answer_tokens(examples))
        engine.backward(outcome.loss)
        engine.step()
    return highest.stop() - before


class Highest:
    """The largest resident memory from here on, looked at every two milliseconds."""

    def __init__(self) -> None:
        self._over, self._found = threading.Event(), 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self._found = max(self._found, resident())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._found


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _examples(d_model: int) -> list[Any]:
    import numpy as np

    from ray_explain.explainer.examples import Example

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1, d_model)).astype(np.float32)
    ids = [5, 6, 7, *rng.integers(8, 8000, TOKENS - 3).tolist()]
    return [Example(ids, TOKENS - ANSWER, vectors, (1,), f"q{i}", "patching") for i in range(ROWS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    if arguments.child:
        print(_measure(arguments.child[0], json.loads(arguments.child[1])))
        return
    print("| model | training | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|---|")
    for size, stage, kind in itertools.product(arguments.sizes, arguments.stages, KINDS):
        train = {"zero_stage": stage, **kind}
        plan, found = planned(size, train).total, measured(size, train)
        numbers = f"{plan / 1e6:.0f} | {found / 1e6:.0f} | {plan / found:.2f}"
        print(f"| {size} | ZeRO-{stage} {' '.join(kind) or 'float32'} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
