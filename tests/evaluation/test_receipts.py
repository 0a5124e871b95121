import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ray_explain import records, storage
from ray_explain.ask import main
from ray_explain.config import read_experiment
from ray_explain.distributed.plan import Plan
from ray_explain.evaluation import receipts
from ray_explain.evaluation.receipts import Witness, ablation_of, patch_of, responses, strongest_windows
from ray_explain.explainer.baselines import untrained
from ray_explain.explainer.sidecar import save_explainer, sidecar_of
from ray_explain.ground_truth.corpora import windows_of_texts
from ray_explain.ground_truth.pairs import Change
from ray_explain.models import files_fingerprint, load_model
from ray_explain.questions import wordings
from ray_explain.world.facts import World
from ray_explain.world.pretraining import TargetSize, new_target, save_target
from ray_explain.world.tokenizer import world_tokenizer
from tests.ground_truth.conftest import random_model, saved
from tests.object_store import BUCKET

TEXTS = [f"{i * i + 100} times the {animal} sat on a mat" for i, animal in enumerate(["cat", "dog", "bird"] * 30)]


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer(World())


@pytest.fixture(scope="module")
def explainer(world_target, tmp_path_factory):
    """Folder of an explainer that was never trained."""
    folder = tmp_path_factory.mktemp("explainer")
    loaded = load_model(str(world_target))
    model = untrained(loaded.model, loaded.tokenizer, d_target=32)
    versions = {"brief": wordings.version("brief")}
    place = {"target_weights": files_fingerprint(str(world_target)), "base": str(world_target)}
    sidecar = sidecar_of(model, loaded.tokenizer, target="llama", **place, wordings=versions)
    save_explainer(model, folder, sidecar, loaded.tokenizer)
    return folder


def place(world_target):
    return {"model": str(world_target), "revision": None, "dtype": "float32"}


def witness(explainer, world_target):
    asking = {"explainer": "x", "folder": str(explainer), "target": "llama", "target_revision": None, "d_target": 32}
    sizes = {"batch_size": 8, "max_tokens": 100, "max_new_tokens": 4}
    return Witness(asking | sizes, place(world_target), wording="brief", seed=0)


def names():
    return [fact.subject for fact in World().told_facts if fact.relation == "instrument"][:2]


def prompts():
    one, other = names()
    return f"the instrument of {one} is the", f"the instrument of {other} is the"


@pytest.mark.parametrize(
    "position, source_position, expected",
    [
        ("subject_last", None, (4, 4)),
        ("final", None, (6, 6)),
        ("relation", None, (5, 5)),
        ("2", None, (2, 2)),
        ("4", "6", (4, 6)),
        ("instrument of", None, (3, 3)),
        ("is", "instrument", (5, 2)),
    ],
)
def test_a_position_is_a_role_a_number_or_a_piece_of_the_prompt(tokenizer, position, source_position, expected):
    prompt, source = prompts()
    case = patch_of(
        tokenizer, prompt, source, block=(1, 1), position=position, source_position=source_position
    ).to_pylist()[0]
    assert (case["base_positions"], case["source_positions"]) == ([expected[0]], [expected[1]])


@pytest.mark.parametrize(
    "position, said",
    [
        ("subject_first", "share subject_last, relation, final"),
        ("40", "has 7 tokens, numbered from 0 .*6 'the'"),
        ("the", "is 2 times in the prompt"),
        ("saxophone", "is not in the prompt"),
    ],
)
def test_a_position_that_is_not_there_is_refused_with_those_that_are(tokenizer, position, said):
    with pytest.raises(ValueError, match=said):
        patch_of(tokenizer, *prompts(), block=(0, 0), position=position)


def test_prompts_without_a_common_frame_need_their_subjects_named(tokenizer):
    one, other = names()
    texts = f"{one} is a", f"the home of {other}"
    with pytest.raises(ValueError, match="cannot be told apart"):
        patch_of(tokenizer, *texts, block=(0, 0), position="subject_last")
    case = patch_of(tokenizer, *texts, block=(0, 0), position="subject_last", subjects=(one, other)).to_pylist()[0]
    assert (case["base_positions"], case["source_positions"]) == ([1], [4])
    with pytest.raises(ValueError, match="are the same"):
        patch_of(tokenizer, texts[0], texts[0], block=(0, 0), position="subject_last")


def test_a_hint_is_taken_out_with_the_space_after_it():
    case = ablation_of("say a . hint : b . answer :", "hint : b .").to_pylist()[0]
    left = case["prompt"][: case["span_start"]] + case["prompt"][case["span_end"] :]
    assert left == "say a . answer :"
    with pytest.raises(ValueError, match="is not in the prompt"):
        ablation_of("say a", "hint : b .")
    with pytest.raises(ValueError, match="nothing would be left"):
        ablation_of("hint : b .", "hint : b .")


