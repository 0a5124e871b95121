import itertools
import logging
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config

from ray_explain.interventions import patching
from ray_explain.interventions.extraction import residuals
from ray_explain.interventions.hooks import KINDS, Kind, Patch, writing
from ray_explain.interventions.layout import SITES, Site, layout_of
from ray_explain.interventions.patching import Intervention, clean_logits, paired_sweep, patch_sweep
from ray_explain.interventions.tokens import token_batch
from ray_explain.interventions.walk import row_bytes

PROMPTS = [
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46],
    [26],
    [43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39],
    [93, 75, 10],
]


LLAMA: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


@st.composite
def prompts(draw):
    many = st.lists(st.integers(1, 13), min_size=1, max_size=4)
    return [draw(st.lists(st.integers(0, 100), min_size=n, max_size=n)) for n in draw(many)]


@st.composite
def interventions(draw, bases: list[list[int]]):
    base = draw(st.integers(0, len(bases) - 1))
    here = st.integers(0, len(bases[base]) - 1)
    positions = tuple(draw(st.lists(here, min_size=1, max_size=3, unique=True)))
    first, last = sorted([draw(st.integers(0, 2)), draw(st.integers(0, 2))])
    kind = draw(st.sampled_from(KINDS))
    torch.manual_seed(draw(st.integers(0, 999)))
    vectors = torch.randn(len(positions), 32) if kind in ("replace", "add") else None
    where: dict[str, Any] = {"base": base, "positions": positions, "first_layer": first, "last_layer": last}
    return Intervention(**where, site=draw(st.sampled_from(SITES)), kind=kind, vectors=vectors)


def change(
    base: int = 0, positions: tuple[int, ...] = (1,), layer: int = 1, kind: Kind = "replace", site: Site = "resid_post"
) -> Intervention:
    torch.manual_seed(base * 100 + positions[0] * 10 + layer)
    vectors = torch.randn(len(positions), 32) if kind in ("replace", "add") else None
    where: dict[str, Any] = {"base": base, "positions": positions, "first_layer": layer, "last_layer": layer}
    return Intervention(**where, kind=kind, site=site, vectors=vectors)


def every_patch(kind: Kind = "replace") -> list[Intervention]:
    """One for every prompt, position and layer."""
    return [
        change(b, (p,), layer, kind) for b, ids in enumerate(PROMPTS) for p in range(len(ids)) for layer in range(3)
    ]


def swept(model: Any, bases: list[list[int]], changes: list[Intervention], **how: Any) -> torch.Tensor:
    logits = torch.full((len(changes), 101), torch.nan)
    for indices, some in patch_sweep(model, bases, changes, **how):
        assert logits[indices].isnan().all(), "an intervention came twice"
        logits[indices] = some
    return logits


