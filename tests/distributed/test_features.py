"""Features of a released data set on their way to effects, without Ray: stages run in this process."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from transformers import AutoTokenizer

from ray_explain import records, storage
from ray_explain.artifacts import finish, finished
from ray_explain.config import Experiment
from ray_explain.distributed.answers import make_asked
from ray_explain.distributed.evaluation import _graded, evaluate
from ray_explain.distributed.feature_plan import FeaturePlan
from ray_explain.distributed.features import score_answers
from ray_explain.distributed.ground_truth import export_ground_truth, make_ground_truth
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from ray_explain.errors import BadInput
from ray_explain.evaluation.metrics import headline, measured
from ray_explain.evaluation.simulations import GOLD, answered, gold_answers
from ray_explain.ground_truth import released
from ray_explain.ground_truth.exemplars import EXEMPLARS, token_texts
from ray_explain.ground_truth.features import joined
from ray_explain.ground_truth.released_exemplars import write_exemplars
from ray_explain.ground_truth.released_files import write_folder
from ray_explain.world.corpus import documents
from ray_explain.world.facts import World
from tests.distributed.planning import planned

SIZES = {"top": 6, "random": 4}
D_MODEL = 32
KEYS = {"train": [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4)], "test": [(1, 0), (0, 1), (1, 2)]}
ABOUT = {"hf_model_id": "m", "hf_dataset_configs": [{"hf_dataset_id": "texts"}], "seed": 0}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run in this process."""

    def run_stages(jobs: Sequence[Any], root: str, _: Any) -> None:
        for job in jobs:
            if finished(job.artifact, root) is None:
                stage = job.stage(job.config)
                made = stage(records.conform(storage.read_table(job.source), stage.schema_in))
                table = records.conform(made.table, stage.schema_out)
                storage.write_table(table, f"{job.artifact.path(root)}/part.parquet")
                finish(job.artifact, root, rows=table.num_rows, dropped=Counter(why for _, why in made.dropped))

    monkeypatch.setattr("ray_explain.distributed.run_stages.run_stages", run_stages)
    monkeypatch.setattr(Session, "start_ray", lambda session: None)


def release(folder: Path, target: Path, source: str = "sae", *, bare: int = 0) -> list[str]:
    """Features of both layers, each on at one word, which is its label if it is one of an SAE; the last `bare` ones
    have no exemplars. Returns the words."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [document.text for document, _ in zip(documents(World(), "texts", 1), range(120))]
    told = [token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"][:16]) for text in texts]
    often = Counter(word.strip() for window in told for word in {*window} if word.strip().isalpha())
    words = [word for word, n in often.most_common() if n < 60][: sum(map(len, KEYS.values()))]
    left, parts = iter(words), []
    for split, keys in KEYS.items():
        vectors = np.random.default_rng(len(keys)).normal(size=(D_MODEL, len(keys))).astype(np.float32)
        labels = [(key, label(next(left)) if source == "sae" else None) for key in keys]
        numbered = labels if source == "sae" else [((key[0], i), None) for i, (key, _) in enumerate(labels)]
        read = released.read_features(numbered, {0: vectors, 1: vectors}, split=split, source=source)
        parts.append(joined(read.features, read.descriptions))
    effects = pa.concat_tables(parts)
    rows = [
        {name: row[name] for name in ("case_id", "group", "split", "layer", "source", "feature_id")}
        | {"l0": None, "fvu": None, "dead_fraction": None, "fired": 6, "seen": 120, "windows": windows(word, told)}
        for row, word in zip(effects.to_pylist(), words, strict=True)
    ]
    folder.mkdir(parents=True)
    write_folder(effects, "features", str(folder), tokenizer, listed=True)
    table = records.rows_table(rows[: len(rows) - bare], EXEMPLARS)
    assert write_exemplars(table, effects, str(folder), tokenizer, about=ABOUT)[1] == {}
    return words


def label(word: str) -> dict[str, Any]:
    return {"chosen_label": word, "all_labels": ["nothing", word], "all_label_scores": {"nothing": 0.9, word: 0.1}}


def windows(word: str, told: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Windows with the word, on which the feature is on there alone, and without."""
    on = [window for window in told if word in [token.strip() for token in window]][: SIZES["top"]]
    off = [window for window in told if word not in [token.strip() for token in window]][: SIZES["random"]]
    return [
        {"kind": kind, "rank": rank, "tokens": own, "activations": [(9.0 - rank) * (t.strip() == word) for t in own]}
        for kind, windows in (("top", on), ("random", off))
        for rank, own in enumerate(windows)
    ]