def test_what_is_measured_is_what_the_target_does(explainer, world_target, tokenizer):
    """At the last layer and position, the patched run says what the source run says."""
    prompt, source = prompts()
    cases = [
        patch_of(tokenizer, a, b, block=(1, 1), position="final").to_pylist()[0]
        for a, b in [(prompt, source), (source, prompt)]
    ]
    there, back = witness(explainer, world_target).patches(records.rows_table(cases, records.PATCHING_CASES), tokenizer)
    told = [detail.split("'")[1] for detail in (*there.details[:2], *back.details[:2])]
    assert told[1] == told[2] and told[3] == told[0]
    assert not there.confirmed and 0 <= there.confidence <= 1


def test_an_explanation_is_confirmed_exactly_where_it_is_what_was_measured(
    explainer, world_target, tokenizer, monkeypatch
):
    """An explainer that gives the right answer to one question, with other spaces, and the wrong one to another."""
    asked = witness(explainer, world_target)
    cases = [patch_of(tokenizer, *prompts(), block=(0, 0), position=position).to_pylist()[0] for position in ("2", "4")]
    original = asked._answering.__call__

    def telling(table):
        result = original(table)
        right = table["answer"].to_pylist()
        texts = [right[0].upper().replace("<<<", "<<< "), "The most likely output would change to <<<nonsense>>>."]
        at = result.table.column_names.index("text")
        return result._replace(table=result.table.set_column(at, result.table.schema.field("text"), [texts]))

    monkeypatch.setattr(asked, "_answering", telling)
    receipts = asked.patches(records.rows_table(cases, records.PATCHING_CASES), tokenizer)
    assert [receipt.confirmed for receipt in receipts] == [True, False]
    assert all(receipt.readable for receipt in receipts)