def assert_same_logits(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert torch.equal(one.argmax(-1), other.argmax(-1))


@settings(max_examples=20)
@given(data=st.data())
def test_a_sweep_gives_what_one_hook_per_patch_gives(model, judged, data):
    bases = data.draw(prompts())
    changes = data.draw(st.lists(interventions(bases), min_size=1, max_size=6))
    for indices, patched, clean in paired_sweep(model, bases, changes):
        for i, with_change, without in zip(indices, patched, clean, strict=True):
            assert_same_logits(with_change, judged(model, bases[changes[i].base], changes[i]))
            assert_same_logits(without, model(torch.tensor([bases[changes[i].base]])).logits[0, -1])


@settings(max_examples=15)
@given(data=st.data())
def test_a_family_that_cannot_be_walked_gives_the_same_by_hooks(fallback_model, judged, data):
    bases = data.draw(prompts())
    changes = data.draw(st.lists(interventions(bases), min_size=1, max_size=6))
    unpaired = swept(fallback_model, bases, changes)
    for indices, patched, clean in paired_sweep(fallback_model, bases, changes):
        assert_same_logits(unpaired[indices], patched)
        for i, with_change, without in zip(indices, patched, clean, strict=True):
            assert_same_logits(with_change, judged(fallback_model, bases[changes[i].base], changes[i]))
            assert_same_logits(without, fallback_model(torch.tensor([bases[changes[i].base]])).logits[0, -1])


def test_by_hooks_clean_runs_are_made_only_where_something_is_taken_from_them(fallback_model):
    rows: list[int] = []
    handle = fallback_model.register_forward_pre_hook(
        lambda m, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    changes = [change(0, (1,)), change(0, (4,)), change(2, (4,)), change(3, (1,))]  # bases of 11, 11 and 4 tokens
    list(patch_sweep(fallback_model, PROMPTS, changes))
    list(paired_sweep(fallback_model, PROMPTS, changes))
    list(patch_sweep(fallback_model, PROMPTS, [*changes, change(0, (2,), kind="mean")]))
    handle.remove()
    assert rows == [1, 3, 1 + 1, 3 + 2, 1, 4 + 2]


def test_the_fallback_is_told_once(fallback_model, caplog):
    patching._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=patching.__name__):
        clean_logits(fallback_model, PROMPTS)
        clean_logits(fallback_model, PROMPTS)
    assert len(caplog.messages) == 1
    assert "full batches with hooks" in caplog.messages[0]


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_soft_capped_attention_is_walked_whatever_the_model_was_loaded_with(named_model, monkeypatch, implementation):
    model, changes = named_model("gemma2"), every_patch()
    eager, cost = swept(model, PROMPTS, changes), row_bytes(layout_of(model))(11)
    monkeypatch.setattr(model.config, "_attn_implementation", implementation)
    assert_same_logits(swept(model, PROMPTS, changes), eager)
    assert row_bytes(layout_of(model))(11) == cost


def test_a_sweep_gives_what_a_batch_padded_on_the_left_gives(model):
    batch = token_batch(PROMPTS, pad_id=0, device="cpu")
    longest = batch.input_ids.shape[1]
    for layer in range(3):
        changes = [change(b, (len(ids) // 2,), layer) for b, ids in enumerate(PROMPTS)]
        at = torch.tensor([c.positions[0] + longest - len(PROMPTS[c.base]) for c in changes])
        values = torch.cat([c.vectors for c in changes if c.vectors is not None])
        with writing(model, Patch(layer=layer, positions=at, values=values)):
            out = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        assert_same_logits(swept(model, PROMPTS, changes), out.logits[:, -1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_nnsight_gives_the_same(named_model, family):
    nnsight = pytest.importorskip("nnsight")
    model, changes = named_model(family), [change(0, (p,), layer) for p in (0, 6, 10) for layer in range(3)]
    traced, ids = nnsight.NNsight(model), torch.tensor([PROMPTS[0]])
    blocks = traced.transformer.h if family == "gpt2" else traced.model.layers
    rows = []
    for c in changes:
        with traced.trace(ids):
            blocks[c.first_layer].output[:, c.positions[0]] = c.vectors
            logits = traced.output.logits[0, -1].save()
        rows.append(logits)
    assert_same_logits(swept(model, PROMPTS, changes), torch.stack(rows))


def test_writing_a_runs_own_vector_changes_nothing(model):
    own = residuals(model, PROMPTS, range(3))
    changes = []
    for b, ids in enumerate(PROMPTS):
        for layer in range(3):
            where: dict[str, Any] = {"base": b, "positions": tuple(range(len(ids))), "kind": "replace"}
            changes.append(Intervention(**where, first_layer=layer, last_layer=layer, vectors=own[b][layer]))
    for _, patched, clean in paired_sweep(model, PROMPTS, changes):
        assert_same_logits(patched, clean)


def test_the_last_layers_last_vector_brings_the_sources_answer(model):
    source, base = PROMPTS[0], PROMPTS[2]
    vector = residuals(model, [source], [2], [[len(source) - 1]])[0][0]
    end = (len(base) - 1,)
    brought = Intervention(base=0, positions=end, first_layer=2, last_layer=2, vectors=vector)
    assert_same_logits(swept(model, [base], [brought]), model(torch.tensor([source])).logits[:, -1])


def test_a_patch_that_the_answer_cannot_see_changes_nothing(model):
    for _, patched, clean in paired_sweep(model, PROMPTS, [change(0, (4,), 2), change(2, (0, 9), 2)]):
        assert_same_logits(patched, clean)


@pytest.mark.parametrize("kind", ["replace", "add", "zero", "mean"])
def test_every_patch_that_the_answer_can_see_changes_it(tiny_target, kind):
    changes = [c for c in every_patch(kind) if c.first_layer < 2 and c.base != 1]
    for _, patched, clean in paired_sweep(tiny_target, PROMPTS, changes):
        assert ((patched - clean).abs().amax(-1) > 1e-4).all()


def test_a_row_does_not_depend_on_its_batch(model):
    changes = every_patch()
    together = swept(model, PROMPTS, changes)
    alone = [swept(model, [PROMPTS[c.base]], [change(0, c.positions, c.first_layer)]) for c in changes[:33:4]]
    assert_same_logits(together[:33:4], torch.cat(alone))
    budget = 8 * row_bytes(layout_of(model))(11)
    chunks = list(patch_sweep(model, PROMPTS, changes, memory_budget=budget))
    assert len(chunks) > 5
    for indices, logits in chunks:
        assert_same_logits(logits, together[indices])


def test_a_patched_row_costs_only_what_lies_above_its_layer_and_behind_its_position(tiny_target):
    counted: list[list[int]] = [[], [], []]
    handles = [
        block.mlp.register_forward_pre_hook(lambda m, args, i=i: counted[i].append(args[0].shape[1]))
        for i, block in enumerate(tiny_target.model.layers)
    ]
    list(patch_sweep(tiny_target, PROMPTS[:1], [change(0, (4,), 0), change(0, (9, 8), 1), change(0, (2,), 2)]))
    for handle in handles:
        handle.remove()
    assert counted == [[11], [11 + 7], [11 + 7 + 3]]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and not func.is_view
                and tensor.untyped_storage()._cdata not in self.seen
            ):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def test_what_is_allocated_stays_under_the_memory_budget(model):
    bases = [ids * 4 for ids in PROMPTS]
    changes = [change(b, (p,), layer) for b, ids in enumerate(bases) for p in range(len(ids)) for layer in range(3)]
    cost = row_bytes(layout_of(model))
    for rows in (4, 20):
        budget = rows * cost(44)
        with LiveBytes() as memory:
            for _ in itertools.islice(paired_sweep(model, bases, changes[::-1], memory_budget=budget), 2):
                pass
        assert budget / 12 < memory.peak < budget


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**LLAMA | {"intermediate_size": 1024, "pad_token_id": 0}),
        GPT2Config(vocab_size=101, n_embd=32, n_layer=3, n_head=4, n_inner=1024, bos_token_id=1, eos_token_id=2),
    ],
    ids=["phi3", "gpt2"],
)
def test_the_budget_is_used_where_the_mlp_needs_most_of_it(config):
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    changes = [change(0, (0,), 0) for _ in range(40)]
    budget = 21 * row_bytes(layout_of(model))(11)
    with LiveBytes() as memory:
        next(patch_sweep(model, PROMPTS, changes, memory_budget=budget))
    assert budget / 2 < memory.peak < budget


def test_on_a_cpu_a_larger_budget_lets_larger_rows_through_but_runs_no_more_of_them_at_once(tiny_target, monkeypatch):
    changes, long = every_patch(), change(0, (0,), 0)
    monkeypatch.setattr(patching, "MEMORY_BUDGET", 4 * row_bytes(layout_of(tiny_target))(11))
    chunks = [indices for indices, _ in patch_sweep(tiny_target, PROMPTS, changes, memory_budget=1 << 40)]
    assert len(chunks) > 10
    own = [PROMPTS[0] * 4]
    (alone,) = patch_sweep(tiny_target, own, [long], memory_budget=1 << 40)
    assert_same_logits(alone[1], swept(tiny_target, own, [long]))


def test_an_intervention_runs_alone_within_the_bytes_that_it_is_said_to_need(tiny_target):
    one = change(0, (3,), 1)
    needed = patching.sweep_bytes(layout_of(tiny_target))(len(PROMPTS[0]), 3)
    assert len(list(patch_sweep(tiny_target, PROMPTS, [one], memory_budget=needed))) == 1
    with pytest.raises(ValueError, match=f"needs {needed:,}"):
        list(patch_sweep(tiny_target, PROMPTS, [one], memory_budget=needed - 1))


def test_a_budget_too_small_for_one_row_is_an_error(tiny_target):
    with pytest.raises(ValueError, match=r"budget of 1,000 bytes: one row alone needs [\d,]+; give at least that"):
        clean_logits(tiny_target, PROMPTS, memory_budget=1000)


def test_clean_logits_are_the_models_own_in_the_order_given(model):
    own = torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in PROMPTS])
    assert_same_logits(clean_logits(model, PROMPTS), own)
    assert_same_logits(clean_logits(model, PROMPTS, memory_budget=2 * row_bytes(layout_of(model))(11)), own)


