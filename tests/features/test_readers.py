"""Every format is written here as its own library writes it, and read back to the same function of its inputs."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_explain.features import readers
from ray_explain.features.readers import find_folder, layout_of, read_directions, read_sae

D_MODEL, D_SAE, K = 6, 20, 4


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(3)
    sizes = {"w_enc": (D_SAE, D_MODEL), "b_enc": (D_SAE,), "w_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    return {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}


@pytest.fixture
def x():
    return torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(4)) * 3


def write_sae_lens(folder: Path, parts, *, threshold=None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": parts["w_enc"].T.contiguous(),
        "W_dec": parts["w_dec"],
        "b_enc": parts["b_enc"],
        "b_dec": parts["b_dec"],
    }
    if threshold is not None:
        tensors["threshold"] = threshold
    save_file(tensors, folder / "sae_weights.safetensors")
    standard = {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": "gpt2", "hook_name": "blocks.7.hook_resid_post", "sae_lens_version": "6.12.1"},
    }
    (folder / "cfg.json").write_text(json.dumps({**standard, **config}))
    return folder


def write_llama_scope(root: Path, parts, layer: int = 19, **config) -> Path:
    folder = root / f"Llama3_1-8B-Base-L{layer}R-32x"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": parts["w_enc"],
        "encoder.bias": parts["b_enc"],
        "decoder.weight": parts["w_dec"].T.contiguous(),
        "decoder.bias": parts["b_dec"],
    }
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    hyperparams = {
        "device": "cuda:0",
        "dtype": "torch.bfloat16",
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 32,
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.484375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 7.5, "out": 7.5},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 5,
    }
    (folder / "hyperparams.json").write_text(json.dumps({**hyperparams, **config}))
    return folder


def write_gemma_scope(root: Path, parts, layer: int = 20, l0: int = 71, save=np.savez) -> Path:
    folder = root / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    save(
        folder / "params.npz",
        W_enc=parts["w_enc"].T.numpy(),
        W_dec=parts["w_dec"].numpy(),
        b_enc=parts["b_enc"].numpy(),
        b_dec=parts["b_dec"].numpy(),
        threshold=np.linspace(0.1, 2, D_SAE, dtype=np.float32),
    )
    return folder


def write_sparsify(root: Path, parts, hook: str = "layers.10", **config) -> Path:
    folder = root / hook
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": parts["w_enc"],
        "encoder.bias": parts["b_enc"],
        "W_dec": parts["w_dec"],
        "b_dec": parts["b_dec"],
    }
    save_file(tensors, folder / "sae.safetensors")
    standard = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_MODEL,
    }
    (folder / "cfg.json").write_text(json.dumps({**standard, **config}))
    return folder


def write_dictionary_learning(folder: Path, kind: str, parts, **trainer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    linear = {
        "encoder.weight": parts["w_enc"],
        "encoder.bias": parts["b_enc"],
        "decoder.weight": parts["w_dec"].T.contiguous(),
    }
    matrices = {"W_enc": parts["w_enc"].T.contiguous(), "W_dec": parts["w_dec"], "b_enc": parts["b_enc"]}
    calibrated = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.8)}
    state = {
        "AutoEncoder": {**linear, "bias": parts["b_dec"]},
        "AutoEncoderNew": {**linear, "decoder.bias": parts["b_dec"]},
        "AutoEncoderTopK": {**linear, "b_dec": parts["b_dec"], **calibrated},
        "BatchTopKSAE": {**linear, "b_dec": parts["b_dec"], **calibrated},
        "MatryoshkaBatchTopKSAE": {
            **matrices, "b_dec": parts["b_dec"], **calibrated, "group_sizes": torch.tensor([8, 12])
        },
        "JumpReluAutoEncoder": {**matrices, "b_dec": parts["b_dec"], "threshold": torch.full((D_SAE,), 0.8)},
        "GatedAutoEncoder": {**linear, "decoder_bias": parts["b_dec"]},
    }[kind]  # fmt: skip
    torch.save(state, folder / "ae.pt")
    standard = {"dict_class": kind, "activation_dim": D_MODEL, "dict_size": D_SAE, "layer": 8, "lm_name": "pythia-70m"}
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        standard["k"] = K
    (folder / "config.json").write_text(json.dumps({"trainer": {**standard, **trainer}, "buffer": {"ctx_len": 128}}))
    return folder


def pre(x, parts, centre=False):
    return (x - parts["b_dec"] if centre else x) @ parts["w_enc"].T + parts["b_enc"]


def top(values, k):
    kept = values.topk(k, dim=1)
    return torch.zeros_like(values).scatter_(1, kept.indices, kept.values.relu())


def assert_same(sae, x, features, parts, decoded=None):
    torch.testing.assert_close(sae.encode(x), features)
    assert bool((features > 0).any())
    torch.testing.assert_close(sae.directions.float(), parts["w_dec"])
    decoded = features @ parts["w_dec"] + parts["b_dec"] if decoded is None else decoded
    torch.testing.assert_close(sae.decode(sae.encode(x), like=x), decoded)


# SAELens


def test_sae_lens_standard(tmp_path, parts, x):
    sae = read_sae(write_sae_lens(tmp_path, parts, apply_b_dec_to_input=True))
    assert_same(sae, x, pre(x, parts, centre=True).relu(), parts)
    assert (sae.layer, sae.site) == (7, "residual")


def test_sae_lens_jumprelu(tmp_path, parts, x):
    threshold = torch.rand(D_SAE)
    sae = read_sae(write_sae_lens(tmp_path, parts, threshold=threshold, architecture="jumprelu"))
    before = pre(x, parts)
    assert_same(sae, x, before.relu() * (before > threshold), parts)


def test_sae_lens_topk_of_version_6(tmp_path, parts, x):
    sae = read_sae(write_sae_lens(tmp_path, parts, architecture="topk", k=K, apply_b_dec_to_input=True))
    assert_same(sae, x, top(pre(x, parts, centre=True), K), parts)
    assert sae.declared == {"l0": K}


def test_sae_lens_topk_ranked_by_norm_reconstructs_alike(tmp_path, parts, x):
    sae = read_sae(write_sae_lens(tmp_path, parts, architecture="topk", k=K, rescale_acts_by_decoder_norm=True))
    norms = parts["w_dec"].norm(dim=1)
    # The library gives activations times the norm, and decodes with unit directions.
    theirs = top(pre(x, parts) * norms, K)
    decoded = theirs @ (parts["w_dec"] / norms[:, None]) + parts["b_dec"]
    assert_same(sae, x, theirs / norms, parts, decoded)


def test_sae_lens_before_version_6(tmp_path, parts, x):
    old = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_name": "blocks.9.hook_resid_pre",
        "hook_layer": 9,
        "metadata": {},
    }
    folder = write_sae_lens(tmp_path, parts, **old)
    config = json.loads((folder / "cfg.json").read_text())
    del config["apply_b_dec_to_input"]  # it is true where it is not said
    (folder / "cfg.json").write_text(json.dumps(config))
    sae = read_sae(folder)
    assert_same(sae, x, top(pre(x, parts, centre=True), K), parts)
    assert sae.layer == 8, "the stream before block 9 is that after block 8"


def test_sae_lens_norm_of_each_token(tmp_path, parts, x):
    sae = read_sae(write_sae_lens(tmp_path, parts, normalize_activations="constant_norm_rescale"))
    factor = math.sqrt(D_MODEL) / x.norm(dim=1, keepdim=True)
    features = pre(x * factor, parts).relu()
    assert_same(sae, x, features, parts, (features @ parts["w_dec"] + parts["b_dec"]) / factor)


def test_sae_lens_layer_norm(tmp_path, parts, x):
    sae = read_sae(write_sae_lens(tmp_path, parts, normalize_activations="layer_norm"))
    mean, spread = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    features = pre((x - mean) / spread, parts).relu()
    assert_same(sae, x, features, parts, (features @ parts["w_dec"] + parts["b_dec"]) * spread + mean)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "gated"}, "gated"),
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"finetuning_scaling_factor": True}, "folded"),
        ({"normalize_activations": "median"}, "median"),
        ({"architecture": "topk"}, "lacks 'activation_fn_kwargs'"),
    ],
)
def test_sae_lens_kinds_that_cannot_be_said_are_refused(tmp_path, parts, config, words):
    with pytest.raises(ValueError, match=words):
        read_sae(write_sae_lens(tmp_path, parts, **config))


# Llama Scope


def test_llama_scope(tmp_path, parts, x):
    sae = read_sae(write_llama_scope(tmp_path, parts))
    rounded = {name: part.to(torch.bfloat16).float() for name, part in parts.items()}
    # The makers fold the data set's norm and then the directions' norms into the weights, and apply the threshold last.
    factor, norms = math.sqrt(D_MODEL) / 7.5, rounded["w_dec"].norm(dim=1)
    folded = (x @ rounded["w_enc"].T + rounded["b_enc"] / factor) * norms
    unit = rounded["w_dec"] / norms[:, None]
    theirs = folded * (folded > 0.484375)
    ours = sae.encode(x)
    torch.testing.assert_close(ours, theirs / norms * factor)
    assert 0 < float((ours > 0).float().mean()) < 0.5
    torch.testing.assert_close(sae.decode(ours), theirs @ unit + rounded["b_dec"] / factor)
    torch.testing.assert_close(sae.directions.float(), rounded["w_dec"])
    assert (sae.layer, sae.declared, sae.activation) == (19, {"l0": 5.0}, "jumprelu")


def test_llama_scope_matrices_stay_in_half_precision_on_the_disk(tmp_path, parts):
    sae = read_sae(write_llama_scope(tmp_path, parts))
    assert sae.encoder.dtype == sae.directions.dtype == torch.bfloat16


def test_llama_scope_one_layer_of_many(tmp_path, parts, x):
    for layer in (3, 4, 13):
        write_llama_scope(tmp_path, {**parts, "b_enc": parts["b_enc"] + layer}, layer)
    assert read_sae(tmp_path, layer=13).layer == 13
    torch.testing.assert_close(
        read_sae(tmp_path, layer=3).encoder_bias, (parts["b_enc"] + 3).to(torch.bfloat16).float()
    )
    with pytest.raises(FileNotFoundError, match="no SAE of layer 5"):
        read_sae(tmp_path, layer=5)
    with pytest.raises(ValueError, match="several SAEs fit"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"act_fn": "topk"}, "topk"),
        ({"hook_point_out": "blocks.19.hook_mlp_out"}, "transcoder"),
        ({"norm_activation": "batch-wise"}, "lacks 'batch-wise'"),
    ],
)
def test_llama_scope_kinds_that_cannot_be_said_are_refused(tmp_path, parts, config, words):
    with pytest.raises(ValueError, match=words):
        read_sae(write_llama_scope(tmp_path, parts, **config))


# Gemma Scope


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope(tmp_path, parts, x, save):
    sae = read_sae(write_gemma_scope(tmp_path, parts, save=save))
    before = pre(x, parts)
    assert_same(sae, x, before.relu() * (before > torch.linspace(0.1, 2, D_SAE)), parts)
    assert (sae.layer, sae.declared) == (20, {"l0": 71.0})


def test_gemma_scope_offers_several_sparsities_of_a_layer(tmp_path, parts):
    for l0 in (36, 71):
        write_gemma_scope(tmp_path, parts, l0=l0)
    with pytest.raises(ValueError, match=r"choose one of .*average_l0_36.*average_l0_71"):
        read_sae(tmp_path, layer=20)
    assert read_sae(tmp_path / "layer_20" / "width_16k" / "average_l0_36").declared == {"l0": 36.0}


def test_an_uncompressed_npz_is_mapped_not_read(tmp_path, parts):
    path = write_gemma_scope(tmp_path, parts) / "params.npz"
    sae = read_sae(path.parent)
    before = float(sae.directions[0, 0])
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("W_dec.npy").header_offset
    raw = bytearray(path.read_bytes())
    place = raw.index(parts["w_dec"].numpy().tobytes()[:16], offset)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(np.float32(before + 1).tobytes())
    assert float(sae.directions[0, 0]) == pytest.approx(before + 1)


# sparsify


def test_sparsify(tmp_path, parts, x):
    sae = read_sae(write_sparsify(tmp_path, parts))
    assert_same(sae, x, top(pre(x, parts, centre=True).relu(), K), parts)
    assert (sae.layer, sae.site, sae.declared) == (10, "residual", {"l0": K})


def test_sparsify_says_which_site(tmp_path, parts):
    assert read_sae(write_sparsify(tmp_path, parts, hook="layers.3.mlp")).site == "mlp"


@pytest.mark.parametrize("config", [{"activation": "groupmax"}, {"transcode": True}, {"skip_connection": True}])
def test_sparsify_kinds_that_cannot_be_said_are_refused(tmp_path, parts, config):
    with pytest.raises(ValueError, match=r"groupmax|transcoder"):
        read_sae(write_sparsify(tmp_path, parts, **config))


# dictionary_learning


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("AutoEncoder", lambda x, parts: pre(x, parts, centre=True).relu()),
        ("AutoEncoderNew", lambda x, parts: pre(x, parts).relu()),
        ("AutoEncoderTopK", lambda x, parts: top(pre(x, parts, centre=True), K)),
        ("BatchTopKSAE", lambda x, parts: (v := pre(x, parts, centre=True)) * (v > 0.8)),
        ("MatryoshkaBatchTopKSAE", lambda x, parts: (v := pre(x, parts, centre=True)) * (v > 0.8)),
        ("JumpReluAutoEncoder", lambda x, parts: (v := pre(x, parts)) * (v > 0.8)),
    ],
)
def test_dictionary_learning(tmp_path, parts, x, kind, expected):
    sae = read_sae(write_dictionary_learning(tmp_path, kind, parts))
    assert_same(sae, x, expected(x, parts), parts)
    assert sae.layer == 8


def test_dictionary_learning_gated_is_refused(tmp_path, parts):
    with pytest.raises(ValueError, match="GatedAutoEncoder"):
        read_sae(write_dictionary_learning(tmp_path, "GatedAutoEncoder", parts))


def test_a_threshold_that_was_never_calibrated_is_refused(tmp_path, parts):
    folder = write_dictionary_learning(tmp_path, "BatchTopKSAE", parts)
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"threshold -1\.0 was never calibrated"):
        read_sae(folder)


def test_pickled_code_is_not_run(tmp_path, parts):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    folder = write_dictionary_learning(tmp_path, "AutoEncoder", parts)
    torch.save({"encoder.weight": Trap()}, folder / "ae.pt")
    with pytest.raises(ValueError, match="holds more than tensors, and is not unpickled"):
        read_sae(folder)
    assert not (tmp_path / "sprung").exists()


# All of them

WRITERS = {
    "sae_lens": lambda root, parts: write_sae_lens(root, parts),
    "llama_scope": lambda root, parts: write_llama_scope(root, parts),
    "gemma_scope": lambda root, parts: write_gemma_scope(root, parts),
    "sparsify": lambda root, parts: write_sparsify(root, parts),
    "dictionary_learning": lambda root, parts: write_dictionary_learning(root, "AutoEncoder", parts),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_some_directions_are_those_of_the_whole_in_the_order_given(tmp_path, parts, kind, monkeypatch):
    monkeypatch.setattr(readers, "ROWS_AT_A_TIME", 7)
    folder, chosen = WRITERS[kind](tmp_path, parts), [14, 0, 8, 9, 0]
    some = read_directions(folder, layout_of(folder).layer, chosen)
    assert some.dtype == torch.float32
    assert torch.equal(some, read_sae(folder).directions.float()[chosen])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_file_is_named(tmp_path, parts, kind):
    folder = WRITERS[kind](tmp_path, parts)
    weights = layout_of(folder).weights
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{weights.name} is truncated or damaged .* fetch the file again"):
        read_sae(folder)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["w_enc", "w_dec"])
def test_a_nan_row_is_named(tmp_path, parts, kind, name):
    parts[name][11, 2] = math.nan
    folder = WRITERS[kind](tmp_path, parts)
    with pytest.raises(ValueError, match=r"1 rows of .* the first is feature 11"):
        read_sae(folder)
    if name == "w_dec":
        with pytest.raises(ValueError, match="the first is feature 11"):
            read_directions(folder, layout_of(folder).layer, [0, 11])


def test_a_nan_bias_is_named(tmp_path, parts):
    parts["b_dec"][0] = math.inf
    with pytest.raises(ValueError, match="decoder bias holds NaN"):
        read_sae(write_sparsify(tmp_path, parts))


def test_a_missing_tensor_is_named(tmp_path, parts):
    folder = write_sparsify(tmp_path, parts)
    save_file({"encoder.weight": parts["w_enc"]}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match=r"lacks \['W_dec', 'b_dec', 'encoder.bias'\]"):
        read_sae(folder)


def test_the_wrong_width_for_the_target_is_told(tmp_path, parts):
    sae = read_sae(write_sparsify(tmp_path, parts))
    with pytest.raises(ValueError, match=r"\[5, 8\] for an SAE of width 6"):
        sae.encode(torch.randn(5, 8))


def test_an_own_folder_is_read_too(tmp_path, random_sae):
    sae = random_sae(activation="jumprelu", layer=2)
    sae.save(tmp_path)
    back, x = read_sae(tmp_path), torch.randn(5, 6)
    assert torch.equal(back.encode(x), sae.encode(x))
    assert back.layer == 2


def test_another_layer_than_the_files_say_is_refused(tmp_path, parts):
    with pytest.raises(ValueError, match="of layer 10, not of layer 11"):
        read_sae(write_sparsify(tmp_path, parts), layer=11)


def test_a_layer_that_nothing_tells_must_be_given(tmp_path, parts):
    folder = write_dictionary_learning(tmp_path, "AutoEncoder", parts)
    config = json.loads((folder / "config.json").read_text())
    del config["trainer"]["layer"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give `layer`"):
        read_sae(folder)
    assert read_sae(folder, layer=4).layer == 4


def test_a_folder_without_an_sae_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="known formats are ray_explain, sae_lens, llama_scope"):
        find_folder(tmp_path)


def test_only_the_part_that_is_asked_for_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS_AT_A_TIME", 100)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(readers, "open_weights", lambda path, real=readers.open_weights: spy(real(path), asked))
    d_sae = 1000
    wide = {"w_enc": torch.zeros(d_sae, 4), "b_enc": torch.zeros(d_sae), "w_dec": torch.zeros(d_sae, 4)}
    folder = write_sparsify(tmp_path, {**wide, "b_dec": torch.zeros(4)})
    read_directions(folder, 10, [999, 250, 5, 260])
    assert asked == [(5, 6), (250, 261), (999, 1000)]


def spy(file, asked):
    original = file.rows
    file.rows = lambda name, start, stop, axis: asked.append((start, stop)) or original(name, start, stop, axis)
    return file
