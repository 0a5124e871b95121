"""Speed of explainer training against what one would use otherwise: the same model, data and threads, in one run.

`make bench`, or `OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py [part ...]`; prints Markdown. `--gpu` does
the part for a GPU. Throughput counts answer tokens, those that are learned, by wall time: run it on a quiet machine.
"""

import argparse
import gc
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Trainer, TrainingArguments

from ray_explain.explainer.batches import collate, training_steps
from ray_explain.explainer.examples import Example
from ray_explain.explainer.markers import Markers
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection
from ray_explain.explainer.training import PlainTraining, StepReport, train_plain
from ray_explain.interventions.layout import layout_of

MARKERS = Markers("<b>", "<v>", "<e>", 5, 6, 7, added=False)
BATCH, LAYERS_OF_TARGET = 16, 4
STEPS_PER_LINE = 10  # of a training's curve
SIZES = {  # d_model, layers, heads, d_vocab
    "demo size, 400 words": (96, 4, 4, 400),
    "128k vocabulary": (192, 4, 4, 128_256),
}


def small_model(size: str) -> Any:
    d_model, n_layers, n_heads, d_vocab = SIZES[size]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=d_vocab,
            hidden_size=d_model,
            intermediate_size=3 * d_model,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_heads,
            tie_word_embeddings=True,
        )
    )


