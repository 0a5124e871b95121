import json
import shutil
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from ray_explain import models as loading
from ray_explain.errors import BadInput
from ray_explain.models import ModelError, files_fingerprint, load_model, self_check, weights_fingerprint


def tokenizer(n_words=50, **special):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_words)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_llama(seed=0, **config):
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3}
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=1, eos_token_id=2, **config)
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(folder)
    tokenizer(eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "target")


def test_a_saved_model_is_loaded_ready_to_be_read(saved):
    loaded = load_model(str(saved), device="cpu")
    ids = loaded.tokenizer("w3 w4 w5", return_tensors="pt").input_ids
    assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)
    assert (loaded.d_model, loaded.n_layers, loaded.d_vocab, loaded.pad_id) == (32, 3, 50, 2)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_in_the_dtype_asked_for(saved, dtype):
    assert load_model(str(saved), dtype=dtype, device="cpu").layout.dtype == getattr(torch, dtype)


def test_fingerprints_follow_the_weights_whatever_the_place_the_files_and_the_dtype(saved, folder):
    own = files_fingerprint(str(saved))
    assert own == files_fingerprint(str(folder))
    (folder / "model.safetensors").unlink()
    tiny_llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert files_fingerprint(str(folder)) == own == weights_fingerprint(tiny_llama().state_dict())
    tiny_llama(seed=1).save_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    assert files_fingerprint(str(folder)) != own


def test_one_changed_matrix_changes_the_fingerprint_and_a_new_token_does_not():
    model = tiny_llama()
    before = weights_fingerprint(model.state_dict())
    model.resize_token_embeddings(60)
    assert weights_fingerprint(model.state_dict()) == before
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.1)
    assert weights_fingerprint(model.state_dict()) != before


def test_weights_that_are_not_on_this_machine_have_no_fingerprint(folder, tmp_path):
    assert files_fingerprint("nobody/nothing") is None
    (folder / "model.safetensors").unlink()
    assert files_fingerprint(str(folder)) is None


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("*.safetensors", r"has no \*\.safetensors weights \(pytorch_model\.bin\): save with"),
        ("tokenizer*", "has no tokenizer: save it there"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(folder, missing, message):
    (folder / "pytorch_model.bin").touch()
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_what_is_neither_folder_nor_hub_id_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"there is no folder .*nothing/at/all"):
        load_model(str(tmp_path / "nothing/at/all"))
    with pytest.raises(ModelError, match="no-such-owner/no-such-model is no folder or hub id"):
        load_model("no-such-owner/no-such-model")


def test_weights_that_are_cut_off_are_bad_input_in_one_line(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"target is no folder or hub id that can be loaded: [^\n]*incomplete[^\n]*$"):
        load_model(str(folder))


def test_code_from_the_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError):
        load_model(str(folder))


def test_a_dtype_that_does_not_exist_is_an_error(saved):
    with pytest.raises(ModelError, match="dtype 'int3': it is one of float32"):
        load_model(str(saved), dtype="int3")


def test_the_self_check_passes_and_leaves_nothing_behind():
    model = tiny_llama()
    self_check(model, "tiny")
    hooks = loading._count_hooks(model)
    self_check(model, "tiny")
    assert loading._count_hooks(model) == hooks


def test_the_self_check_allows_the_rounding_of_the_models_own_dtype(monkeypatch):
    monkeypatch.setattr(loading, "clean_logits", lambda m, prompts: real_clean_logits(m, prompts) + 0.01)
    self_check(tiny_llama().bfloat16(), "tiny")
    with pytest.raises(ModelError, match="logits of the fast path differ by"):
        self_check(tiny_llama(), "tiny")


def broken_capture(monkeypatch, model):
    monkeypatch.setattr(loading, "capturing", lambda m, layers: real_capturing(m, layers, "resid_pre"))


def write_without_effect(monkeypatch, model):
    monkeypatch.setattr(loading, "replacing", lambda m, patch: real_capturing(m, [0]))


def write_at_another_layer(monkeypatch, model):
    def shifted(m, patch):
        return real_replacing(m, loading.Patch(layer=patch.layer - 1, positions=patch.positions, values=patch.values))

    monkeypatch.setattr(loading, "replacing", shifted)


def wrong_fast_path(monkeypatch, model):
    monkeypatch.setattr(loading, "clean_logits", lambda m, prompts: real_clean_logits(m, [prompts[0][1:]]))


def hook_left_behind(monkeypatch, model):
    def leaking(m, layers):
        m.model.norm.register_forward_hook(lambda *_: None)
        return real_capturing(m, layers)

    monkeypatch.setattr(loading, "capturing", leaking)


def not_a_number(monkeypatch, model):
    model.lm_head.weight.data[0, 0] = torch.nan


real_capturing, real_replacing, real_clean_logits = loading.capturing, loading.replacing, loading.clean_logits


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (broken_capture, "layer 0: captured and own hidden state differ by"),
        (write_without_effect, "writing another vector at layer 1 changes nothing"),
        (write_at_another_layer, "logits with a vector written back differ by"),
        (wrong_fast_path, "logits of the fast path differ by"),
        (hook_left_behind, "left 1 hooks behind"),
        (not_a_number, "not finite"),
    ],
)
def test_the_self_check_finds(monkeypatch, breaks, message):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    breaks(monkeypatch, model)
    with pytest.raises(ModelError, match=message):
        self_check(model, "tiny")