def test_in_bfloat16_answers_agree_where_the_two_best_differ_by_more_than_the_rounding(named_model):
    torch.manual_seed(0)
    for family in ("llama", "gemma3_text", "gpt2"):
        exact = named_model(family)
        rounded = type(exact)(exact.config).eval()
        rounded.load_state_dict(exact.state_dict())
        rounded.to(torch.bfloat16)
        reference = {c: v for c, v in enumerate(swept(exact, PROMPTS, every_patch()))}
        logits = swept(rounded, PROMPTS, every_patch())
        error = torch.stack([(logits[c] - v).abs().max() for c, v in reference.items()])
        best = torch.stack([v.topk(2).values for v in reference.values()])
        clear = best[:, 0] - best[:, 1] > 2 * error
        assert logits.dtype == torch.float32 and error.max() < 0.5 and clear.float().mean() > 0.5
        agree = logits.argmax(-1) == torch.stack([v.argmax() for v in reference.values()])
        assert agree[clear].all()


def test_weights_added_by_an_adapter_count(judged):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    tuned = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        logits, expected = swept(tuned, PROMPTS, [change()]), judged(tuned, PROMPTS[0], change())
        assert_same_logits(logits[0], expected)
        with tuned.disable_adapter():
            assert (expected - judged(tuned, PROMPTS[0], change())).abs().max() > 1e-3