def knowing(prompt: str, _: int) -> str:
    """A describer that says which word is marked; a simulator and a detector that look for the word it said."""
    if "Description:" in prompt:
        return f"Description: {prompt.split('<<')[2].split('>>')[0].strip()}"  # the first ones are the instruction's
    word = prompt.split("responds to: ")[1].split("\n")[0]
    if "numbered tokens" in prompt:
        tokens = [json.loads(line.split(": ", 1)[1]) for line in prompt.splitlines() if line[:1].isdigit()]
        return json.dumps([10 * (token.strip() == word) for token in tokens])
    texts = [line.split(". ", 1)[1] for line in prompt.splitlines() if line[:1].isdigit()]
    return json.dumps([int(word in text.split()) for text in texts])


@pytest.fixture
def model(endpoint: Any) -> dict[str, Any]:
    endpoint.script = knowing
    return {"kind": "endpoint", "model": "m", "address": endpoint.address, "timeout": 5}


def plan(folder: Path, target: Path, path: Path, **section: Any) -> Plan:
    return planned(
        target,
        folder,
        evaluate={"untrained": False, "shots": [], "selfie": [], "controls": ["shuffled"], "resamples": 200},
        ground_truth={"features": {"source": "released", "path": str(path), "exemplars": SIZES, **section}},
    )


def effects_of(asked: Plan) -> list[dict[str, Any]]:
    with Session(asked) as session:
        make_ground_truth(session)
    return storage.read_table(asked.path(asked.effects("features", "m"))).to_pylist()


def test_a_large_table_of_one_file_is_read_some_rows_at_a_time(world_target: Path, tmp_path: Path) -> None:
    asked = plan(tmp_path, world_target, tmp_path / "release")
    effects = asked.effects("features", "m")
    storage.write_table(pa.table({"row": range(3000)}), f"{asked.path(effects)}/table.parquet")
    with Session(asked) as session:
        parts = [part["row"].to_pylist() for part in session.parts(effects)]
    assert max(map(len, parts)) <= 1024 and [row for part in parts for row in part] == list(range(3000))


