"""Training of small target models on the texts of a world: plain PyTorch, one thread, interruptible.

Documents are packed into rows, but attend to themselves only and count positions from their own begin; losses weigh
words by how much can be learned from them. Without either, small models do not learn the facts in this budget.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ray_explain.world.corpus import documents
from ray_explain.world.documents import FREE_WEIGHT, Document
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import MAX_TOKENS

Architecture = Literal["llama", "qwen3"]

ROW_TOKENS, ROWS = 64, 6
TOKENS_PER_STEP = ROW_TOKENS * ROWS
FACTS_FIRST_SHARE = 0.35
"""Share of the steps on the first mixture of documents, which has no quizzes."""
STATE_FILE = "state.safetensors"
LEARNING_RATE, EMBEDDING_RATE_FACTOR, WEIGHT_DECAY, CLIP_NORM = 3e-3, 6.0, 0.05, 1.0
WARM_UP_SHARE, DECAY_SHARE = 0.05, 0.40
LOCAL_ROWS_SHARE, LOCAL_WINDOW = 0.2, 2
"""Share of the rows in which the first block attends to the last `LOCAL_WINDOW` tokens only, in training. Without it
some seeds read a fact off the subject's bare embedding, in the first block at the last word: then no later layer holds
anything at the subject, and patching there does nothing. Large models enrich the subject first (Meng et al. 2022)."""


@dataclass(frozen=True, kw_only=True)
class TargetSize:
    """Width, depth and heads of a small target; heads share no keys, embeddings are tied."""

    d_model: int = 96
    n_layers: int = 4
    n_heads: int = 4

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} with {self.n_heads} heads: heads need an even, whole width")


class PackedBatch(NamedTuple):
    """Documents side by side in rows. `document` numbers the documents of a row from 1; 0 is padding. `weights` are
    those of the token at the same position (not of the next one). In `local` rows the first block sees little."""

    input_ids: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    document: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]
    local: Bool[Tensor, " batch"]


class Progress(NamedTuple):
    """After `step` of `n_steps`; `loss` is the weighted mean over the step's tokens, in nats."""

    step: int
    n_steps: int
    loss: float


def pretrain(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: Architecture,
    seed: int,
    tokens: int,
    size: TargetSize | None = None,
    checkpoints: Path | None = None,
    checkpoint_every: int = 200,
    on_step: Callable[[Progress], None] | None = None,
) -> PreTrainedModel:
    """A target trained on about `tokens` tokens of the world's texts; `seed` decides its initial weights and texts.

    With a folder for `checkpoints`, the state is kept there every `checkpoint_every` steps, and a run that finds a
    state of the same run goes on from it, to the same weights as without an interruption. The caller removes the
    folder when the result is safe.

    Raises: ValueError: fewer tokens than one step, or the folder holds another run's state.
    """
    n_steps = tokens // TOKENS_PER_STEP
    if n_steps < 1:
        raise ValueError(f"{tokens} tokens of training: one step alone takes {TOKENS_PER_STEP}")
    size = size or TargetSize()
    model = new_target(architecture, tokenizer, size, seed)
    optimizer = _optimizer(model)
    run = {"world": asdict(world), "architecture": architecture, "seed": seed, "steps": n_steps, "size": asdict(size)}
    run["vocabulary"] = len(tokenizer)
    done = _load_checkpoint(checkpoints, run, model, optimizer) if checkpoints else 0
    with single_thread():
        for step in range(done, n_steps):
            loss = _train_step(model, optimizer, _batch(world, tokenizer, seed, step, n_steps), step, n_steps)
            if on_step:
                on_step(Progress(step + 1, n_steps, loss))
            if checkpoints and (step + 1) % checkpoint_every == 0 and step + 1 < n_steps:
                _save_checkpoint(checkpoints, run, step + 1, model, optimizer)
    return model.eval()


def new_target(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, size: TargetSize, seed: int
) -> PreTrainedModel:
    """A model with random weights; the same for the same seed. The global random state is left as it was."""
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=size.d_model,
        intermediate_size=3 * size.d_model,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        head_dim=size.d_model // size.n_heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**settings))
        if architecture == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**settings))
    raise ValueError(f"architecture {architecture!r}: a small target is llama or qwen3")


