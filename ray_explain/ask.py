"""One question to a trained explainer, and the real intervention on its target beside it."""

import argparse
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ray_explain import storage
from ray_explain.config import Experiment, read_experiment
from ray_explain.errors import BadInput
from ray_explain.launch import ended_by, lasting, placed
from ray_explain.report.numbers import clip

USAGE = """
Asks a trained explainer one question, runs the real intervention on its target, and says whether that confirms it.

  patching  --prompt TEXT --source TEXT --layer 2 --position subject_last
  a hint    --prompt TEXT --hint TEXT          (the part of the prompt to be removed)
  a vector  --vector FILE.npy --layer 2        (or --feature 2/17: feature 17 of layer 2 of the experiment)

A vector is tried on texts: those of the experiment's corpus (`ground_truth.features.corpus`), or the synthetic world's,
which other targets cannot read. Only a feature has descriptions that are known to be right; of another vector it prints
what it responds to, and confirms nothing.
"""


class Known(NamedTuple):
    """Which explainer is asked about which target, and how it was trained."""

    folder: str  # of the explainer
    target: str  # its name
    place: dict[str, Any]  # config of `ground_truth.target.Target`
    experiment: Experiment | None  # that it is from, where that is known
    text_only: bool = False  # trained without vectors, and asked so
    foreign: bool = False  # trained on other questions than the experiment's


