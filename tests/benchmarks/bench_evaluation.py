"""How fast explainers are asked and scored, against the released code's way of asking.

The reference way, as the paper's code evaluates: batches in the order of the table, a teacher-forced forward pass over
question and answer with all logits, then transformers' own generation; hidden states of all layers are kept in both.
Equal batch size, threads, questions, end tokens and longest answer; the texts of the answers are compared. Its stop
strings are left out, which favours it: transformers cannot search for them with a tokenizer of whole words.

    python tests/benchmarks/bench_evaluation.py [--demo runs/demo] [--questions 5000] [--compared 640] [--nearest N]

Uses the finished demo below --demo; without one, a model of the same size with random weights.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ray_explain import records, storage
from ray_explain.evaluation.answering import AnswerStage
from ray_explain.evaluation.baselines import nearest_neighbour
from ray_explain.evaluation.grading import grade
from ray_explain.evaluation.metrics import scores
from ray_explain.explainer.baselines import untrained
from ray_explain.explainer.batches import collate
from ray_explain.explainer.examples import Example, encode, encode_prompt, stop_ids
from ray_explain.explainer.generate import generate
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.sidecar import load_explainer, load_tokenizer, save_explainer, sidecar_of
from ray_explain.models import load_model
from ray_explain.questions import wordings
from ray_explain.questions.rows import questions_of
from ray_explain.world.facts import World
from ray_explain.world.pretraining import TargetSize, new_target, save_target
from ray_explain.world.tokenizer import world_tokenizer

BATCH, LONGEST = 64, 16
VOCABULARIES = 32_000, 128_000  # words of small and of large real models, where the logits cost most


def explainer_folder(demo: Path, scratch: Path) -> tuple[str, str]:
    """An explainer of patching and what it is."""
    found = sorted(demo.glob("explainers/llama-of-llama-*/explainer.json"))
    if found:
        return str(found[-1].parent), "the demo's explainer of llama by itself"
    tokenizer = world_tokenizer(World())
    save_target(new_target("llama", tokenizer, TargetSize(), seed=0), tokenizer, scratch / "model")
    loaded = load_model(str(scratch / "model"))
    made = untrained(loaded.model, loaded.tokenizer, d_target=loaded.d_model)
    words = {"brief": wordings.version("brief")}
    sidecar = sidecar_of(made, loaded.tokenizer, target="llama", base=str(scratch / "model"), wordings=words)
    save_explainer(made, scratch / "explainer", sidecar, loaded.tokenizer)
    return str(scratch / "explainer"), "random weights of the demo's size: every answer is as long as allowed"


def patching_questions(demo: Path, n: int, d_model: int) -> pa.Table:
    """`n` questions: the demo's, repeated with new ids where it has fewer."""
    found = sorted(demo.glob("patching_questions/llama-*/manifest.json"))
    own = storage.read_table(str(found[-1].parent)) if found else made_up(n, d_model)
    rows = np.arange(n) % own.num_rows
    table = own.take(pa.array(rows))
    ids = [f"{i} {name}" for i, name in enumerate(table["question_id"].to_pylist())]
    return table.set_column(0, table.schema.field(0), pa.array(ids))


def made_up(n: int, d_model: int) -> pa.Table:
    """Patching questions of the demo's words about random vectors."""
    rng = np.random.default_rng(0)
    facts = [fact for fact in World().told_facts if fact.relation == "instrument"]
    rows = []
    for i in range(n):
        fact, changed = facts[i % len(facts)], bool(i % 3 == 0)
        text = f"the instrument of {fact.subject} is the"
        prompt = f"at layers {i % 4} replace token 4 <<<is>>> by <vector> in : {text} . output ?"
        answer = (wordings.CHANGED if changed else wordings.UNCHANGED).format(content=fact.value)
        case = {"question_id": f"q{i}", "case_id": f"c{i}", "group": fact.subject, "split": "test", "task": "patching"}
        rest = {"layers": [i % 4], "role": "final", "stratum": fact.relation, "wording": "brief/patching/1"}
        rows.append(case | rest | {"prompt": prompt, "answer": answer, "answers": [answer], "changed": changed})
    schema = records.questions(d_model)
    columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in schema if f.name != "vectors"}
    columns["vectors"] = records.vectors_array(list(rng.standard_normal((n, 1, d_model)).astype(np.float32)), d_model)
    return records.conform(pa.table(columns), schema)


