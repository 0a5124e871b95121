import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_explain.explainer.examples import Question, encode_prompt
from ray_explain.explainer.generate import generate
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import markers_of
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection
from ray_explain.explainer.sidecar import (
    Mismatch,
    fingerprint_of,
    load_explainer,
    load_tokenizer,
    read_sidecar,
    save_explainer,
    sidecar_of,
)
from ray_explain.explainer.vocabulary import make_room

QUESTION = Question("q", "patching", "what does <vector> encode at layer 1 ?", "paris", np.ones((1, 20)), (1,))


@pytest.fixture(params=["full", "lora"])
def saved(request, tmp_path, new_model, new_tokenizer):
    """An explainer with random adapters, markers, projection, new tokens: (explainer, tokenizer, folder)."""
    tokenizer, base = new_tokenizer("gpt2_base"), new_model("qwen3")
    tokenizer.add_tokens([f"w{i}" for i in range(50 - len(tokenizer))])
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    markers = markers_of(tokenizer)
    make_room(model, tokenizer)
    if request.param == "lora":
        model = with_lora(model, rank=4, alpha=8, dropout=0.1)
    explainer = Explainer(
        model,
        markers,
        Projection("linear", 20, 32, [0, 1, 3]),
        InjectionConfig(scale="mean_embedding"),
        train_markers=request.param == "lora",
    ).eval()
    with torch.no_grad():
        for parameter in explainer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    sidecar = sidecar_of(
        explainer,
        tokenizer,
        target="hub/target",
        target_revision="abc",
        target_weights="0" * 16,
        base=str(tmp_path / "base"),
        wordings={"p": "1"},
    )
    save_explainer(explainer, tmp_path / "explainer", sidecar, tokenizer)
    return explainer, tokenizer, tmp_path / "explainer"


def answers(explainer, tokenizer):
    rng = np.random.default_rng(0)
    questions = [
        QUESTION._replace(vectors=rng.standard_normal((1, 20)), layers=block) for block in [(0,), (1,), (0, 3)]
    ]
    prompts = [encode_prompt(q, tokenizer, explainer.markers, max_tokens=50) for q in questions]
    return generate(explainer, prompts, tokenizer, max_new_tokens=8, batch_size=2)


def test_a_reloaded_explainer_gives_the_same_answers(saved):
    explainer, tokenizer, folder = saved
    loaded, sidecar = load_explainer(folder)
    assert answers(loaded, load_tokenizer(folder)) == answers(explainer, tokenizer)
    target = dict(target="hub/target", target_revision="abc", target_weights="0" * 16)
    again = dict(base=str(folder.parent / "base"), wordings={"p": "1"})
    assert sidecar == sidecar_of(loaded, load_tokenizer(folder), **target, **again)
    assert not loaded.training


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_the_model_of_an_adapter_may_have_moved(saved):
    explainer, tokenizer, folder = saved
    moved = folder.parent / "elsewhere"
    (folder.parent / "base").rename(moved)
    loaded, _ = load_explainer(folder, base=str(moved))
    assert answers(loaded, tokenizer) == answers(explainer, tokenizer)


def test_every_weight_comes_back(saved):
    explainer, _, folder = saved
    loaded, _ = load_explainer(folder)
    own, found = explainer.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys()
    for name in own:
        torch.testing.assert_close(found[name], own[name], rtol=0, atol=0)
    assert loaded.embedding_norm == explainer.embedding_norm


def test_the_folder_loads_with_plain_transformers_or_peft(saved):
    explainer, _, folder = saved
    if isinstance(explainer.model, PeftModel):
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        make_room(base, AutoTokenizer.from_pretrained(folder))
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 7, 30, 12]])
    torch.testing.assert_close(model.eval()(ids).logits, explainer.model(ids).logits)


def test_a_gathered_state_dict_is_written_instead_of_the_own_one(saved, tmp_path):
    explainer, tokenizer, folder = saved
    gathered = {name: tensor + 1 for name, tensor in explainer.state_dict().items()}
    save_explainer(explainer, tmp_path / "other", read_sidecar(folder), tokenizer, state_dict=gathered)
    loaded, _ = load_explainer(tmp_path / "other")
    for name, parameter in loaded.named_parameters():
        if explainer.get_parameter(name).requires_grad:
            torch.testing.assert_close(parameter, gathered[name])


def test_tensors_of_size_zero_are_refused(saved, tmp_path):
    explainer, tokenizer, folder = saved
    state = {name: torch.empty(0) for name in explainer.state_dict()}
    with pytest.raises(ValueError, match="size 0"):
        save_explainer(explainer, tmp_path / "other", read_sidecar(folder), tokenizer, state_dict=state)