def test_prompts_beyond_the_original_length_of_a_rotary_that_grows_are_not_walked(judged):
    torch.manual_seed(0)
    factors = [1.0 + i for i in range(4)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 8,
        "short_factor": factors,
        "long_factor": [3 * f for f in factors],
        "factor": 2.0,
    }
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=rope)).eval().requires_grad_(False)
    changes = [change(b) for b in (0, 2, 3)]
    logits = swept(model, PROMPTS, changes)
    for row, c in zip(logits, changes, strict=True):
        assert_same_logits(row, judged(model, PROMPTS[c.base], c))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positions": ()}, r"positions \(\): give at least one, each once"),
        ({"positions": (1, 1), "vectors": torch.ones(2, 32)}, "each once"),
        ({"first_layer": 2}, "layers 2 to 1: the first comes after the last"),
        ({"vectors": torch.ones(2, 32)}, r"vectors of shape \(2, 32\) for 1 positions"),
        ({"kind": "mean"}, "kind 'mean' takes no vectors"),
        ({"vectors": None}, "kind 'replace' needs vectors"),
        ({"site": "logits"}, "site 'logits'"),
    ],
)
def test_an_intervention_that_makes_no_sense_is_an_error(wrong, message):
    fine = {"base": 0, "positions": (1,), "first_layer": 1, "last_layer": 1, "vectors": torch.ones(1, 32)}
    with pytest.raises(ValueError, match=message):
        Intervention(**(fine | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (change(base=4), "intervention 1 is on base 4: there are 4, numbered from 0"),
        (change(positions=(11,)), r"intervention 1 at positions \(11,\): its base has 11, from 0"),
        (change(positions=(-1,)), "its base has 11"),
        (change(layer=3), "layer 3 of a llama model: it has 3"),
        (
            Intervention(base=0, positions=(0,), first_layer=0, last_layer=0, vectors=torch.ones(1, 16)),
            "intervention 1 writes vectors 16 wide: d_model is 32",
        ),
    ],
)
def test_an_intervention_that_does_not_fit_is_an_error(tiny_target, wrong, message):
    with pytest.raises(ValueError, match=message):
        list(patch_sweep(tiny_target, PROMPTS, [change(), wrong]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty"),
        ([5] * 65, "prompt 1 has 65 tokens: the model's context holds 64"),
        ([5, 101], r"prompt 1 has a token outside 0\.\.100: 5 or 101"),
        ([-1, 5], r"outside 0\.\.100"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_an_error(tiny_target, prompt, message):
    with pytest.raises(ValueError, match=message):
        clean_logits(tiny_target, [[1, 2], prompt])


def test_no_interventions_give_no_chunks(tiny_target):
    assert list(patch_sweep(tiny_target, PROMPTS, [])) == []
    assert clean_logits(tiny_target, []).shape == (0, 101)


def test_a_model_that_learned_its_positions_counts_them_from_each_prompts_start():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=4, n_positions=16)).eval()
    model.transformer.wpe.weight.data.normal_()
    own = torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in PROMPTS])
    assert_same_logits(clean_logits(model, PROMPTS), own.detach())