def test_released_labels_are_scored_anew_on_the_released_exemplars(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    words = release(tmp_path / "release", world_target, bare=1)
    asked = plan(tmp_path, world_target, tmp_path / "release", simulator=model, detector=model)
    effects = effects_of(asked)
    assert finished(FeaturePlan(asked, "m").windows(), asked.root) is None, "no corpus is read"
    own = {one["case_id"]: {told["description"]: told for told in one["descriptions"]} for one in effects}
    assert sorted(word for told in own.values() for word in told if word != "nothing") == sorted(words)
    right = [told[word] for told in own.values() for word in told if word != "nothing"]
    scored, bare = right[:-1], right[-1]
    assert len(scored) == 7 and min(one["score"] for one in scored) > 0.9
    assert all(one["score_n"] == 3 + 4 and one["detection"] == 1 for one in scored)
    assert all(
        told["nothing"]["score"] is None and told["nothing"]["detection"] in (0.5, None) for told in own.values()
    )
    assert bare["gold"] and bare["score"] is None and bare["score_n"] is None
    questions = storage.read_table(asked.path(asked.questions("features", "m"))).to_pylist()
    assert sorted((one["split"], one["answer"]) for one in questions) == sorted(
        [("train", word) for word in words[:5]] + [("test", word) for word in words[5:]]
    ), "the chosen label is the answer, whatever it scores"


def test_answers_are_scored_on_the_released_exemplars(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    release(tmp_path / "release", world_target)
    asked = plan(tmp_path, world_target, tmp_path / "release", simulator=model)
    effects_of(asked)
    with Session(asked) as session:
        questions = session.table(asked.questions("features", "m"))
        held_out = questions.filter(pc.equal(questions["split"], "test"))
        own = FeaturePlan(asked, "m")
        told = answered(session.table(own.descriptions()), held_out, [gold_answers(held_out)])
        table = score_answers(session, own, [], told)
    told = [one for (one,) in table["descriptions"].to_pylist()]
    assert len(told) == 3 and all(one["origin"] == "answer" and one["score"] > 0.9 for one in told)


def test_released_vectors_are_described_by_a_model_that_sees_their_exemplars(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    words = release(tmp_path / "release", world_target, "difference")
    section = {"vectors": "differences", "describer": model, "detector": model}
    effects = effects_of(plan(tmp_path, world_target, tmp_path / "release", **section))
    assert sorted(one["descriptions"][0]["description"] for one in effects) == sorted(words)
    assert {one["source"] for one in effects} == {"difference"} and len({one["group"] for one in effects}) == 8
    for split in KEYS:
        vectors = np.load(tmp_path / "release" / f"{split}_vectors.npy")
        for one in effects:
            if one["split"] == split:
                assert one["vectors"] == [vectors[one["feature_id"]].tolist()]
                assert one["descriptions"][0]["detection"] == 1


def test_what_was_exported_gives_the_same_effects_when_it_is_read_again(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    release(tmp_path / "release", world_target, bare=1)
    release(tmp_path / "vectors", world_target, "activation")
    for name, section in (
        ("release", {"simulator": model}),
        ("vectors", {"vectors": "activations", "describer": model, "simulator": model}),
    ):
        asked = plan(tmp_path, world_target, tmp_path / name, **section)
        before = effects_of(asked)
        with Session(asked) as session:
            export_ground_truth(session)
        shutil.move(f"{asked.root}/released/m/features", tmp_path / f"{name} again")
        again = plan(tmp_path, world_target, tmp_path / f"{name} again", **section)
        assert again.effects("features", "m") != asked.effects("features", "m"), "nothing would be read"
        after = effects_of(again)
        assert sorted(after, key=lambda one: one["case_id"]) == sorted(before, key=lambda one: one["case_id"])


@pytest.mark.parametrize(
    ("source", "section", "told"),
    [
        ("activation", {"describer": "m"}, "for its vectors, say what they are: `vectors: activations`"),
        ("activation", {"vectors": "activations"}, "to its vectors belongs a `describer`"),
        ("activation", {"vectors": "activations", "simulator": "m"}, "to its vectors belongs a `describer`"),
        ("sae", {"simulator": "m", "layers": [7, 8]}, "`ground_truth.features.layers`: 'm' has no layer 7"),
    ],
)
def test_released_features_that_nothing_describes_are_refused(
    source: str,
    section: dict[str, Any],
    told: str,
    here: None,
    model: dict[str, Any],
    world_target: Path,
    tmp_path: Path,
) -> None:
    release(tmp_path / "release", world_target, source)
    section = {name: model if value == "m" else value for name, value in section.items()}
    with pytest.raises(BadInput, match=told) as refused:
        effects_of(plan(tmp_path, world_target, tmp_path / "release", **section))
    assert str(refused.value).count("`ground_truth.features") == 1


def test_released_features_without_exemplars_are_refused_where_those_are_needed(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    release(folder, world_target)
    shutil.rmtree(folder / "train")
    asked = plan(tmp_path, world_target, folder, describer=model)
    with pytest.raises(BadInput, match=r"no feature has exemplars in .* \(8 dropped: no exemplars are given for it\)"):
        effects_of(asked)
    (folder / "exemplar_config.json").unlink()
    with pytest.raises(BadInput, match=r"no exemplar_config.json in .*: what describes or scores released features"):
        effects_of(plan(tmp_path, world_target, folder, detector=model))
    labels = plan(tmp_path, world_target, folder)
    assert len(effects_of(labels)) == 8, "labels alone need none"
    assert "vectors" not in labels.cases("features", "m").config


def test_answers_about_released_labels_are_read_and_judged_in_any_words(
    here: None, model: dict[str, Any], world_target: Path, tmp_path: Path, endpoint: Any
) -> None:
    """Labels are no list of all that can be said: another text has no correlation, and is none that cannot be read."""
    release(tmp_path / "release", world_target)
    labels = plan(tmp_path, world_target, tmp_path / "release").experiment.model_dump()
    asked = Plan(Experiment.model_validate(labels | {"evaluate": labels["evaluate"] | {"judge": model}}))
    endpoint.script = lambda prompt, _: "4"
    effects_of(asked)
    with Session(asked) as session:
        make_asked(session)
        run = asked.runs()[0]
        own = session.table(asked.answers(run, "features").parents[-1])
        said = [{"question_id": one, "control": "none"} | SAID for one in own["question_id"].to_pylist()]
        answers = records.rows_table(said, records.ANSWERS)
        answers = answers.set_column(2, answers.schema.field("control"), own["control"])
        session.make_table(asked.answers(run, "features"), lambda: answers)
        graded = _graded(session, "m", "features")
    given = graded.filter(pc.equal(graded["explainer"], "m"))
    assert given.num_rows == 2 * len(KEYS["test"]) and pc.all(given["parsed"]).as_py()
    assert graded["correlation"].null_count == graded.num_rows
    assert set(given["judged"].to_pylist()) == {0.75}
    assert headline("features", [metric.name for metric in measured(graded)]) == "judged"


SAID = {"explainer": "m", "text": "words of no label", "logprob": -1.0, "n_tokens": 4}


def mixed(folder: Path, target: Path) -> None:
    """A release with the labels of an SAE's features to train on, and vectors without any, and their exemplars, to test
    on."""
    release(folder, target)
    release(folder.parent / "differences", target, "difference")
    (folder / "explanations").mkdir()
    for name in ("test_explanations.json", "test_layer_feature_idxs.json"):
        (folder / name).unlink()
    for name in ("test_vectors.npy", "test_indices.json"):
        shutil.copy(folder.parent / "differences" / name, folder / name)


def test_vectors_without_labels_are_asked_about_in_the_test_split_alone(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    mixed(tmp_path / "release", world_target)
    asked = plan(tmp_path, world_target, tmp_path / "release", vectors="differences", simulator=model)
    effects_of(asked)
    questions = storage.read_table(asked.path(asked.questions("features", "m"))).to_pylist()
    told = {split: [one for one in questions if one["split"] == split] for split in ("train", "test")}
    assert len(told["train"]) == 5 and all(one["answer"] in one["answers"] for one in told["train"])
    assert {one["stratum"] for one in told["train"]} == {"sae"}
    assert len(told["test"]) == 3 and all((one["answer"], one["answers"]) == ("", []) for one in told["test"])
    assert {one["stratum"] for one in told["test"]} == {"difference"}
    labels = plan(tmp_path, world_target, tmp_path / "release", vectors="differences")
    with pytest.raises(BadInput, match=r"split 'test' is empty \(3 dropped: no gold description\)"):
        effects_of(labels)


def test_explainers_are_tested_on_vectors_without_labels_by_the_simulator_alone(
    here: None, world_target: Path, model: dict[str, Any], tmp_path: Path
) -> None:
    """Trained on the labels of a release, tested on the vectors of another one and on the target's own activations."""
    words = release(tmp_path / "release", world_target)
    release(tmp_path / "vectors", world_target, "difference")
    others = {"differences": {"path": str(tmp_path / "vectors")}, "activations": {"per_layer": 3}}
    corpus = {"windows": 40, "tokens": 16}
    asked = plan(tmp_path, world_target, tmp_path / "release", simulator=model, corpus=corpus, unlabelled=others)
    with Session(asked) as session:
        make_ground_truth(session)
        make_asked(session)
        vectors = np.load(tmp_path / "vectors" / "test_vectors.npy").tolist()
        rows = answer(session, asked, vectors, words[len(KEYS["train"]) :])
        evaluate(session)
        export_ground_truth(session)
        made = session.table(asked.questions("features", "m")).to_pylist()
    sources = {split: Counter(one["stratum"] for one in made if one["split"] == split) for split in ("train", "test")}
    n = sources["test"]["activation"]
    assert sources == {"train": {"sae": 5}, "test": {"sae": 3, "difference": 3, "activation": n}} and 2 <= n <= 6
    assert all((one["answers"] == []) == (one["stratum"] != "sae") for one in made)
    own = {origin: [row["vectors"] for row in rows if row["stratum"] == origin] for origin in sources["test"]}
    assert all(row["vectors"] in own[row["stratum"]] for row in rows), "shuffled vectors are of another origin"
    table = storage.read_table(f"{asked.path(asked.scores())}/scores").to_pylist()
    found = {(r["explainer"], r["metric"], r["by"]): r for r in table if r["control"] == "none"}
    simulated = {by: found["m", "simulated", f"stratum={by}"] for by in own}
    assert {by: one["n"] for by, one in simulated.items()} == {"sae": 3, "difference": 3, "activation": n}
    assert min(simulated[by]["value"] for by in ("sae", "difference")) > 0.9
    assert all(one["low"] <= one["value"] <= one["high"] for one in simulated.values())
    assert {by for _, metric, by in found if metric == "exact_match" and "=" in by} == {
        *("stratum=sae", "layer=0", "layer=1")
    }, "what nobody described is neither right nor wrong"
    assert found["m", "exact_match", "all"]["n"] == 3 and found["m", "simulated", "all"]["n"] == 6 + n
    assert {by for who, metric, by in found if (who, metric) == (GOLD, "simulated")} >= {"all", "stratum=sae"}
    assert (GOLD, "simulated", "stratum=difference") not in found

    there = f"{asked.root}/released/m/features"
    others = {kind: {"path": f"{there}_{kind}"} for kind in others}
    again = plan(tmp_path, world_target, Path(there), simulator=model, unlabelled=others)
    effects_of(again)
    for mine, theirs in zip(FeaturePlan(again, "m").unlabelled, FeaturePlan(asked, "m").unlabelled, strict=True):
        assert bare_rows(mine, again) == bare_rows(theirs, asked), "what was exported is read again"


def bare_rows(own: FeaturePlan, asked: Plan) -> list[Any]:
    rows = storage.read_table(asked.path(own.exemplars())).to_pylist()
    vectors = storage.read_table(asked.path(own.effects()))["vectors"].to_pylist()
    return sorted((row["layer"], vector, window_texts(row)) for row, vector in zip(rows, vectors, strict=True))


def window_texts(row: dict[str, Any]) -> list[str]:
    return [one["kind"] + "".join(one["tokens"]) for one in row["windows"] if one["kind"] != "near"]


def answer(session: Session, asked: Plan, vectors: list[list[float]], words: Sequence[str]) -> list[dict[str, Any]]:
    """Answers of an explainer as if it was trained: the label, or for the i-th of `vectors` the i-th of `words`.
    Returns the questions, under all controls."""
    [run] = asked.runs()
    finish(asked.explainer(run), asked.root)
    answers = asked.answers(run, "features")
    rows = session.table(answers.parents[-1]).to_pylist()
    told = {tuple(vector): word for vector, word in zip(vectors, words, strict=True)}
    facts = {"explainer": run.explainer, "logprob": -0.1, "n_tokens": 1}
    said = [
        {"question_id": row["question_id"], "control": row["control"], "text": row["answer"] or word} | facts
        for row in rows
        for word in [told.get(tuple(row["vectors"][0]), "nothing")]
    ]
    session.make_table(answers, lambda: records.rows_table(said, records.ANSWERS))
    return rows