def main(argv: Sequence[str] | None = None) -> int:
    """What `jobs/ask.py` does; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        kind = _kind(arguments)
        known = _known(arguments, kind)
        print(_told(_receipt(arguments, kind, known), known))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BadInput as error:
        return ended_by(error)
    except Exception as error:  # as in `launch`
        with tempfile.NamedTemporaryFile("w", prefix="ask-", suffix=".log", delete=False) as log:
            log.writelines(traceback.format_exception(error))
        return ended_by(error, Path(log.name))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    whom = parser.add_argument_group("whom to ask")
    whom.add_argument("--explainer", metavar="FOLDER", help="of a trained explainer")
    whom.add_argument("--config", metavar="FILE", help="instead: YAML file of the experiment, for its first explainer")
    whom.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the config")
    whom.add_argument("--target", help="name of the target (with --config), or the folder or hub id of the target")
    whom.add_argument(
        "--by", metavar="MODEL", help="with --config: the model that explains; the target itself unless given"
    )
    what = parser.add_argument_group("what to ask")
    what.add_argument("--prompt", help="that the target reads")
    what.add_argument("--source", help="prompt that the patched vector is taken from")
    what.add_argument("--layer", metavar="2 | 0-3", help="layer, or block of layers, counted from 0")
    what.add_argument("--position", help="a role such as subject_last, the number of a token, or a piece of the prompt")
    what.add_argument("--source-position", metavar="POSITION", help="the same as --position unless given")
    what.add_argument("--subject", help="of the prompt; what prompt and source do not share unless given")
    what.add_argument("--source-subject", metavar="SUBJECT")
    what.add_argument("--hint", help="part of the prompt to be removed")
    what.add_argument("--vector", metavar="FILE", help=".npy file of one vector")
    what.add_argument("--feature", metavar="LAYER/NUMBER", help="feature of the experiment")
    return parser


def _kind(arguments: argparse.Namespace) -> str:
    """Raises: BadInput: what is given is no question, or more than one."""
    given = {
        "patching": arguments.source is not None,
        "ablation": arguments.hint is not None,
        "features": arguments.vector is not None or arguments.feature is not None,
    }
    kinds = [kind for kind, is_given in given.items() if is_given]
    if len(kinds) != 1:
        raise BadInput(
            "give one of --source (a patch), --hint (a removed hint), --vector or --feature (a vector), "
            f"not {'several of them' if kinds else 'none of them'}"
        )
    needed = {"patching": ("prompt", "layer", "position"), "ablation": ("prompt",), "features": ()}[kinds[0]]
    if missing := [name for name in needed if getattr(arguments, name) is None]:
        raise BadInput(f"a question about {kinds[0]} needs {', '.join(f'--{name}' for name in missing)}")
    if arguments.vector is not None and arguments.layer is None:
        raise BadInput("a vector belongs to a layer: give --layer")
    return kinds[0]


# -- which explainer, which target ------------------------------------------------------------------------------------


def _known(arguments: argparse.Namespace, task: str) -> Known:
    """Raises: BadInput: there is no such explainer, or its target is not known."""
    if (arguments.explainer is None) == (arguments.config is None):
        raise BadInput("give either --explainer (its folder) or --config (the experiment it is from)")
    return _of_config(arguments, task) if arguments.config is not None else _of_folder(arguments, task)


def _of_config(arguments: argparse.Namespace, task: str) -> Known:
    experiment = read_experiment(arguments.config, arguments.overrides)  # a mistake in it is told before these imports
    from ray_explain.artifacts import finished
    from ray_explain.distributed.plan import Plan

    plan = Plan(placed(experiment))
    if storage.is_remote(plan.root):
        storage.check_endpoint()
    runs = [run for run in plan.runs() if task in run.tasks and not run.text_only]
    target = arguments.target or plan.experiment.targets[0]
    by = arguments.by or target
    chosen = [run for run in runs if (run.target, run.explainer) == (target, by)]
    if not chosen:
        there = sorted({f"{run.explainer} of {run.target}" for run in runs})
        raise BadInput(f"no explainer {by!r} of {target!r} for {task}: there is {', '.join(there) or 'none'}")
    artifact = plan.explainer(chosen[0])
    if finished(artifact, plan.root) is None:
        raise BadInput(
            f"{artifact.label} is not trained yet below {plan.root}: run jobs/train.py with this config first"
        )
    return Known(plan.path(artifact), target, plan.model_place(target), plan.experiment)


def _of_folder(arguments: argparse.Namespace, task: str) -> Known:
    """An explainer by its folder: below the storage of the experiment it is from, or anywhere with --target."""
    from ray_explain.distributed.plan import Plan

    folder = storage.absolute(lasting(arguments.explainer)).rstrip("/")
    if storage.is_remote(folder):
        storage.check_endpoint()
    sidecar, manifest = _sidecar(folder), _manifest(folder)
    text_only = bool(manifest["config"].get("text_only"))
    root = folder.rsplit("/", 2)[0]
    config = Path(root, "config.yaml")
    experiment = read_experiment(str(config), [f"storage={root}"]) if config.exists() else None
    if arguments.target is not None and (experiment is None or arguments.target not in experiment.models):
        place = {"model": arguments.target, "revision": sidecar.target_revision, "dtype": "float32"}
        return Known(folder, sidecar.target, place, experiment, text_only)
    target = arguments.target or sidecar.target
    if experiment is None or target not in experiment.models:
        raise BadInput(
            f"{folder} explains {sidecar.target!r}, and no experiment beside it ({config}) says where that is: give "
            "--target, its folder or hub id"
        )
    plan = Plan(experiment)
    foreign = bool(manifest["parents"]) and not _asks(plan, task, target, manifest["parents"])
    return Known(folder, target, plan.model_place(target), experiment, text_only, foreign)


def _asks(plan: Any, task: Any, target: str, parents: Sequence[str]) -> bool:
    """Whether an explainer with these `parents` was trained on the questions of a plan, or that cannot be told: several
    experiments may have one storage, and the config that lies there is of the last."""
    try:
        return task in plan.experiment.tasks and plan.questions(task, target).fingerprint in parents
    except BadInput:  # files that its cases are from are gone
        return True


def _sidecar(folder: str) -> Any:
    """Raises: Mismatch: as `read_sidecar`."""
    from ray_explain.explainer.sidecar import Mismatch, read_sidecar

    with storage.local_folder(folder, weights=False) as here:
        try:
            return read_sidecar(here)
        except Mismatch as error:
            raise Mismatch(str(error).replace(here, folder)) from error


def _manifest(folder: str) -> dict[str, Any]:
    """Of an explainer's folder; empty where it was saved by other means."""
    from ray_explain.artifacts import MANIFEST

    path = f"{folder}/{MANIFEST}"
    return storage.read_json(path) if storage.exists(path) else {"config": {}, "parents": []}


