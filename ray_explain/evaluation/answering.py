"""Explainers asked: questions in, answers out."""

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ray_explain import records, storage
from ray_explain.evaluation.answers import first_answer
from ray_explain.explainer.baselines import SELFIE_BRIEF, selfie, untrained
from ray_explain.explainer.examples import Example, Question, Refused, encode_prompt
from ray_explain.explainer.generate import Generation, generate, new_drafts
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.sidecar import Sidecar, load_explainer, load_tokenizer, read_sidecar
from ray_explain.interventions.layout import layout_of
from ray_explain.models import load_model
from ray_explain.questions import wordings
from ray_explain.questions.prompting import selfie_label
from ray_explain.questions.rows import questions_of, without_vectors
from ray_explain.stages import Result

logger = logging.getLogger(__name__)


def asked_schema(d_model: int) -> pa.Schema:
    """Questions, each with the control that its vectors are under ("none": its own vectors)."""
    return records.questions(d_model).append(pa.field("control", pa.string(), nullable=False))


class AnswerStage:
    """Lets an explainer answer (records.ANSWERS), greedily.

    Config: `explainer` (its name in the answers), `max_new_tokens`, `batch_size`, `max_tokens`, `d_target`, and either
    `folder` (of a trained one), `target` and `target_revision` that the questions are about and, where they are known,
    `target_weights`, or `model`, `revision`, `dtype` and `injection` of one that was never trained, of which the
    `first_answer` counts (its log-probability is that of all that was said); with `text_only`, vectors are zero, as
    they were in its training.

    Raises:
        Mismatch: the trained one explains another target, or one of another width or other weights.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._sidecar: Sidecar | None = None
        if "folder" in config:
            with storage.local_folder(config["folder"]) as folder:
                self._sidecar = sidecar = read_sidecar(folder)
                sidecar.check(
                    **{name: config[name] for name in ("target", "target_revision", "d_target")},
                    target_weights=config.get("target_weights"),
                )
                with storage.local_folder(sidecar.base) if sidecar.lora else nullcontext() as base:
                    self._explainer, _ = load_explainer(folder, base=base, device=device)
                self._tokenizer = load_tokenizer(folder)
        else:
            with storage.local_folder(config["model"]) as folder:
                loaded = load_model(folder, revision=config["revision"], dtype=config["dtype"])
            injection = InjectionConfig(**config["injection"])
            self._tokenizer = loaded.tokenizer
            self._explainer = untrained(
                loaded.model, loaded.tokenizer, d_target=config["d_target"], injection=injection
            )
        self._drafts = new_drafts(self._explainer, self._tokenizer)  # slices of questions learn from one another
        context = layout_of(self._explainer.model).max_positions
        room = config["max_tokens"] if context is None else context - config["max_new_tokens"]
        self._longest = min(config["max_tokens"], room)

    @property
    def schema_in(self) -> pa.Schema:
        """Questions with their controls."""
        return asked_schema(self._config["d_target"])

    @property
    def schema_out(self) -> pa.Schema:
        """Answers."""
        return records.ANSWERS

    def __call__(self, table: pa.Table) -> Result:
        """One answer per question; to a question that this explainer cannot be asked, the answer is empty.

        Raises:
            Mismatch: the questions are in other words than the explainer was trained on.
        """
        self._check_words(table)
        rows, prompts, asked = list[dict[str, Any]](), list[Example](), list[int]()
        questions = map(without_vectors, questions_of(table)) if self._config.get("text_only") else questions_of(table)
        for question, control in zip(questions, table.column("control").to_pylist(), strict=True):
            rows.append(
                {
                    "question_id": question.question_id,
                    "explainer": self._config["explainer"],
                    "control": control,
                    "text": "",
                    "logprob": None,
                    "n_tokens": 0,
                }
            )
            try:
                prompts.append(self._prompt(question))
                asked.append(len(rows) - 1)
            except Refused as refusal:
                logger.warning("%s", refusal)
        for row, answer in zip(asked, self._answers(prompts), strict=True):
            rows[row] |= answer._asdict()
        return Result(records.rows_table(rows, records.ANSWERS), [])

    def _check_words(self, table: pa.Table) -> None:
        if self._sidecar is not None:
            sets = {words.partition("/")[0] for words in pc.unique(table["wording"]).to_pylist()}
            self._sidecar.check(wordings={name: wordings.version(name) for name in sets})

    def _answers(self, prompts: list[Example]) -> list[Generation]:
        sizes = {name: self._config[name] for name in ("max_new_tokens", "batch_size")}
        answers = generate(self._explainer, prompts, self._tokenizer, drafts=self._drafts, **sizes)
        return answers if self._sidecar else [one._replace(text=first_answer(one.text)) for one in answers]

    def _prompt(self, question: Question) -> Example:
        return encode_prompt(question, self._tokenizer, self._explainer.markers, max_tokens=self._longest)


class SelfieStage:
    """Lets an untrained model say what a feature's vector means to it (SelfIE), once for each scale: records.ANSWERS.

    Config: `model`, `revision`, `dtype`, `d_target`, `batch_size`, `scales`, and `brief` for models of few words.
    Questions with several vectors are asked about the first.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        with storage.local_folder(config["model"]) as folder:
            loaded = load_model(folder, revision=config["revision"], dtype=config["dtype"])
        self._tokenizer = loaded.tokenizer
        self._explainer = untrained(loaded.model, loaded.tokenizer, d_target=config["d_target"])

    @property
    def schema_in(self) -> pa.Schema:
        """Questions with their controls."""
        return asked_schema(self._config["d_target"])

    @property
    def schema_out(self) -> pa.Schema:
        """Answers."""
        return records.ANSWERS

    def __call__(self, table: pa.Table) -> Result:
        """For each question as many answers as there are scales, each by an explainer of its own (`selfie_label`)."""
        questions = list(questions_of(table))
        said = selfie(
            self._explainer,
            self._tokenizer,
            np.stack([question.vectors[0] for question in questions]),
            [question.layers for question in questions],
            batch_size=self._config["batch_size"],
            template=SELFIE_BRIEF if self._config["brief"] else None,
            scales=self._config["scales"],
        )
        rows = [
            {
                "question_id": question.question_id,
                "explainer": selfie_label(scale),
                "control": control,
                **answer._asdict(),
            }
            for question, control, answers in zip(questions, table["control"].to_pylist(), said, strict=True)
            for scale, answer in zip(self._config["scales"], answers, strict=True)
        ]
        return Result(records.rows_table(rows, records.ANSWERS), [])
