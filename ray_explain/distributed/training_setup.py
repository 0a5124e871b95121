"""What a training starts from: examples, the untrained explainer, and the order of the steps. Knows nothing of Ray."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.config import TrainConfig
from ray_explain.distributed.alignment import read_maps
from ray_explain.distributed.train import TrainRun
from ray_explain.distributed.zero import engine_of, gathered, splitting, zero_config
from ray_explain.errors import BadInput
from ray_explain.evaluation.answering import questions_of, without_vectors
from ray_explain.explainer.batches import Step, training_steps
from ray_explain.explainer.examples import TEXT_TASK, Example, Question, Refused, encode
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import Markers, make_room, markers_of
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import parameter_groups, with_lora
from ray_explain.explainer.projection import Projection
from ray_explain.ground_truth.splits import training_rows
from ray_explain.interventions.layout import layout_of
from ray_explain.models import load_model


class Start(NamedTuple):
    """Everything before the first step."""

    explainer: Explainer
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    steps: list[Step]
    dropped: dict[str, int]  # questions left out: reason -> count
    pad_id: int


def start_of(run: TrainRun, workers: int) -> Start:
    """The same on every worker of the same number of workers.

    Raises:
        BadInput: no question can be learned, or there are fewer than the workers need for a step.
    """
    with storage.local_folder(run.model["model"]) as folder, splitting(_config_of(run.train, workers)):
        loaded = load_model(
            folder, revision=run.model["revision"], dtype=run.train.precision, whole=run.train.zero_stage < 3
        )
        markers = markers_of(loaded.tokenizer)
        make_room(loaded.model, loaded.tokenizer)
    examples, dropped = examples_of(run, loaded.tokenizer, markers)
    torch.manual_seed(run.seed)
    explainer = new_explainer(run, loaded.model, markers, examples)
    try:
        steps = steps_of(run, examples, workers)
    except ValueError as error:
        raise BadInput(f"{run.artifact.label}: {error}") from error
    return Start(explainer, loaded.tokenizer, examples, steps, dropped, loaded.pad_id)


def examples_of(
    run: TrainRun, tokenizer: PreTrainedTokenizerBase, markers: Markers
) -> tuple[list[Example], dict[str, int]]:
    """The questions of the training split and the replayed texts as tokens, and why others were left out.

    Raises:
        BadInput: no question is left.
    """
    questions = [
        question
        for folder in run.questions
        for question in questions_of(training_rows(storage.read_table(folder), run.fraction))
    ]
    if run.text_only:
        questions = [without_vectors(question) for question in questions]
    none = questions[0].vectors[:0] if questions else None
    texts = [Question(f"text {i}", TEXT_TASK, p, a, none, ()) for i, (p, a) in enumerate(run.replay)]  # type: ignore[arg-type]
    examples, dropped = [], Counter[str]()
    for question in questions + texts:
        try:
            examples.append(encode(question, tokenizer, markers, max_tokens=run.train.max_tokens))
        except Refused as refusal:
            dropped[refusal.reason] += 1
    if not any(example.task != TEXT_TASK for example in examples):
        raise BadInput(f"{run.artifact.label}: no question of the training split can be learned ({dict(dropped)})")
    return examples, dict(dropped)


def new_explainer(run: TrainRun, model: Any, markers: Markers, examples: Sequence[Example]) -> Explainer:
    """The explainer before its first step: the model, adapters where asked for, and the projection."""
    train = run.train
    model.requires_grad_(train.lora is None)
    if train.lora is not None:
        model = with_lora(model, **train.lora.model_dump(), seed=run.seed)
    layers = sorted({layer for example in examples for layer in example.layers})
    d_target = next(example.vectors.shape[1] for example in examples)
    d_explainer = model.config.get_text_config().hidden_size
    is_linear = d_target != d_explainer or train.injection.projection != "identity"
    projection = Projection("linear" if is_linear else "identity", d_target, d_explainer, layers, seed=run.seed)
    if run.alignment is not None:
        maps = read_maps(run.alignment)
        projection.set_weights({layer: maps[layer] for layer in layers}, frozen=False)
    injection = InjectionConfig(**train.injection.model_dump(exclude={"projection"}))
    with gathered(layout_of(model).embedding.parameters(), train.zero_stage):
        explainer = Explainer(model, markers, projection, injection, train_markers=train.lora is not None)
    if train.gradient_checkpointing:
        explainer.checkpoint_gradients()
    return explainer


def micro_batches(train: TrainConfig, workers: int) -> int:
    """Forward passes of a step over all workers: a whole number on each."""
    share = max(1, train.batch_size // workers)
    return workers * -(-share // (train.micro_batch_size or share))


def steps_of(run: TrainRun, examples: Sequence[Example], workers: int) -> list[Step]:
    """Raises: ValueError: fewer examples than the workers need for a step, or a weight of a task that has none."""
    return training_steps(
        [len(example.input_ids) for example in examples],
        [example.task for example in examples],
        epochs=run.train.epochs,
        batch_size=run.train.batch_size,
        micro_batches=micro_batches(run.train, workers),
        seed=run.seed,
        weights={str(task): weight for task, weight in run.train.weights.items()},
    )


def new_engine(explainer: Explainer, train: TrainConfig, workers: int, *, cut: bool = False) -> Any:
    """A DeepSpeed engine that trains `explainer` with AdamW; see `zero_config`."""
    groups = parameter_groups(explainer, weight_decay=train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    return engine_of(explainer, optimizer, _config_of(train, workers, cut=cut))


def _config_of(train: TrainConfig, workers: int, *, cut: bool = False) -> dict[str, Any]:
    passes = micro_batches(train, workers)
    return zero_config(train, max(1, train.batch_size // passes), passes // workers, cut=cut)