# -- the question -----------------------------------------------------------------------------------------------------


def _receipt(arguments: argparse.Namespace, kind: str, known: Known) -> Any:
    """Raises: BadInput: there is no such layer, position, role, span or feature, or another target."""
    from transformers.utils.logging import disable_progress_bar

    from ray_explain.evaluation import receipts
    from ray_explain.ground_truth.positions import UNKNOWN_TOKEN
    from ray_explain.models import files_fingerprint

    disable_progress_bar()
    with storage.local_folder(known.place["model"]) as folder:
        shape, tokenizer = _read_target(folder, known.place)
        sidecar = _sidecar(known.folder)
        weights = files_fingerprint(folder, known.place["revision"])
        sidecar.check(d_target=shape.hidden_size, target_weights=weights)
        try:
            witness = receipts.Witness(
                _asking(known, shape.hidden_size),
                known.place | {"model": str(folder)},
                wording=next(iter(sidecar.wordings)),
                seed=known.experiment.seed if known.experiment else 0,
            )
            return _measured(arguments, kind, known, witness, shape, tokenizer)
        except receipts.Unusable as error:
            asked = [text for text in (arguments.prompt, arguments.source) if text]
            which = _unknown(tokenizer, asked) if str(error) == UNKNOWN_TOKEN else ""
            raise BadInput(f"this cannot be measured: {error}{which}") from error
        except ValueError as error:
            raise BadInput(str(error)) from error


def _read_target(folder: str, place: dict[str, Any]) -> tuple[Any, Any]:
    """Text config and tokenizer of the target at `place`, whose files are in `folder`."""
    from transformers import AutoConfig, AutoTokenizer

    revision = place["revision"]
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, revision=revision).get_text_config()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model can be read at {place['model']!r}: {reason}") from error
    return shape, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, revision=revision)


def _measured(arguments: argparse.Namespace, kind: str, known: Known, witness: Any, shape: Any, tokenizer: Any) -> Any:
    """The receipt of a question of this kind."""
    from ray_explain.evaluation import receipts

    if kind == "features":
        return _about_vector(arguments, known, witness, shape)
    if kind == "ablation":
        case = receipts.ablation_of(arguments.prompt, arguments.hint, _kind_of_spans(known.experiment))
        return witness.ablations(case, tokenizer)[0]
    cases = receipts.patch_of(
        tokenizer,
        arguments.prompt,
        arguments.source,
        block=_block(arguments.layer, shape.num_hidden_layers, known.target),
        position=arguments.position,
        source_position=arguments.source_position,
        subjects=(arguments.subject, arguments.source_subject),
        change=_change(known.experiment),
    )
    return witness.patches(cases, tokenizer)[0]


def _unknown(tokenizer: Any, texts: Sequence[str]) -> str:
    """What a target does not know of these texts, to be said after the reason; nothing where it knows all."""
    from ray_explain.explainer.examples import unknown_id

    unknown = unknown_id(tokenizer)
    read = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    found = [
        text[start:end]
        for text, ids, offsets in zip(texts, read["input_ids"], read["offset_mapping"])
        for token, (start, end) in zip(ids, offsets)
        if token == unknown and start < end
    ]
    return "".join(f"{', ' if i else ': '}{word!r}" for i, word in enumerate(dict.fromkeys(found)))


def _change(experiment: Experiment | None) -> Any:
    """What a patch does in the experiment."""
    from ray_explain.ground_truth.pairs import REPLACE, Change

    section = experiment.ground_truth.patching if experiment else None
    return REPLACE if section is None else Change(section.site, section.kind)


