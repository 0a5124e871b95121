import pytest
import torch

from ray_explain.interventions.tokens import token_batch


def test_prompts_are_padded_on_the_left_and_numbered_from_their_own_first_token():
    batch = token_batch([[5, 6, 7], [8]], pad_id=9, device="cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pad_is_an_error(sequences):
    with pytest.raises(ValueError, match=r"at least one"):
        token_batch(sequences, 0, "cpu")


def test_padding_does_not_change_the_answer(model):
    prompts = [[5, 6, 7, 8, 9, 10, 11], [8], [12, 13, 14]]
    batch = token_batch(prompts, pad_id=0, device="cpu")
    padded = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits[:, -1]
    alone = torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in prompts])
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
