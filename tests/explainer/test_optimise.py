import pytest
import torch

from ray_explain.explainer.batches import collate
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import learning_rate_factor, parameter_groups, with_lora
from ray_explain.explainer.projection import Projection


def rates(schedule: str, warmup: float = 0.0, n: int = 100) -> list[float]:
    return [learning_rate_factor(step, n, schedule=schedule, warmup=warmup) for step in range(n)]


def test_a_constant_rate_is_constant_and_all_others_end_near_zero():
    assert set(rates("constant")) == {1.0}
    for schedule in ("linear", "cosine", "wsd"):
        factors = rates(schedule)
        assert factors[0] == pytest.approx(1.0)
        assert 0 < factors[-1] < 0.03
        assert factors == sorted(factors, reverse=True)


def test_schedules_have_their_shapes():
    assert rates("linear")[50] == pytest.approx(0.5)
    assert rates("cosine")[50] == pytest.approx(0.5)
    assert rates("cosine")[25] == pytest.approx((1 + 0.5**0.5) / 2)
    assert rates("wsd")[60] == 1.0
    assert rates("wsd")[80] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_goes_up_evenly_and_is_never_zero(schedule):
    factors = rates(schedule, warmup=0.1)
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_training_of_one_step_has_the_whole_rate(schedule):
    assert rates(schedule, n=1) == [1.0]


def test_everything_trained_is_in_one_group_and_only_matrices_of_blocks_decay(family, new_explainer):
    explainer = new_explainer(family, projection=Projection("linear", 32, 32, [0]))
    groups = parameter_groups(explainer, weight_decay=0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(map(id, explainer.parameters()))
    decayed = next(group for group in groups if group["weight_decay"] == 0.1)["params"]
    names = {id(parameter): name for name, parameter in explainer.named_parameters()}
    assert all("layers" in names[id(parameter)] or ".h." in names[id(parameter)] for parameter in decayed)
    n_maps = sum(p.ndim > 1 and (".layers." in n or ".h." in n) for n, p in explainer.named_parameters())
    assert len(decayed) == n_maps


def test_with_adapters_only_they_the_markers_and_the_projection_are_trained(family, new_model, markers):
    model = with_lora(new_model(family), rank=4, alpha=8, dropout=0.0)
    explainer = Explainer(model, markers, Projection("linear", 32, 32, [0]), InjectionConfig(), train_markers=True)
    trained = [name for name, parameter in explainer.named_parameters() if parameter.requires_grad]
    assert {"marker_embeddings", "projection.weight"} < set(trained)
    assert all("lora_" in name for name in trained if name.startswith("model."))
    groups = parameter_groups(explainer, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_adapters_are_beside_all_linear_maps_of_the_blocks(family, new_model):
    model = new_model(family)
    maps = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and (".layers." in name or ".h." in name)
    }
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in with_lora(model, rank=2, alpha=2, dropout=0.0).named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == maps


LLAMA_MAPS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MAPS = {
    "llama": LLAMA_MAPS,
    "qwen3": LLAMA_MAPS,
    "mistral": LLAMA_MAPS,
    "gemma2": LLAMA_MAPS,
    "gemma3": LLAMA_MAPS,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


@pytest.mark.parametrize("name", MAPS)
def test_adapters_of_a_family_are_at_its_own_maps_of_attention_and_mlp_and_all_learn(
    name, new_model, markers, examples
):
    model = with_lora(new_model(name), rank=2, alpha=2, dropout=0.0)
    adapted = {at.rpartition(".")[2] for at, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == MAPS[name]
    explainer = Explainer(model, markers, Projection("identity", 32, 32), InjectionConfig(), train_markers=True)
    explainer(collate(examples, 0)).loss.backward()
    for at, parameter in explainer.named_parameters():
        if "lora_B" in at:
            assert parameter.grad.abs().sum() > 0, at


def test_the_same_seed_gives_the_same_adapters_and_leaves_the_global_random_state_alone(new_model):
    def adapters(seed):
        model = with_lora(new_model("llama"), rank=2, alpha=2, dropout=0.0, seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    first = adapters(0)
    torch.manual_seed(5)
    model, state = new_model("llama"), torch.random.get_rng_state()
    with_lora(model, rank=2, alpha=2, dropout=0.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, adapters(0))
    assert not torch.equal(first, adapters(1))
