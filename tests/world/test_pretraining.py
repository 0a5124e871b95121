from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

from ray_explain.world import pretraining
from ray_explain.world.corpus import documents
from ray_explain.world.facts import World
from ray_explain.world.pretraining import (
    TOKENS_PER_STEP,
    TargetSize,
    attention_within_documents,
    learning_rate_factor,
    new_target,
    packed,
    pretrain,
    save_target,
    single_thread,
)

SMALL = TargetSize(d_model=16, n_layers=2, n_heads=2)


@pytest.fixture(params=["llama", "qwen3"])
def architecture(request):
    return request.param


def train(world, tokenizer, steps=6, **options):
    settings = {"architecture": "llama", "seed": 0, "size": SMALL} | options
    return pretrain(world, tokenizer, tokens=steps * TOKENS_PER_STEP, **settings)


def weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


class Killed(Exception):
    pass


def kill_after(step):
    def on_step(progress):
        if progress.step == step:
            raise Killed

    return on_step


def test_an_interrupted_run_goes_on_to_the_same_weights(world, tokenizer, architecture, tmp_path):
    whole = train(world, tokenizer, architecture=architecture)
    options = {"architecture": architecture, "checkpoints": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        train(world, tokenizer, on_step=kill_after(5), **options)
    seen = []
    resumed = train(world, tokenizer, on_step=lambda progress: seen.append(progress.step), **options)
    assert seen == [5, 6]
    assert torch.equal(weights(whole), weights(resumed))


def test_a_kill_while_the_state_is_written_leaves_the_state_before(world, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        train(world, tokenizer, checkpoints=tmp_path, checkpoint_every=2, on_step=kill_after(3))
    before = (tmp_path / "state.safetensors").read_bytes()

    def half_written(tensors, path, metadata):
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(pretraining, "save_file", half_written)
        train(world, tokenizer, checkpoints=tmp_path, checkpoint_every=2)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    resumed = train(world, tokenizer, checkpoints=tmp_path, checkpoint_every=2)
    assert torch.equal(weights(resumed), weights(train(world, tokenizer)))


@pytest.mark.parametrize("other", [{"seed": 1}, {"architecture": "qwen3"}, {"steps": 7}, {"size": TargetSize()}])
def test_the_state_of_another_run_is_refused(world, tokenizer, tmp_path, other):
    with pytest.raises(Killed):
        train(world, tokenizer, checkpoints=tmp_path, checkpoint_every=2, on_step=kill_after(3))
    with pytest.raises(ValueError, match="state of another run"):
        train(world, tokenizer, checkpoints=tmp_path, checkpoint_every=2, **other)


def test_the_state_of_another_world_is_refused(world, tokenizer, tmp_path):
    with pytest.raises(Killed):
        train(world, tokenizer, checkpoints=tmp_path, checkpoint_every=2, on_step=kill_after(3))
    with pytest.raises(ValueError, match="state of another run"):
        train(World(seed=9), tokenizer, checkpoints=tmp_path, checkpoint_every=2)


def test_seeds_decide_the_weights_and_nothing_else_does(world, tokenizer):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (weights(train(world, tokenizer, steps=2, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_reports_each_step_and_lowers_the_loss(world, tokenizer):
    seen = []
    train(world, tokenizer, steps=30, on_step=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 31)) and seen[0].n_steps == 30
    assert seen[-1].loss < seen[0].loss - 1


def test_less_than_a_step_is_refused(world, tokenizer):
    with pytest.raises(ValueError, match="100 tokens"):
        pretrain(world, tokenizer, architecture="llama", seed=0, tokens=100)


def test_a_document_in_a_row_is_read_as_if_alone(world, tokenizer, architecture):
    model = new_target(architecture, tokenizer, SMALL, seed=0).eval()
    batch = packed(documents(world, "any", 1), tokenizer)
    mask = attention_within_documents(batch.document)
    logits = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
    for row in range(3):
        for number in range(1, int(batch.document[row].max()) + 1):
            place = batch.document[row] == number
            alone = model(input_ids=batch.input_ids[row, place][None]).logits[0]
            torch.testing.assert_close(logits[row, place], alone, rtol=1e-4, atol=1e-5)


def test_a_packed_row_holds_whole_documents_with_the_weights_of_their_words(world, tokenizer):
    batch = packed(documents(world, "any", 1), tokenizer)
    stream = documents(world, "any", 1)
    for row in range(len(batch.input_ids)):
        for number in range(1, int(batch.document[row].max()) + 1):
            document, place = next(stream), batch.document[row] == number
            ids = batch.input_ids[row, place].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert tokenizer.decode(ids[1:-1]) == document.text
            assert batch.weights[row, place][1:-1].tolist() == pytest.approx([word.weight for word in document.words])
            assert batch.position_ids[row, place].tolist() == list(range(len(ids)))
    padding = batch.document == 0
    assert (batch.input_ids[padding] == tokenizer.pad_token_id).all() and not batch.weights[padding].any()
    assert not batch.weights[batch.input_ids == tokenizer.bos_token_id].any()


def test_a_document_longer_than_a_row_is_refused(world, tokenizer):
    with pytest.raises(ValueError, match="tokens in rows of 5"):
        packed(islice(documents(world, "any", 1), 3), tokenizer, row_tokens=5)


def test_in_local_rows_the_first_block_sees_the_last_two_tokens_only(world, tokenizer):
    """With one block, a loss at the end then does not depend on the first words."""
    model = new_target("llama", tokenizer, TargetSize(d_model=16, n_layers=1, n_heads=2), seed=0)
    batch = packed(documents(world, "any", 0), tokenizer, rows=1)
    last = int((batch.document[0] == 1).sum()) - 1  # weights count the token that is predicted
    batch = batch._replace(weights=torch.zeros_like(batch.weights).index_fill(1, torch.tensor([last]), 1.0))
    for local, depends in ((False, True), (True, False)):
        losses = []
        for word in ("tea", "milk"):
            ids = batch.input_ids.clone()
            ids[0, last - 3] = tokenizer.convert_tokens_to_ids(word)
            changed = batch._replace(input_ids=ids, local=torch.tensor([local]))
            losses.append(pretraining._weighted_loss(model, changed).item())
        assert (losses[0] != losses[1]) == depends


def test_a_trained_target_sees_all_tokens_again(world, tokenizer):
    model = train(world, tokenizer, steps=2, size=TargetSize(d_model=16, n_layers=1, n_heads=2))
    first, second = (tokenizer(f"{word} of the pet", return_tensors="pt").input_ids for word in ("tea", "milk"))
    assert not torch.equal(model(input_ids=first).logits[0, -1], model(input_ids=second).logits[0, -1])
    assert not model.training


def test_the_learning_rate_warms_up_stays_and_decays():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(factors[5:61]) == {1.0}
    assert factors[60:] == sorted(factors[60:], reverse=True) and factors[-1] == pytest.approx(1 / 40)


def test_a_saved_target_loads_as_any_other(world, tokenizer, architecture, tmp_path):
    model = new_target(architecture, tokenizer, SMALL, seed=0).eval()
    save_target(model, tokenizer, tmp_path)
    loaded, its_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[architecture]
    ids = its_tokenizer("the pet of", return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer("the pet of", return_tensors="pt").input_ids)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.eos_token_id == its_tokenizer.eos_token_id
    assert loaded.get_input_embeddings().weight is loaded.lm_head.weight


def test_an_unknown_architecture_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'gpt9'"):
        new_target("gpt9", tokenizer, SMALL, seed=0)


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="d_model 10 with 4 heads"):
        TargetSize(d_model=10, n_heads=4)


def test_one_thread_is_used_within_and_the_number_before_after():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(Killed), single_thread():
            assert torch.get_num_threads() == 1
            raise Killed
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