def _kind_of_spans(experiment: Experiment | None) -> str:
    """What the experiment's ablations take out: spans of one's own prompts are quoted in questions, hints are not."""
    section = experiment.ground_truth.ablation if experiment else None
    return "span" if section and section.source == "jsonl" else "hint"


def _asking(known: Known, d_target: int) -> dict[str, Any]:
    """Config of `AnswerStage`: as the experiment's evaluation asks, about a target of this width."""
    experiment = known.experiment
    target = {"target": known.target, "target_revision": known.place["revision"], "d_target": d_target}
    sizes = {
        "max_new_tokens": experiment.evaluate.max_new_tokens if experiment else 50,
        "max_tokens": experiment.train.max_tokens if experiment else 500,
    }
    how = {"batch_size": 64, "text_only": known.text_only}
    return {"explainer": "asked", "folder": known.folder, **how, **target, **sizes}


def _block(text: str, n_layers: int, target: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise BadInput(f"--layer {text!r}: it is a number such as 2, or a block such as 0-3")
    block = int(first), int(last or first)
    if not block[0] <= block[1] < n_layers:
        raise BadInput(f"--layer {text}: {target} has {n_layers} layers, numbered from 0")
    return block


_FOREIGN = (
    "it was not trained on such questions of the config beside it; if that is of another experiment, give --config"
)
_LEARNED = "a training question: the explainer may have learned this very answer"


class _Vector(NamedTuple):
    layer: int
    vector: np.ndarray
    right: Sequence[str] = ()  # descriptions, where some are known
    case_id: str | None = None  # of a feature of the experiment
    learned: bool = False  # whether it is in the training split of the experiment


def _about_vector(arguments: argparse.Namespace, known: Known, witness: Any, shape: Any) -> Any:
    from ray_explain.evaluation import receipts

    if arguments.feature is not None:
        one = _feature(arguments.feature, known)
    else:
        layer, last = _block(arguments.layer, shape.num_hidden_layers, known.target)
        if layer != last:
            raise BadInput(f"--layer {arguments.layer}: a vector belongs to one layer")
        one = _Vector(layer, _vector(arguments.vector, shape.hidden_size))
    corpus = _corpus(known)
    if corpus is None:
        receipt = _tried_on_the_world(known, witness, one)
    else:
        strongest = receipts.strongest_windows(known.place, *corpus, one.vector, one.layer)
        receipt = witness.feature(one.vector, one.layer, one.right, _responds(strongest), case_id=one.case_id)
    return receipt._replace(details=(*receipt.details, _LEARNED)) if one.learned else receipt


def _corpus(known: Known) -> tuple[str, int] | None:
    """Folder and number of the windows that the experiment's features are looked at on; None if that is the world,
    or none was read.

    Raises:
        BadInput: they are not made yet.
    """
    from ray_explain.artifacts import finished
    from ray_explain.distributed.feature_plan import FeaturePlan, describes
    from ray_explain.distributed.plan import Plan

    section = known.experiment.ground_truth.features if known.experiment else None
    if known.experiment is None or section is None or not describes(section) or section.source == "released":
        return None
    plan = Plan(known.experiment)
    windows = FeaturePlan(plan, known.target).windows()
    made = finished(windows, plan.root)
    if made is None:
        raise BadInput("the corpus of this experiment is not read yet: run jobs/ground_truth.py first")
    return plan.path(windows), made.rows


def _tried_on_the_world(known: Known, witness: Any, one: _Vector) -> Any:
    from ray_explain.evaluation import receipts
    from ray_explain.world.facts import World

    world = known.experiment.world.world() if known.experiment else World()
    found = receipts.responses(known.place, world, one.vector, one.layer)
    receipt = witness.feature(one.vector, one.layer, one.right, case_id=one.case_id)
    said = {text.lower(): value for text, value in found.correlations.items()}.get(receipt.answer.lower())
    # told, not held for right: random vectors correlate as much, and of most features the best concept is another
    details = [
        f"correlates with “{found.best}” most ({found.correlations[found.best]:.2f})",
        "with the explainer's answer: " + ("none is known" if said is None else f"{said:.2f}"),
        *_responds(found.strongest),
    ]
    return receipt._replace(details=tuple(details))


def _responds(strongest: Sequence[tuple[str, str]]) -> list[str]:
    return [f"responds to {token!r} in: {clip(text, 90)}" for token, text in strongest]


def _vector(path: str, d_model: int) -> np.ndarray:
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"--vector {path}: no array can be read there ({error})") from error
    vector = np.asarray(vector, np.float32).squeeze()
    if vector.shape != (d_model,) or not np.isfinite(vector).all():
        raise BadInput(f"--vector {path}: shape {list(vector.shape)}; one finite vector of width {d_model} is needed")
    return vector


