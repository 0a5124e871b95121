"""Maps from a target's vectors to an explainer's, fitted before the explainer is trained."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.artifacts import Artifact, finish, finished
from ray_explain.errors import BadInput
from ray_explain.ground_truth.corpora import read_windows

MAPS = "maps.safetensors"  # one tensor for each layer of the target
_MOST_TEXTS = 5000


@dataclass(frozen=True, kw_only=True)
class AlignmentJob:
    """Maps to be fitted on the texts of the training questions, and on a corpus."""

    artifact: Artifact
    target: dict[str, Any]  # config of `load_model`
    explainer: dict[str, Any]
    questions: tuple[str, ...]  # directories of question tables
    corpus: str | None  # directory of windows in the target's tokens, for questions that hold none of its texts


def align_all(jobs: Sequence[AlignmentJob], root: str, *, gpus: float) -> None:
    """Fit those that are not there yet, side by side. Ray must be running.

    Raises:
        BadInput: there is too little text.
    """
    missing = {job.artifact: job for job in jobs if finished(job.artifact, root) is None}
    ray.get([_align.options(num_gpus=gpus).remote(job, root) for job in missing.values()])


def read_maps(folder: str) -> dict[int, Tensor]:
    """The map of each layer."""
    with storage.local_folder(folder) as local:
        return {int(layer): weight for layer, weight in load_file(f"{local}/{MAPS}").items()}


@ray.remote(num_cpus=1, max_retries=3)
def _align(job: AlignmentJob, root: str) -> None:
    from ray_explain.explainer.alignment import align
    from ray_explain.models import load_model

    started, models = time.monotonic(), []
    for place in (job.target, job.explainer):
        with storage.local_folder(place["model"]) as folder:
            loaded = load_model(folder, revision=place["revision"], dtype=place["dtype"])
        models.append((loaded.model, loaded.tokenizer))
    tables = [storage.read_table(folder, ["split", "prompt", "layers"]) for folder in job.questions]
    tables = [table.filter(pc.equal(table["split"], "train")) for table in tables]
    texts = [*_prompts(tables), *_read(job.corpus, models[0][1])]
    layers = sorted({layer for table in tables for block in table["layers"].to_pylist() for layer in block})
    try:
        found = align(models[0], models[1], texts, layers)
    except ValueError as error:
        more = "more questions" if job.corpus is None else "a larger `ground_truth.features.corpus`"
        raise BadInput(
            f"`train.injection.projection: ridge`, {job.artifact.label}: {error}; give {more}, or use a linear one"
        ) from error
    with storage.new_folder(job.artifact.path(root)) as folder:
        save_file({str(layer): weight.contiguous() for layer, weight in found.maps.items()}, f"{folder}/{MAPS}")
    explained = {str(layer): round(share, 4) for layer, share in found.explained.items()}
    measured = {"explained": explained, "pairs": found.n_pairs}
    finish(job.artifact, root, rows=len(layers), seconds=time.monotonic() - started, measured=measured)


def _prompts(tables: Sequence[pa.Table]) -> list[str]:
    """What questions say, without places for vectors; each text once."""
    from ray_explain.explainer.markers import VECTOR_MARK

    prompts = dict.fromkeys(prompt for table in tables for prompt in table["prompt"].to_pylist())
    return [prompt.replace(VECTOR_MARK, "") for prompt in prompts][:_MOST_TEXTS]


def _read(corpus: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of its first windows."""
    if corpus is None:
        return []
    return [str(tokenizer.decode(ids)) for ids in read_windows(corpus, range(_MOST_TEXTS)).values()]