def new_examples(n: int, d_model: int, d_vocab: int, *, shortest: int = 15, longest: int = 90) -> list[Example]:
    """Prompts of `shortest` to `longest` tokens with one vector, answers of 6 to 14."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(n):
        prompt = [1, 5, 6, 7, *rng.integers(8, d_vocab, int(rng.integers(shortest, longest))).tolist()]
        answer = rng.integers(8, d_vocab, int(rng.integers(6, 15))).tolist()
        vectors = rng.standard_normal((1, d_model)).astype(np.float32)
        examples.append(Example([*prompt, *answer], len(prompt), vectors, (i % LAYERS_OF_TARGET,), f"q{i}", "patching"))
    return examples


def explainer_of(model: Any) -> Explainer:
    d_model = model.config.hidden_size
    return Explainer(model, MARKERS, Projection("identity", d_model, d_model))


# -- against a Hugging Face Trainer -----------------------------------------------------------------------------------


class FullLogits(nn.Module):
    """The reference's way: logits at every position, masked labels, mean over the padded batch."""

    def __init__(self, explainer: Explainer) -> None:
        super().__init__()
        self.explainer = explainer

    def forward(self, batch: Any) -> dict[str, Tensor]:
        with self.explainer.reading(batch):
            out = self.explainer.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        labels = batch.input_ids.masked_fill(~batch.answer, -100)[:, 1:]
        loss = cross_entropy(out.logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return {"loss": loss}


def with_hugging_face(size: str, examples: Sequence[Example]) -> float:
    """Seconds of one epoch in the order of the data set, padded to the longest of each batch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            report_to=[],
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = Trainer(
            FullLogits(explainer_of(small_model(size))),
            arguments,
            train_dataset=list(examples),  # type: ignore[arg-type]
            data_collator=lambda rows: {"batch": collate(rows, 0)},  # type: ignore[arg-type]
        )
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def with_plain_loop(size: str, examples: Sequence[Example]) -> float:
    """Seconds of one epoch."""
    explainer = explainer_of(small_model(size))
    config = PlainTraining(epochs=1, batch_size=BATCH, learning_rate=1e-4)
    started = time.perf_counter()
    train_plain(explainer, examples, config, pad_id=0)
    return time.perf_counter() - started


def against_hugging_face(n: int, rounds: int) -> None:
    print("\n| model | Trainer, full logits: answer tokens/s | ours | times as fast |\n|---|---|---|---|")
    for size, (d_model, _, _, d_vocab) in SIZES.items():
        examples = new_examples(n // 5 if d_vocab > 100_000 else n, d_model, d_vocab)  # each takes ten times as long
        n_tokens = sum(example.n_answer for example in examples)
        contestants: list[Callable[..., float]] = [with_hugging_face, with_plain_loop]
        for contestant in contestants:
            contestant(size, examples[:BATCH])  # warm-up
        best = [min(contestant(size, examples) for _ in range(rounds)) for contestant in contestants]
        theirs, ours = (n_tokens / seconds for seconds in best)
        print(f"| {size} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |", flush=True)


# -- memory of logits -------------------------------------------------------------------------------------------------


LOGITS = ("full", "answers only")


def memory_of_logits() -> None:
    print("\n| logits of 8 x 128 tokens, 8 of them answers, 128k vocabulary | peak, MB |\n|---|---|")
    for kind in LOGITS:
        child = [sys.executable, __file__, "--child", kind]
        environment = os.environ | {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
        done = subprocess.run(child, capture_output=True, text=True, env=environment, check=True)
        print(f"| {kind} | {int(done.stdout.split()[-1]) / 1e6:.0f} |", flush=True)


def _logits_child(kind: str) -> None:
    from bench_memory import Highest, resident  # beside this file

    explainer = explainer_of(small_model("128k vocabulary"))
    examples = new_examples(8, 192, 128_256, shortest=116, longest=117)
    examples = [one._replace(input_ids=one.input_ids[: one.n_prompt + 8]) for one in examples]
    module = FullLogits(explainer) if kind == "full" else explainer
    before, highest = resident(), Highest()
    out: Any = module(collate(examples, 0))
    (out["loss"] if kind == "full" else out.loss).backward()
    print(highest.stop() - before)


# -- what Ray and DeepSpeed cost --------------------------------------------------------------------------------------


WARM_UP = 20  # steps
RAY_ROWS = {  # size of the target, steps, what else the training section says
    "demo size": ({}, 120, {}),
    "demo size, a checkpoint every 20 steps": ({}, 120, {"checkpoint_every": 20}),
    "256 wide, 8 layers": ({"d_model": 256, "n_layers": 8}, 60, {}),
}


def against_plain_loop(rounds: int) -> None:
    """The same `TrainRun` with ZeRO 0 on one worker of Ray Train, and in a loop of a process without Ray, in turns.

    Medians of the rounds. The rate is that of the steps after the first `WARM_UP`, of which the seconds are told.
    """
    names = [
        "model",
        "plain loop: answer tokens/s",
        "Ray Train + DeepSpeed, ZeRO 0",
        "lost",
        f"its first {WARM_UP} steps",
    ]
    print(f"\n| {' | '.join(names)} |")
    print("|---|---|---|---|---|")
    for name, (size, steps, section) in RAY_ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = _demo_run(Path(folder), steps * BATCH, size, section)
            told = [(_plain(run, folder), _on_ray(run, folder)) for _ in range(rounds)]
        plain = statistics.median(_rate(windows) for windows, _ in told)
        # Lines of the curve are the same windows of the same steps: they hold as many tokens.
        on_ray = [[(n, n / rate) for (n, _), rate in zip(windows, rates, strict=True)] for windows, rates in told]
        ours = statistics.median(map(_rate, on_ray))
        first = statistics.median(sum(seconds for _, seconds in one[: WARM_UP // STEPS_PER_LINE]) for one in on_ray)
        print(f"| {name} | {plain:.0f} | {ours:.0f} | {100 * (1 - ours / plain):.1f} % | {first:.1f} s |", flush=True)


def _rate(windows: Sequence[tuple[float, float]]) -> float:
    """Answer tokens per second after the warm-up; of (tokens, seconds) of each ten steps."""
    tokens, seconds = (sum(part) for part in zip(*windows[WARM_UP // STEPS_PER_LINE :]))
    return tokens / seconds


def _on_ray(run: Any, folder: str) -> list[float]:
    """Answer tokens per second of each ten steps."""
    from ray_explain.config import ClusterConfig
    from ray_explain.distributed.cluster import cluster
    from ray_explain.distributed.train import train_all

    with cluster(folder, ClusterConfig()):
        train_all([run], folder, ClusterConfig())
    lines = Path(run.artifact.path(folder), "training.jsonl").read_text().splitlines()
    shutil.rmtree(run.artifact.path(folder))
    return [json.loads(line)["answer_tokens_per_second"] for line in lines]


def _plain(run: Any, folder: str) -> list[tuple[float, float]]:
    """(Answer tokens, seconds) of each ten steps; in a process of its own that has the workers' environment."""
    import ray_explain.distributed  # noqa: F401 - sets it

    Path(folder, "run").write_bytes(pickle.dumps(run))
    child = [sys.executable, __file__, "--child", f"{folder}/run"]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _plain_child(file: str) -> None:
    from ray_explain.distributed.training_setup import start_of

    run = pickle.loads(Path(file).read_bytes())
    start = start_of(run, workers=1)
    config = PlainTraining(epochs=1, batch_size=BATCH, learning_rate=run.train.learning_rate)
    windows, tokens, since = [], 0.0, time.perf_counter()

    def on_step(report: StepReport) -> None:
        nonlocal tokens, since
        tokens += report.n_answer_tokens
        if report.step % STEPS_PER_LINE == 0:
            now = time.perf_counter()
            windows.append((tokens, now - since))
            tokens, since = 0.0, now

    train_plain(start.explainer, start.examples, config, pad_id=start.pad_id, on_step=on_step)
    print(json.dumps(windows))


def _demo_run(folder: Path, n: int, size: dict[str, int], section: dict[str, Any]) -> Any:
    """Training on `n` questions about patches of a random target."""
    from ray_explain import storage
    from ray_explain.artifacts import Artifact
    from ray_explain.config import InjectionConfig, TrainConfig
    from ray_explain.distributed.train import TrainRun
    from ray_explain.ground_truth.patching import PatchingStage
    from ray_explain.ground_truth.positions import words_of_tokens
    from ray_explain.ground_truth.world_cases import patching_cases
    from ray_explain.questions.patching import patching_questions
    from ray_explain.world.facts import World
    from ray_explain.world.pretraining import TargetSize, new_target, save_target
    from ray_explain.world.tokenizer import world_tokenizer

    world, target = World(), {"model": str(folder / "target"), "revision": None, "dtype": "float32"}
    tokenizer = world_tokenizer(world)
    save_target(new_target("llama", tokenizer, TargetSize(**size), seed=0), tokenizer, folder / "target")
    cases = patching_cases(world, tokenizer, n={"train": n}, layers=[(i, i) for i in range(4)], seed=0)
    effects = PatchingStage(target)(cases).table
    asked = patching_questions(effects, partial(words_of_tokens, tokenizer), wording="brief", seed=0)
    storage.write_table(asked.table, f"{folder}/questions/table.parquet")
    train = TrainConfig(batch_size=BATCH, zero_stage=0, injection=InjectionConfig(scale="mean_embedding"), **section)
    return TrainRun(
        artifact=Artifact(kind="explainers", label="bench", config={}),
        model=target,
        target={"name": "target", "revision": None},
        questions=(f"{folder}/questions",),
        replay=(),
        train=train,
        seed=0,
        wording="brief",
    )


# -- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_SHAPES = {
    "Qwen3-1.7B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Qwen3-8B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def on_gpu(batch_size: int, steps: int) -> None:
    """bfloat16, random weights, prompts of 100 to 300 tokens; utilisation is of the rate of a large matrix product."""
    import torch.distributed as dist

    from ray_explain.config import LoraConfig, TrainConfig

    os.environ.update({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"})
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    rate = _matmul_rate()
    print(f"\n{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bfloat16 matrix products\n")
    names = ["model", "training", "tokens/s", "answer tokens/s", "utilisation", "peak, GiB", "planned, GiB"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    base = TrainConfig(batch_size=batch_size, precision="bfloat16", zero_stage=2, learning_rate=1e-5)
    for name in GPU_SHAPES:
        for kind in ({"lora": LoraConfig()}, {}, {"gradient_checkpointing": True}):
            _gpu_row(name, base.model_copy(update=kind), " ".join(kind) or "full", rate, steps)


def _gpu_row(name: str, train: Any, what: str, rate: float, steps: int) -> None:
    from ray_explain.distributed.training_setup import new_engine
    from ray_explain.explainer.batches import answer_tokens
    from ray_explain.explainer.memory import footprint, peak

    config = GPU_SHAPES[name]
    made = footprint(
        type(config)(**config.to_dict()),
        dtype="bfloat16",
        lora_rank=train.lora.rank if train.lora else None,
        n_beside=0,
        gradient_checkpointing=train.gradient_checkpointing,
        rows=train.batch_size,
        tokens=300,
        answer_tokens=12,
    )
    plan = peak(made, zero_stage=2, workers=1, offload=False).total
    if plan > torch.cuda.get_device_properties(0).total_memory:
        print(f"| {name} | {what} | does not fit | | | | {plan / 2**30:.1f} |", flush=True)
        return
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if train.lora:
        model = with_lora(model.requires_grad_(False), **train.lora.model_dump()).to("cuda")
    projection = Projection("identity", config.hidden_size, config.hidden_size)
    explainer = Explainer(model, MARKERS, projection, train_markers=bool(train.lora))
    if train.gradient_checkpointing:
        explainer.checkpoint_gradients()
    engine = new_engine(explainer, train, 1)
    examples = new_examples(train.batch_size * (steps + 2), config.hidden_size, 150_000, shortest=100, longest=280)
    lengths = [len(example.input_ids) for example in examples]
    order = training_steps(
        lengths, ["patching"] * len(examples), epochs=1, batch_size=train.batch_size, micro_batches=1, seed=0
    )
    engine.train()
    torch.cuda.reset_peak_memory_stats()
    for number, (chosen,) in enumerate(order):
        if number == 2:  # after a warm-up
            torch.cuda.synchronize()
            started = time.perf_counter()
        outcome = engine(collate([examples[i] for i in chosen], 0).to("cuda"), n_answer_tokens=None)
        engine.backward(outcome.loss)
        engine.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    seen = [examples[i] for (chosen,) in order[2:] for i in chosen]
    n_tokens = sum(len(example.input_ids) for example in seen)
    n_learned = answer_tokens(seen)
    flops = training_flops(model, n_tokens, n_learned)
    print(
        f"| {name} | {what} | {n_tokens / seconds:.0f} | {n_learned / seconds:.0f} | "
        f"{flops / seconds / rate:.2f} | {torch.cuda.max_memory_allocated() / 2**30:.1f} | {plan / 2**30:.1f} |",
        flush=True,
    )
    engine.destroy()
    del engine, explainer, model, outcome
    gc.collect()
    torch.cuda.empty_cache()


def training_flops(model: nn.Module, n_tokens: float, n_learned: float) -> float:
    """FLOP of forward and backward passes over so many tokens: 6 for each of them and each weight, 4 where the weight
    is frozen and needs no gradient of its own. The embedding table is only looked up, and the unembedding sees the
    tokens that are learned alone. Attention's products of tokens with tokens are left out."""
    layout = layout_of(model)
    head = layout.unembedding.weight
    tables = {id(head), id(layout.embedding.weight)}
    body = sum(_flops_each(one) for one in model.parameters() if id(one) not in tables)
    return body * n_tokens + _flops_each(head) * n_learned


def _flops_each(parameter: nn.Parameter) -> int:
    return (6 if parameter.requires_grad else 4) * parameter.numel()


def _matmul_rate(n: int = 8192, rounds: int = 30) -> float:
    """FLOP per second."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        a @ b
    torch.cuda.synchronize()
    return 2 * n**3 * rounds / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["trainer", "logits", "ray"], help="trainer, logits, ray")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--questions", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="on the GPU")
    parser.add_argument("--steps", type=int, default=20, help="on the GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.child:
        (_logits_child if arguments.child in LOGITS else _plain_child)(arguments.child)
        return
    if arguments.gpu:
        on_gpu(arguments.batch_size, arguments.steps)
        return
    if "trainer" in arguments.parts:
        against_hugging_face(arguments.questions, arguments.rounds)
    if "logits" in arguments.parts:
        memory_of_logits()
    if "ray" in arguments.parts:
        against_plain_loop(arguments.rounds)


if __name__ == "__main__":
    main()