def test_the_sidecar_is_plain_json_that_says_what_it_is_for(saved):
    explainer, tokenizer, folder = saved
    values = json.loads((folder / "explainer.json").read_text())
    assert (values["target"], values["target_revision"], values["d_target"]) == ("hub/target", "abc", 20)
    assert (values["layers"], values["projection"]) == ([0, 1, 3], "linear")
    assert values["injection"] == {"mode": "replace", "layer": None, "scale": "mean_embedding"}
    assert [values["markers"][f"{name}_id"] for name in ("begin", "slot", "end")] == list(explainer.markers.ids)
    assert values["tokenizer"] == fingerprint_of(tokenizer)
    assert values["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (dict(target="hub/other"), "has target 'hub/target'"),
        (dict(target_revision="abd"), "has target_revision 'abc'"),
        (dict(d_target=32), "has d_target 20"),
        (dict(target_weights="1" * 16), "has target_weights '0000000000000000'"),
        (dict(wordings={"p": "2"}), "not on 'p' of version 2"),
        (dict(wordings={"brief": "1"}), "not on 'brief'"),
    ],
)
def test_use_for_what_it_was_not_trained_for_is_refused_with_what_differs(saved, use, message):
    sidecar = read_sidecar(saved[2])
    sidecar.check(target="hub/target", target_revision="abc", d_target=20, wordings={"p": "1"})
    with pytest.raises(Mismatch, match=message):
        sidecar.check(**use)


def test_weights_of_a_target_that_were_not_known_in_training_are_not_asked_for(saved):
    replace(read_sidecar(saved[2]), target_weights=None).check(target_weights="1" * 16)


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_adapters_are_refused_on_a_base_that_they_were_not_trained_on(saved, new_model):
    """Of the same shape with other weights, and of another number of layers."""
    folder = saved[2]
    new_model("qwen3", seed=5).save_pretrained(folder.parent / "other")
    with pytest.raises(Mismatch, match=r"has weights [0-9a-f]{16}, the explainer's adapters were trained on"):
        load_explainer(folder, base=str(folder.parent / "other"))
    shallow = new_model("qwen3").config
    shallow.num_hidden_layers, shallow.layer_types = 2, shallow.layer_types[:2]
    AutoModelForCausalLM.from_config(shallow).save_pretrained(folder.parent / "shallow")
    with pytest.raises(Mismatch, match="has number of layers 2, the explainer was trained with 3"):
        load_explainer(folder, base=str(folder.parent / "shallow"))


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_the_base_of_adapters_may_be_kept_in_another_dtype_and_other_files(saved):
    folder = saved[2]
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.bfloat16)
    base.save_pretrained(folder.parent / "shards", max_shard_size="20KB")
    loaded, _ = load_explainer(folder, base=str(folder.parent / "shards"))
    assert loaded.language_model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in saved[0].named_parameters()]


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
@pytest.mark.parametrize("change", ["lacks", "has"])
def test_adapters_that_are_missing_or_too_many_are_refused(saved, change):
    path = saved[2] / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    if change == "lacks":
        del tensors[first]
    else:
        tensors[first.replace("layers.0", "layers.7")] = tensors[first].clone()
    save_file(tensors, path)
    with pytest.raises(Mismatch, match=rf"adapter_model.safetensors {change} .*lora_A.weight, "):
        load_explainer(saved[2])


@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_a_sidecar_that_is_too_old_to_know_its_base_is_read_with_a_warning(saved, caplog):
    path = saved[2] / "explainer.json"
    values = json.loads(path.read_text())
    old = {name: value for name, value in values.items() if name not in ("n_layers", "base_weights", "target_weights")}
    path.write_text(json.dumps(old))
    load_explainer(saved[2])
    assert "does not say which weights its adapters change" in caplog.text


def change_json(folder, **changes):
    path = folder / "explainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_files_that_do_not_belong_together_are_refused(saved):
    _, tokenizer, folder = saved
    original = (folder / "explainer.json").read_text()
    markers = json.loads(original)["markers"]
    for changes, message in [
        (dict(tokenizer="0" * 16), "has fingerprint"),
        (dict(markers={**markers, "slot_id": 3}), "other markers"),
        (dict(layers=[0, 1]), "the sidecar asks for"),
        (dict(d_explainer=48), "width 32"),
        (dict(future=1), "another version of this program"),
    ]:
        change_json(folder, **changes)
        with pytest.raises(Mismatch, match=message):
            load_explainer(folder)
        (folder / "explainer.json").write_text(original)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(Mismatch, match="has fingerprint"):
        load_explainer(folder)


def test_a_folder_that_was_not_written_to_the_end_is_refused(saved):
    folder = saved[2]
    (folder / "explainer.json").unlink()
    with pytest.raises(Mismatch, match="not written to the end"):
        load_explainer(folder)


def test_fingerprints_tell_tokenizers_apart(new_tokenizer):
    names = ("llama_base", "llama_chat", "qwen_chat", "gemma_chat", "gpt2_base")
    prints = [fingerprint_of(new_tokenizer(name)) for name in names]
    assert len(set(prints)) == len(names)
    assert prints == [fingerprint_of(new_tokenizer(name)) for name in names]


def test_a_tokenizer_keeps_its_fingerprint_on_disk(tokenizer, tmp_path):
    markers_of(tokenizer)
    tokenizer(["a", "the output"], padding=True)  # leaves a trace in some of its settings
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint_of(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint_of(tokenizer)
