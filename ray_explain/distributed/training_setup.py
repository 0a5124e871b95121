"""What a training starts from: examples, the untrained explainer, and the order of the steps. Needs no running Ray."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.config import TrainConfig
from ray_explain.distributed.alignment import read_maps
from ray_explain.distributed.question_stream import Encoding, Piece, pieces_of, read_here
from ray_explain.distributed.train import TrainRun
from ray_explain.distributed.zero import engine_of, gathered, splitting, zero_config
from ray_explain.errors import BadInput
from ray_explain.explainer.batches import Step, training_steps
from ray_explain.explainer.examples import TEXT_TASK, Example, Question
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import Markers, markers_of
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import parameter_groups, with_lora
from ray_explain.explainer.projection import Kind, Projection
from ray_explain.explainer.vector_file import VectorFile
from ray_explain.explainer.vocabulary import make_room
from ray_explain.interventions.layout import layout_of
from ray_explain.models import load_model

Reader = Callable[[Encoding, Sequence[Piece]], Iterator[pa.Table]]
_EXAMPLES_SHOWN = 5
_NOWHERE = np.zeros((0, 0), np.float32)  # vectors that are not mapped yet


class Start(NamedTuple):
    """Everything before the first step."""

    explainer: Explainer
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    steps: list[Step]
    dropped: list[tuple[str, str]]  # (id, reason) of the questions and texts left out
    pad_id: int


def start_of(run: TrainRun, workers: int, read: Reader = read_here) -> Start:
    """The same on every worker of the same number of workers; `read` brings the questions.

    Raises:
        BadInput: no question can be learned, or an epoch has none.
    """
    with storage.local_folder(run.model["model"]) as folder, splitting(_config_of(run.train, workers)):
        loaded = load_model(
            folder, revision=run.model["revision"], dtype=run.train.precision, whole=run.train.zero_stage < 3
        )
        markers = markers_of(loaded.tokenizer)
        make_room(loaded.model, loaded.tokenizer)
    examples, dropped = examples_of(run, loaded.tokenizer, markers, read)
    torch.manual_seed(run.seed)
    explainer = new_explainer(run, loaded.model, markers, examples, layers_of(run.questions))
    try:
        steps = steps_of(run, examples, workers)
    except ValueError as error:
        raise BadInput(f"{run.artifact.label}: {error}") from error
    return Start(explainer, loaded.tokenizer, examples, steps, dropped, loaded.pad_id)


def examples_of(
    run: TrainRun, tokenizer: PreTrainedTokenizerBase, markers: Markers, read: Reader = read_here
) -> tuple[list[Example], list[tuple[str, str]]]:
    """The questions of the training split and the replayed texts as tokens; id and reason of those left out.

    Vectors stay on the machine's disk (`VectorFile`), written once by its first worker; all workers must call it.

    Raises:
        BadInput: no question is left.
    """
    d_target = storage.read_schema(run.questions[0]).field("vectors").type.value_type.list_size
    rank, local_rank = (dist.get_rank(), int(os.environ["LOCAL_RANK"])) if dist.is_initialized() else (0, 0)
    encoding = Encoding(
        tokenizer=tokenizer,
        markers=markers,
        max_tokens=run.train.max_tokens,
        d_target=d_target,
        blind=run.text_only,
        with_vectors=local_rank == 0,
    )
    file = VectorFile(d_target, keep=encoding.with_vectors)
    examples, places, dropped = list[Example](), list[slice](), list[tuple[str, str]]()
    known: dict[int, int] = {}  # one object for each token id, not for each token
    pieces = [piece for folder in run.questions for piece in pieces_of(folder, run.fraction)]
    for table in chain(read(encoding, pieces), [encoding.table(_texts(run, d_target))]):
        vectors = records.vectors_of(table["vectors"])
        for row, own in zip(table.drop_columns("vectors").to_pylist(), vectors, strict=True):
            reason = row.pop("refused")
            if reason is None:
                places.append(file.add(own, row.pop("n_vectors")))
                ids = [known.setdefault(token, token) for token in row["input_ids"]]
                row |= {"input_ids": ids, "layers": tuple(row["layers"]), "vectors": _NOWHERE}
                examples.append(Example(**row))
            else:
                dropped.append((row["question_id"], reason))
    if not any(example.task != TEXT_TASK for example in examples):
        raise BadInput(f"{run.artifact.label}: no question of the training split can be learned ({_counted(dropped)})")
    rows = _shared_rows(file, rank - local_rank)
    return [one._replace(vectors=rows[place]) for one, place in zip(examples, places)], dropped


def _counted(dropped: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(reason for _, reason in dropped).most_common())


def told_of_dropped(start: Start, label: str, max_dropped: float) -> str | None:
    """A sentence about the questions and texts that the training `label` leaves out; None where it has all.

    Raises:
        BadInput: they are more than the share `max_dropped` of all; the first are named.
    """
    dropped, n = start.dropped, len(start.examples) + len(start.dropped)
    if not dropped:
        return None
    told = f"{label}: {len(dropped):,} of {n:,} training questions and texts are left out: {_counted(dropped)}"
    if len(dropped) <= max_dropped * n:
        return told
    shown = "; ".join(f"{question_id}: {reason}" for question_id, reason in dropped[:_EXAMPLES_SHOWN])
    raise BadInput(
        f"{told}, more than `cluster.max_dropped` = {max_dropped}; the first: {shown}. Mend them, raise "
        "`train.max_tokens` for over-long ones, or allow more"
    )


def _texts(run: TrainRun, d_target: int) -> Iterator[Question]:
    for i, (prompt, answer) in enumerate(run.replay):
        yield Question(f"text {i}", TEXT_TASK, prompt, answer, np.zeros((0, d_target), np.float32), ())


def _shared_rows(file: VectorFile, writer: int) -> Float[np.ndarray, "n d_target"]:
    """Those that the worker of rank `writer` wrote, the first one of this machine."""
    file.flush()
    if not dist.is_initialized():
        rows = file.rows()
    else:
        paths: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(paths, file.path)
        rows = file.rows(paths[writer])
        dist.barrier()
    file.remove()
    return rows


def layers_of(questions: Sequence[str]) -> list[int]:
    """Those of the target that vectors of these tables belong to, in whatever split: a small share of the training
    questions may lack one that is asked about afterwards."""
    columns = [storage.read_table(folder, ["layers"])["layers"] for folder in questions]
    return sorted({layer for column in columns for layer in pc.unique(pc.list_flatten(column)).to_pylist()})


def new_explainer(
    run: TrainRun, model: Any, markers: Markers, examples: Sequence[Example], layers: Sequence[int]
) -> Explainer:
    """The explainer before its first step: the model, adapters where asked for, and the projection from `layers`."""
    train = run.train
    model.requires_grad_(train.lora is None)
    if train.lora is not None:
        model = with_lora(model, **train.lora.model_dump(), seed=run.seed)
    d_target = next(example.vectors.shape[1] for example in examples)
    d_explainer = model.config.get_text_config().hidden_size
    kind = projection_kind(train, d_target, d_explainer, len(layers))
    projection = Projection(kind, d_target, d_explainer, layers, seed=run.seed)
    if run.alignment is not None:
        maps = read_maps(run.alignment)
        projection.set_weights({layer: maps[layer] for layer in layers})
    injection = InjectionConfig(**train.injection.model_dump(exclude={"projection"}))
    with gathered(layout_of(model).embedding.parameters(), train.zero_stage):
        explainer = Explainer(model, markers, projection, injection, train_markers=train.lora is not None)
    if train.gradient_checkpointing:
        explainer.checkpoint_gradients()
    return explainer


def projection_kind(train: TrainConfig, d_target: int, d_explainer: int, n_layers: int) -> Kind:
    """Of vectors from so many layers. A ridge projection is a linear one that starts elsewhere."""
    if d_target == d_explainer and train.injection.projection == "identity":
        return "identity"
    return "linear" if n_layers else "none"


def micro_batches(train: TrainConfig, workers: int) -> int:
    """Forward passes of a step over all workers: as many on each, of at most `micro_batch_size` questions."""
    share = -(-train.batch_size // workers)
    return workers * -(-share // (train.micro_batch_size or share))


def steps_of(run: TrainRun, examples: Sequence[Example], workers: int) -> list[Step]:
    """Raises: ValueError: an epoch without any example, or a weight of a task that has none."""
    return training_steps(
        [len(example.input_ids) for example in examples],
        [example.task for example in examples],
        epochs=run.train.epochs,
        batch_size=run.train.batch_size,
        micro_batches=micro_batches(run.train, workers),
        seed=run.seed,
        weights={str(task): weight for task, weight in run.train.weights.items()},
    )


def new_engine(explainer: Explainer, train: TrainConfig, workers: int) -> Any:
    """A DeepSpeed engine that trains `explainer` with AdamW; see `zero_config`."""
    groups = parameter_groups(explainer, weight_decay=train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    return engine_of(explainer, optimizer, _config_of(train, workers))


def _config_of(train: TrainConfig, workers: int) -> dict[str, Any]:
    passes = micro_batches(train, workers)
    return zero_config(train, max(1, train.batch_size // passes), passes // workers)