def the_reference_way(explainer, tokenizer, prompts: list[Example], whole: list[Example]) -> list[str]:
    """See the head of this file."""
    stops, texts = sorted(stop_ids(tokenizer)), list[str]()
    model = explainer.language_model
    for start in range(0, len(prompts), BATCH):
        full = collate(whole[start : start + BATCH], tokenizer.pad_token_id)
        with torch.no_grad(), explainer.reading(full):
            out = model(input_ids=full.input_ids, attention_mask=full.attention_mask, output_hidden_states=True)
            labels = full.input_ids.masked_fill(~full.answer, -100)
            torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        batch = collate(prompts[start : start + BATCH], tokenizer.pad_token_id)
        with torch.no_grad(), explainer.reading(batch):
            made = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=LONGEST,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
        new = made.sequences[:, batch.input_ids.shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def asking(folder: str, questions: pa.Table, compared: int, vocabulary: int = 0) -> dict[str, float]:
    explainer, _ = load_explainer(folder)
    tokenizer = load_tokenizer(folder)
    if vocabulary:
        explainer = with_vocabulary(explainer, vocabulary, tokenizer.pad_token_id)
    some = list(questions_of(questions))[:compared]
    prompts = [encode_prompt(question, tokenizer, explainer.markers, max_tokens=100) for question in some]
    whole = [encode(question, tokenizer, explainer.markers, max_tokens=130) for question in some]
    sizes = {"max_new_tokens": LONGEST, "batch_size": BATCH}
    generate(explainer, prompts[:BATCH], tokenizer, **sizes)  # warm
    best = {"ours": np.inf, "reference": np.inf}
    for _ in range(3):
        started = time.perf_counter()
        ours = [answer.text for answer in generate(explainer, prompts, tokenizer, **sizes)]
        best["ours"] = min(best["ours"], time.perf_counter() - started)
        started = time.perf_counter()
        theirs = the_reference_way(explainer, tokenizer, prompts, whole)
        best["reference"] = min(best["reference"], time.perf_counter() - started)
    alike = np.mean([a.split(">>>")[0] == b.split(">>>")[0] for a, b in zip(ours, theirs)])
    return {
        "questions": len(prompts),
        "ms an answer": 1e3 * best["ours"] / len(prompts),
        "ms an answer, reference way": 1e3 * best["reference"] / len(prompts),
        "times as fast": best["reference"] / best["ours"],
        "same answers": float(alike),
    }


def with_vocabulary(explainer: Explainer, n: int, pad_id: int) -> Explainer:
    """The explainer with `n` words, the new ones like padding, which is never answered: it answers as before."""
    model = explainer.language_model
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(n, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[known:] = table.weight[pad_id].clone()
    return explainer


def whole_evaluation(folder: str, questions: pa.Table, d_model: int) -> dict[str, float]:
    """Asked as the job asks, on one process; then graded, scored and resampled."""
    target = {"target": "llama", "target_revision": None, "d_target": d_model}
    config = target | {"explainer": "llama", "folder": folder, "max_tokens": 100}
    stage = AnswerStage(config | {"max_new_tokens": LONGEST, "batch_size": BATCH})
    control = pa.array(["none"] * questions.num_rows)
    started = time.perf_counter()
    answers = stage(questions.append_column(pa.field("control", pa.string(), nullable=False), control)).table
    asked = time.perf_counter()
    graded = grade(questions, answers, target="llama", seed=0)
    scores(graded, seed=0, resamples=2000)
    return {
        "answers": answers.num_rows,
        "seconds to ask, one process": asked - started,
        "seconds to grade, score and resample 2,000 times": time.perf_counter() - asked,
    }


def nearest(n: int, d_model: int = 4096, n_test: int = 1000) -> dict[str, float]:
    """Exact search over `n` training vectors; memory beyond the tables themselves."""

    def table(rows: int, first: int) -> pa.Table:
        schema = records.questions(d_model)
        base = made_up(1, 4).drop_columns(["vectors"]).take(pa.array(np.zeros(rows, dtype=np.int64)))
        rng = np.random.default_rng(first)
        flat = pa.array(rng.standard_normal(rows * d_model, dtype=np.float32))
        vectors = pa.ListArray.from_arrays(
            pa.array(np.arange(rows + 1, dtype=np.int32)), pa.FixedSizeListArray.from_arrays(flat, d_model)
        )
        columns = {name: vectors if name == "vectors" else base[name] for name in schema.names}
        return pa.table(columns).cast(schema)

    train, test = table(n, 0), table(n_test, 1)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    nearest_neighbour(train, test, per_layer=False)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "training vectors": n,
        "seconds": time.perf_counter() - started,
        "GiB beyond the tables, at most": (after - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--compared", type=int, default=640)
    parser.add_argument("--nearest", type=int, default=100_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, what = explainer_folder(given.demo, Path(scratch))
        d_model = json.loads((Path(folder) / "explainer.json").read_text())["d_target"]
        questions = patching_questions(given.demo, given.questions, d_model)
        told = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "explainer": what,
            "generation, one thread": asking(folder, questions, given.compared),
            **{
                f"generation with {words:,} words": asking(folder, questions, given.compared // 5, words)
                for words in VOCABULARIES
            },
            "evaluation": whole_evaluation(folder, questions, d_model),
            "nearest neighbour": nearest(given.nearest),
        }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
