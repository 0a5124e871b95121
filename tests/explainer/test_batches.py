from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_explain.explainer.batches import answer_tokens, collate, epoch_steps, micro_batch, training_steps

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(5, 60, 203).tolist()
TASKS = RNG.choice(["ablation", "patching", "text"], 203).tolist()


def steps(**changes):
    settings = dict(epochs=3, batch_size=16, micro_batches=4, seed=0, weights={}) | changes
    return training_steps(LENGTHS, TASKS, **settings)


def flat(steps) -> list[int]:
    return [i for step in steps for part in step for i in part]


def one_epoch(epoch: int, **changes) -> list[int]:
    settings = dict(batch_size=16, micro_batches=4, seed=0, weights={}) | changes
    return flat(epoch_steps(LENGTHS, TASKS, epoch=epoch, **settings))


def test_every_example_is_seen_once_an_epoch():
    assert Counter(flat(steps())) == {i: 3 for i in range(203)}
    for epoch in range(3):
        assert sorted(one_epoch(epoch)) == list(range(203))


def test_every_rank_has_the_same_number_of_steps_and_work_in_each():
    found = steps(micro_batches=4)
    assert len(found) == 3 * 13
    assert {len(step) for step in found} == {4}
    assert {len(part) for step in found for part in step} <= {3, 4}


def test_the_order_is_a_function_of_seed_and_epoch():
    assert steps() == steps()
    assert steps() != steps(seed=1)
    assert one_epoch(0) != one_epoch(1)
    longer = steps(epochs=5)
    assert longer[: len(steps())] == steps()


def test_the_examples_of_a_step_do_not_depend_on_how_many_workers_share_it():
    def contents(found):
        return [sorted(i for part in step for i in part) for step in found]

    assert contents(steps(micro_batches=1)) == contents(steps(micro_batches=2)) == contents(steps(micro_batches=8))


def test_steps_hold_examples_of_about_the_same_length_and_micro_batches_about_the_same_number_of_tokens():
    found = steps(epochs=1)
    padded = sum(
        len(step[0] + step[1] + step[2] + step[3]) * max(LENGTHS[i] for p in step for i in p) for step in found
    )
    assert padded < 1.15 * sum(LENGTHS)
    spread = []
    for step in found:
        tokens = [sum(LENGTHS[i] for i in part) for part in step]
        if len({len(part) for part in step}) == 1:
            spread.append((max(tokens) - min(tokens)) / np.mean(tokens))
    assert len(spread) > 5
    assert np.mean(spread) < 0.05


def test_lengths_do_not_decide_when_a_step_comes():
    mean = [np.mean([LENGTHS[i] for part in step for i in part]) for step in steps(epochs=20)]
    assert abs(np.corrcoef(mean, np.arange(len(mean)))[0, 1]) < 0.2
    assert 0.4 < np.mean(np.diff(mean) > 0) < 0.6  # not up and up within a pool either


def test_weights_say_how_often_a_task_is_seen():
    seen = Counter(TASKS[i] for i in flat(steps(epochs=4, weights={"text": 0.25, "patching": 2.0})))
    size = Counter(TASKS)
    assert seen["ablation"] == 4 * size["ablation"]
    assert seen["patching"] == 8 * size["patching"]
    assert seen["text"] == size["text"]


def test_of_a_task_seen_less_than_once_the_epochs_take_turns():
    found = Counter(flat(steps(epochs=4, weights={"text": 0.25})))
    assert {found[i] for i, task in enumerate(TASKS) if task == "text"} == {1}


def test_what_is_seen_does_not_depend_on_the_size_of_steps():
    assert sorted(one_epoch(1, weights={"text": 0.3})) == sorted(one_epoch(1, weights={"text": 0.3}, batch_size=50))


@given(n=st.integers(1, 60), batch_size=st.integers(1, 20), micro_batches=st.integers(1, 24), seed=st.integers(0, 3))
@settings(max_examples=60)
def test_whatever_the_sizes_no_example_is_lost_and_micro_batches_are_even(n, batch_size, micro_batches, seed):
    options = dict(epoch=0, batch_size=batch_size, micro_batches=micro_batches, seed=seed, weights={})
    found = epoch_steps(LENGTHS[:n], TASKS[:n], **options)
    assert sorted(flat(found)) == list(range(n))
    assert {len(step) for step in found} == {micro_batches}
    for step in found:
        sizes = [len(part) for part in step]
        assert 1 <= sum(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_one_question_at_a_time_is_possible_whatever_their_number():
    """100 in steps of 32 make four steps of 25, each in 32 passes."""
    found = epoch_steps(LENGTHS[:100], TASKS[:100], epoch=0, batch_size=32, micro_batches=32, seed=0, weights={})
    assert [sorted(map(len, step)) for step in found] == [[0] * 7 + [1] * 25] * 4


def test_an_empty_micro_batch_is_a_prompt_of_which_nothing_is_to_be_learned(examples):
    [own] = micro_batch(examples, [[0, 3], [1], []], [])
    assert own == examples[1]._replace(input_ids=examples[1].input_ids[: examples[1].n_prompt])
    assert answer_tokens([own]) == 0 and not collate([own], 0).answer.any()
    assert micro_batch(examples, [[0, 3], [1], []], [0, 3]) == [examples[0], examples[3]]


def test_an_epoch_without_any_example_is_refused():
    with pytest.raises(ValueError, match="no example in epoch 1"):
        steps(weights={task: 1e-4 for task in set(TASKS)})


@pytest.mark.parametrize(("weights", "message"), [({"features": 1.0}, "'features'"), ({"text": 0.0}, "above 0")])
def test_weights_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        steps(weights=weights)


def test_a_batch_holds_its_examples_at_the_right(examples):
    batch = collate(examples, 9)
    width = max(len(example.input_ids) for example in examples)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        assert batch.input_ids[row].tolist() == [9] * (width - length) + example.input_ids
        assert batch.attention_mask[row].tolist() == [0] * (width - length) + [1] * length
        assert batch.position_ids[row, -length:].tolist() == list(range(length))
        assert batch.input_ids[row][batch.answer[row]].tolist() == example.input_ids[example.n_prompt :]
    torch.testing.assert_close(batch.vectors, torch.from_numpy(np.concatenate([e.vectors for e in examples])))
    assert batch.layers == ((1,), (1,), (1,), (1,))


def test_a_batch_without_vectors_has_none_of_any_width(examples):
    batch = collate([examples[1]], 0)
    assert batch.vectors.shape == (0, 32) and batch.layers == ()


def test_prompts_without_answers_have_nothing_to_be_learned(examples):
    asked = [example._replace(input_ids=example.input_ids[: example.n_prompt]) for example in examples]
    assert not collate(asked, 0).answer.any()


def test_answer_tokens_are_weighted(examples):
    assert answer_tokens(examples) == 4 + 2 + 6 + 3
    assert answer_tokens([example._replace(weight=0.5) for example in examples]) == 7.5