def test_a_vector_responds_to_the_words_it_was_read_at(world_target):
    """The mean activation at one frequent word, away from the mean of all, is told by that word."""
    loaded = load_model(str(world_target))
    embedding = loaded.model.get_input_embeddings().weight.detach()
    token = loaded.tokenizer.encode(".")[-1]
    vector = (embedding[token] - embedding.mean(0)).numpy()
    found = responses(place(world_target), World(), vector, 0)
    assert found.best == "the sign ."
    assert {word for word, _ in found.strongest} == {"."}
    assert all(-1 <= value <= 1 and not math.isnan(value) for value in found.correlations.values())


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """Config of a random target that reads bytes, as hub models do."""
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    core.train_from_iterator(TEXTS, BpeTrainer(vocab_size=350, initial_alphabet=ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="!")
    return saved(random_model(len(tokenizer)), tokenizer, tmp_path_factory.mktemp("bytewise"))


@pytest.mark.parametrize("most, read", [(1000, range(90)), (40, range(0, 90, 3))])
def test_a_vector_of_any_target_is_tried_on_windows_of_a_corpus(bytewise, tmp_path, monkeypatch, most, read):
    """Where transformers' own hidden states have most of it: first tokens left out, windows spread over the corpus."""
    monkeypatch.setattr(receipts, "WINDOWS", most)
    monkeypatch.setattr(receipts, "STRONGEST", 4)
    tokenizer = AutoTokenizer.from_pretrained(bytewise["model"])
    model = AutoModelForCausalLM.from_pretrained(bytewise["model"])
    windows = windows_of_texts(TEXTS, tokenizer, n=90, tokens=40)
    storage.write_table(windows, str(tmp_path / "windows" / "table.parquet"))
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    expected = []
    for number in read:
        ids = windows["tokens"][number].as_py()
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
        product = hidden[0, 1:] @ torch.tensor(vector)
        expected.append((product.max().item(), tokenizer.decode(ids[1 + int(product.argmax())]).strip(), TEXTS[number]))
    best = sorted(expected, reverse=True)[:4]
    found = strongest_windows(bytewise, str(tmp_path / "windows"), windows.num_rows, vector, 1)
    assert len({value for value, _, _ in best}) == len(found) == 4
    assert [token for token, _ in found] == [token for _, token, _ in best]
    assert all(text in whole and token in text for (token, text), (_, _, whole) in zip(found, best))


def test_a_target_that_does_not_read_the_world_is_told_what_its_vectors_need(bytewise):
    with pytest.raises(ValueError, match="has a corpus and a describer: this target cannot read"):
        responses(bytewise, World(), np.ones(32, np.float32), 0)


def test_without_a_right_description_nothing_is_confirmed_or_refuted(explainer, world_target):
    receipt = witness(explainer, world_target).feature(np.ones(32, np.float32), 0, [], ["responds to 'dog'"])
    assert receipt.confirmed is None and receipt.measured == "" and receipt.details == ("responds to 'dog'",)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_the_job_prints_explanation_outcome_and_verdict(explainer, world_target, capsys, tmp_path):
    whom = ("--explainer", explainer, "--target", world_target)
    prompt, source = prompts()
    assert run(*whom, "--prompt", prompt, "--source", source, "--layer", 1, "--position", "subject_last") == 0
    told = capsys.readouterr().out
    for word in ("asked", "explanation", "measured", "patched:", "verdict      refuted"):
        assert word in told
    assert run(*whom, "--prompt", "the instrument is . hint : guitar . answer :", "--hint", "hint : guitar .") == 0
    assert "without it:" in capsys.readouterr().out
    np.save(tmp_path / "v.npy", np.ones(32, np.float32))
    assert run(*whom, "--vector", tmp_path / "v.npy", "--layer", 0) == 0
    told = capsys.readouterr().out
    assert "correlates with" in told and "verdict      open: no description" in told


def experiment_around(explainer, world_target, root, **patching):
    """A copy of the explainer's folder in an experiment's storage at `root`."""
    experiment = {
        "name": "asked",
        "storage": str(root),
        "models": {"llama": {"path": str(world_target)}},
        "targets": ["llama"],
        "explainers": ["llama"],
        "ground_truth": {"wording": "brief", "patching": {"cases": {"train": 8, "test": 4}, "blocks": 2, **patching}},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(experiment))
    shutil.copytree(explainer, root / "explainers" / "one")
    return root / "explainers" / "one"


def test_a_patch_does_what_patches_of_the_experiment_do(explainer, world_target, tokenizer, capsys, tmp_path):
    folder = experiment_around(explainer, world_target, tmp_path, site="mlp_out")
    where = {"block": (1, 1), "position": "final"}
    asked = ("--prompt", prompts()[0], "--source", prompts()[1], "--layer", 1, "--position", "final")
    assert run("--explainer", folder, *asked) == 0
    told = capsys.readouterr().out
    details = [
        witness(explainer, world_target)
        .patches(patch_of(tokenizer, *prompts(), **where, change=Change(site)), tokenizer)[0]
        .details
        for site in ("mlp_out", "resid_post")
    ]
    assert all(detail in told for detail in details[0]) and details[1][-1] not in told


def test_an_explainer_of_another_experiment_in_the_storage_is_told_to_be_one(explainer, world_target, capsys, tmp_path):
    """What is done to the target is as the last config says, whatever the explainer was trained on."""
    folder = experiment_around(explainer, world_target, tmp_path, site="mlp_out")
    plan = Plan(read_experiment(str(tmp_path / "config.yaml")))
    asked = ("--prompt", prompts()[0], "--source", prompts()[1], "--layer", 1, "--position", "final")
    for parents, foreign in (([plan.questions("patching", "llama").fingerprint], False), (["of another"], True)):
        (folder / "manifest.json").write_text(json.dumps({"config": {}, "parents": parents}))
        assert run("--explainer", folder, *asked) == 0
        assert ("was not trained on such questions of the config beside it" in capsys.readouterr().out) is foreign


def test_an_explainer_without_vectors_is_asked_without(explainer, world_target, capsys, tmp_path, monkeypatch):
    folder = experiment_around(explainer, world_target, tmp_path)
    (folder / "manifest.json").write_text(json.dumps({"config": {"text_only": True}, "parents": []}))
    given = []
    monkeypatch.setattr(
        "ray_explain.evaluation.answering.AnswerStage._answers",
        lambda stage, asked: given.extend(prompt.vectors for prompt in asked) or [],
    )
    asked = ("--prompt", prompts()[0], "--source", prompts()[1], "--layer", 1, "--position", "subject_last")
    run("--explainer", folder, *asked)
    assert [np.abs(vector).max() for vector in given] == [0]
    (folder / "manifest.json").write_text(json.dumps({"config": {}, "parents": []}))
    run("--explainer", folder, *asked)
    assert np.abs(given[-1]).max() > 0


def test_explainer_and_target_may_lie_on_s3(explainer, world_target, object_store, capsys):
    for folder, name in ((explainer, "explainer"), (world_target, "target")):
        storage.upload_folder(str(folder), f"s3://{BUCKET}/asked/{name}")
    question = ("--prompt", "the instrument is . hint : guitar . answer :", "--hint", "hint : guitar .")
    told = []
    for root in (f"s3://{BUCKET}/asked", None):
        whom = (f"{root}/explainer", f"{root}/target") if root else (explainer, world_target)
        assert run("--explainer", whom[0], "--target", whom[1], *question) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if "on the target" not in line])
    assert told[0] == told[1]
    nothing = f"s3://{BUCKET}/asked/nothing"
    assert run("--explainer", nothing, "--target", world_target, *question) == 2
    assert f"{nothing} holds no explainer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what, said",
    [
        (("--layer", 2, "--position", "final"), "llama has 2 layers, numbered from 0"),
        (("--layer", "x", "--position", "final"), "it is a number such as 2, or a block"),
        (("--layer", 1, "--position", "option"), "'option' is not in the prompt"),
        (("--layer", 1), "needs --position"),
        (("--hint", "the"), "not several of them"),
    ],
)
def test_a_question_that_cannot_be_asked_is_told(explainer, world_target, capsys, what, said):
    prompt, source = prompts()
    whom = ("--explainer", explainer, "--target", world_target, "--prompt", prompt, "--source", source)
    assert run(*whom, *what) == 2
    assert said in capsys.readouterr().err


