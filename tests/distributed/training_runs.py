"""Trainings of the tests, and what they should learn. Imported by the tests and by the workers they start."""

from pathlib import Path
from typing import Any

from ray_explain.artifacts import Artifact
from ray_explain.config import InjectionConfig, LoraConfig, TrainConfig


def run_of(train: TrainConfig, label: str, questions: tuple[str, ...], target: Path) -> Any:
    from ray_explain.distributed.train import TrainRun

    return TrainRun(
        artifact=Artifact(kind="explainers", label=label, config=train.identity()),
        model={"model": str(target), "revision": None, "dtype": "float32"},
        target={"name": "target", "revision": None},
        questions=questions,
        replay=(("fonan was born in", "sunmouth"),) * 8,
        train=train,
        seed=0,
        wording="brief",
    )


def plain_losses(run: Any) -> list[float]:
    """The same training in one process without Ray and DeepSpeed."""
    from ray_explain.distributed.training_setup import start_of
    from ray_explain.explainer.training import PlainTraining, train_plain

    start = start_of(run, workers=1)
    assert not start.dropped
    names = ("epochs", "batch_size", "learning_rate", "schedule", "warmup", "weight_decay", "clip")
    plain = PlainTraining(**{name: getattr(run.train, name) for name in names}, seed=run.seed)
    return train_plain(start.explainer, start.examples, plain, pad_id=start.pad_id)


CUT = 6  # steps before a checkpoint
_SHORT = TrainConfig(
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    schedule="wsd",
    warmup=0.1,
    injection=InjectionConfig(scale="mean_embedding"),
)
_LORA = {"lora": LoraConfig(rank=4, alpha=8, dropout=0.0)}
_LINEAR = {"injection": InjectionConfig(projection="linear")}
_ADD = {"injection": InjectionConfig(mode="add", layer=0)}


def _case(**changes: Any) -> TrainConfig:
    return _SHORT.model_copy(update=changes)


CASES = {
    **{f"zero-{stage}": _case(zero_stage=stage) for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-lora": _case(zero_stage=stage, **_LORA) for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-bfloat16": _case(zero_stage=stage, precision="bfloat16") for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-bfloat16-lora": _case(zero_stage=stage, precision="bfloat16", **_LORA) for stage in (2, 3)},
    "zero-3-bfloat16-linear": _case(zero_stage=3, precision="bfloat16", **_LINEAR),
    "zero-2-passes-of-1": _case(zero_stage=2, micro_batch_size=1),
    **{f"zero-{stage}-short-steps": _case(zero_stage=stage, batch_size=9, micro_batch_size=1) for stage in (2, 3)},
    "zero-3-linear": _case(zero_stage=3, **_LINEAR),
    "zero-3-linear-lora": _case(zero_stage=3, **_LINEAR, **_LORA),
    "zero-3-add": _case(zero_stage=3, **_ADD),
    "zero-3-add-lora": _case(zero_stage=3, gradient_checkpointing=True, **_ADD, **_LORA),
    "zero-2-offload": _case(zero_stage=2, offload=True),
    "zero-3-offload": _case(zero_stage=3, offload=True),
    "zero-3-checkpointing": _case(zero_stage=3, gradient_checkpointing=True),
    "zero-2-lora-dropout": _case(zero_stage=2, lora=LoraConfig(rank=4, alpha=8, dropout=0.1)),
}
VALIDATED = ["zero-2", "zero-3", "zero-3-lora"]
RESUMED = [
    *(f"zero-{stage}{kind}" for stage in (0, 1, 2, 3) for kind in ("", "-lora")),
    *("zero-1-bfloat16", "zero-2-bfloat16"),
]
RESUMED_AS_THEY_WERE = [
    *("zero-0", "zero-3", "zero-2-lora-dropout", "zero-0-bfloat16", "zero-3-bfloat16", "zero-2-offload"),
]


def later_stage(name: str, n: int) -> str:
    """The case that differs from one of `RESUMED` in its ZeRO stage alone, `n` stages on, round and round."""
    _, stage, *kind = name.split("-")
    return "-".join(["zero", str((int(stage) + n) % 4), *kind])


SPLIT = ["zero-3", "zero-3-lora"]
POISONED = {  # what one number of a gradient becomes
    "zero-0": "nan",
    "zero-0-lora": "inf",
    "zero-0-bfloat16": "inf",
    "zero-1": "inf",
    "zero-2": "nan",
    "zero-2-passes-of-1": "inf",
    "zero-2-offload": "nan",
    "zero-3": "nan",
    "zero-3-lora": "inf",
    "zero-3-bfloat16": "nan",
    "zero-3-offload": "inf",
}
WITHOUT_LOSS = ["zero-0", "zero-1-bfloat16", "zero-3-lora"]