def _feature(name: str, known: Known) -> _Vector:
    """A feature of the experiment. Of all others no vector stays in memory, nor a text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from ray_explain import records
    from ray_explain.artifacts import finished
    from ray_explain.distributed.plan import Plan

    layer, _, number = name.partition("/")
    if not (layer.isdigit() and number.isdigit()):
        raise BadInput(f"--feature {name!r}: it is LAYER/NUMBER, such as 2/17")
    if known.experiment is None or known.experiment.ground_truth.features is None:
        raise BadInput("--feature: the experiment of this explainer has no features; give a --vector")
    plan = Plan(known.experiment)
    tables = [plan.effects("features", known.target), plan.questions("features", known.target)]
    if any(finished(table, plan.root) is None for table in tables):
        raise BadInput("--feature: the features of this experiment are not made yet: run jobs/ground_truth.py first")
    effects = storage.read_table(plan.path(tables[0]), ["case_id", "layer", "feature_id"])
    asked = storage.read_table(plan.path(tables[1]), ["case_id"])["case_id"]
    described = effects.filter(pc.is_in(effects["case_id"], asked.combine_chunks()))
    here = pc.and_(pc.equal(described["layer"], int(layer)), pc.equal(described["feature_id"], int(number)))
    found = described.filter(here)["case_id"]
    if not len(found):
        of_layer = described.filter(pc.equal(described["layer"], int(layer)))["feature_id"].to_pylist()
        some = ", ".join(map(str, of_layer[:8]))
        there = f"layer {layer} has {some}, ..." if of_layer else "no feature of that layer"
        raise BadInput(f"--feature {name}: no such feature of {known.target} was described; {there}")
    row = pa.concat_tables(storage.read_rows(plan.path(tables[1]), np.array([pc.index(asked, found[0]).as_py()])))
    vector, learned = records.vectors_of(row["vectors"])[0][0], row["split"][0].as_py() == "train"
    return _Vector(int(layer), vector, row["answers"][0].as_py(), found[0].as_py(), learned)


# -- what is printed --------------------------------------------------------------------------------------------------


def _told(receipt: Any, known: Known) -> str:
    sure = "" if receipt.confidence is None else f"  (probability {receipt.confidence:.2f})"
    verdict = "confirmed" if receipt.confirmed else "refuted"
    if receipt.confirmed is None:
        verdict = "open: no description of this vector is known to be right; hold the explanation against the texts"
    elif not receipt.readable:
        verdict += ": the answer cannot be read"
    lines = [
        ("asked", receipt.question),
        ("explanation", (receipt.answer or "(nothing)") + sure),
        ("measured", receipt.measured or "where the vector is strongest on texts:"),
        *[("", detail) for detail in receipt.details],
        ("", f"on the target {known.target}, {known.place['model']}"),
        *([("", _FOREIGN)] if known.foreign else []),
        ("verdict", verdict),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in lines)