def test_words_that_the_target_does_not_know_are_told(explainer, world_target, capsys):
    whom = ("--explainer", explainer, "--target", world_target)
    assert run(*whom, "--prompt", "xyzzy the", "--hint", "the") == 2
    assert "cannot be measured: an unknown token: 'xyzzy'\n" in capsys.readouterr().err
    asked = ("--prompt", "the instrument of xyzzy is", "--source", "the instrument of plugh is", "--layer", 1)
    assert run(*whom, *asked, "--position", "final") == 2
    assert "cannot be measured: an unknown token: 'xyzzy', 'plugh'\n" in capsys.readouterr().err


def test_an_explainer_whose_target_or_words_are_not_known_is_told(explainer, capsys, tmp_path):
    question = ("--prompt", "the instrument is . hint : guitar . answer :", "--hint", "hint : guitar .")
    assert run("--explainer", tmp_path, *question) == 2
    assert "it is not an explainer" in capsys.readouterr().err
    assert run("--explainer", explainer, *question) == 2
    assert "explains 'llama', and no experiment beside it" in capsys.readouterr().err
    assert run(*question) == 2
    assert "give either --explainer" in capsys.readouterr().err


def test_a_target_that_is_nowhere_is_told(explainer, capsys, tmp_path):
    question = ("--prompt", "the instrument is . hint : guitar . answer :", "--hint", "hint : guitar .")
    assert run("--explainer", explainer, "--target", tmp_path / "nowhere", *question) == 2
    told = capsys.readouterr().err
    assert f"no model can be read at '{tmp_path}/nowhere'" in told and len(told.splitlines()) == 1


def test_an_explainer_trained_on_other_words_is_refused(explainer, world_target, capsys):
    sidecar = explainer / "explainer.json"
    before = sidecar.read_text()
    sidecar.write_text(json.dumps({**json.loads(before), "wordings": {"brief": "0" * 16}}))
    try:
        assert run("--explainer", explainer, "--target", world_target, "--prompt", "the pet", "--hint", "pet") == 2
        assert "was trained on wordings" in capsys.readouterr().err
    finally:
        sidecar.write_text(before)


HINT = ("--prompt", "the instrument is . hint : guitar . answer :", "--hint", "hint : guitar .")


@pytest.mark.parametrize(
    "d_model, seed, said",
    [
        (48, 0, "this explainer has d_target 32, it cannot be used with 48"),
        (32, 1, "this explainer has target_weights"),
    ],
)
def test_a_target_of_another_width_or_of_other_weights_is_refused(explainer, tmp_path, capsys, d_model, seed, said):
    other = new_target("llama", world_tokenizer(World()), TargetSize(d_model=d_model, n_layers=2, n_heads=2), seed=seed)
    save_target(other, world_tokenizer(World()), tmp_path)
    assert run("--explainer", explainer, "--target", tmp_path, *HINT) == 2
    assert said in capsys.readouterr().err


def test_another_target_of_the_experiment_is_refused_by_its_name(explainer, world_target, tmp_path, capsys):
    models = {name: {"path": str(world_target)} for name in ("llama", "twin")}
    experiment = {
        "name": "x",
        "storage": str(tmp_path),
        "models": models,
        "targets": ["llama"],
        "explainers": ["llama"],
    }
    experiment["ground_truth"] = {"ablation": {"cases": {"train": 1, "test": 1}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment))
    shutil.copytree(explainer, tmp_path / "explainers" / "x")
    whom = ("--explainer", tmp_path / "explainers" / "x")
    assert run(*whom, "--target", "llama", *HINT) == 0
    capsys.readouterr()
    assert run(*whom, "--target", "twin", *HINT) == 2
    assert "this explainer has target 'llama', it cannot be used with 'twin'" in capsys.readouterr().err