def save_target(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, which `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread within: several make matrices as small as these slower, and sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def packed(
    stream: Iterator[Document], tokenizer: PreTrainedTokenizerFast, rows: int = ROWS, row_tokens: int = ROW_TOKENS
) -> PackedBatch:
    """Rows filled with whole documents, each between a begin and an end token. A document that does not fit into the
    rest of a row begins the next one; the one that does not fit into the last row is dropped.

    Raises: ValueError: a document is longer than a row.
    """
    vocabulary = tokenizer.get_vocab()
    ids = torch.full((rows, row_tokens), tokenizer.pad_token_id)
    positions, document, weights = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros(rows, row_tokens)
    row, start, number = 0, 0, 1
    for doc in stream:
        length = len(doc.words) + 2
        if length > row_tokens:
            raise ValueError(f"document of {length} tokens in rows of {row_tokens}: {doc.text!r}")
        if start + length > row_tokens:
            row, start, number = row + 1, 0, 1
        if row == rows:
            break
        place = slice(start, start + length)
        words = [vocabulary[word.text] for word in doc.words]
        ids[row, place] = torch.tensor([tokenizer.bos_token_id, *words, tokenizer.eos_token_id])
        weights[row, place] = torch.tensor([0.0, *(word.weight for word in doc.words), FREE_WEIGHT])
        positions[row, place] = torch.arange(length)
        document[row, place] = number
        start, number = start + length, number + 1
    return PackedBatch(ids, positions, document, weights, torch.zeros(rows, dtype=torch.bool))


def attention_within_documents(document: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch 1 pos pos"]:
    """True where a token may look: backwards, and within its document."""
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones_like(same[0]).tril()).unsqueeze(1)


def learning_rate_factor(step: int, n_steps: int) -> float:
    """Warm-up, a plateau at 1, a linear decay to 0 (warm-up-stable-decay)."""
    warm_up, decay = max(1, round(WARM_UP_SHARE * n_steps)), max(1, round(DECAY_SHARE * n_steps))
    return min(1.0, (step + 1) / warm_up, (n_steps - step) / decay)


def _batch(world: World, tokenizer: PreTrainedTokenizerFast, seed: int, step: int, n_steps: int) -> PackedBatch:
    """Depends on nothing but its arguments, so that a resumed run sees the texts it would have seen."""
    phase = int(step >= FACTS_FIRST_SHARE * n_steps)
    rng = random.Random(f"local rows {seed} {step}")
    batch = packed(documents(world, f"{seed} {step}", phase), tokenizer)
    return batch._replace(local=torch.tensor([rng.random() < LOCAL_ROWS_SHARE for _ in batch.local]))


def _optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    embedding = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [{"params": others, "scale": 1.0}, {"params": [embedding], "scale": EMBEDDING_RATE_FACTOR}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def _train_step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, batch: PackedBatch, step: int, n_steps: int
) -> float:
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * group["scale"] * learning_rate_factor(step, n_steps)
    loss = _weighted_loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return loss.item()


def _weighted_loss(model: PreTrainedModel, batch: PackedBatch) -> Float[Tensor, ""]:
    mask = attention_within_documents(batch.document)
    near = torch.ones_like(mask[0]).triu(1 - LOCAL_WINDOW)
    with _first_block_mask(model, mask & (near | ~batch.local[:, None, None, None])):
        logits = model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).logits
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()  # begin tokens weigh 0: none is predicted from the document before
    return (losses * weights).sum() / weights.sum()


@contextmanager
def _first_block_mask(model: PreTrainedModel, mask: Bool[Tensor, "batch 1 pos pos"]) -> Iterator[None]:
    def swap(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": mask}

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _save_checkpoint(folder: Path, run: dict, step: int, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> None:
    """One file, replaced as a whole: a kill at any moment leaves this state or the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    fresh = folder / f"{STATE_FILE}.new"
    save_file(tensors, fresh, metadata={"run": json.dumps(run, sort_keys=True), "step": str(step)})
    os.replace(fresh, folder / STATE_FILE)


def _load_checkpoint(folder: Path, run: dict, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> int:
    """The number of steps done; 0, and nothing loaded, if there is no state."""
    path = folder / STATE_FILE
    if not path.exists():
        return 0
    with safe_open(path, "pt") as state:
        saved = state.metadata()
    if saved["run"] != json.dumps(run, sort_keys=True):
        raise ValueError(f"{path} is the state of another run, {saved['run']}, not of {run}: remove it")
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(saved["step"])
