"""Back-patching against one plain forward pass per pair, on every family."""

import pytest
import torch
from conftest import PROMPTS

from backattn.analysis.back_patching import back_patch, back_patch_one
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode


def test_all_pairs_equal_one_forward_pass_per_pair(tiny):
    positions, prompts, wanted = [2, 4], PROMPTS[:2], [5, 7]
    patched = back_patch(*tiny, prompts, positions, [wanted] * 2, rows=3)
    n, targets, sources = patched.said.shape
    for index, target, source in torch.cartesian_prod(*map(torch.arange, (n, targets, sources))):
        said, found = (x[index, target, source] for x in (patched.said, patched.log_probs))
        if source <= target:
            assert said == -1 and found.isnan().all()
            continue
        plain = back_patch_one(*tiny, prompts[index], positions[index], source, target)
        assert torch.allclose(found, plain[wanted].cpu(), atol=1e-4)
        assert said == plain.argmax()


def test_a_patch_changes_the_answer_and_donors_are_other_prompts(llama):
    donor = (PROMPTS[1], 3)
    own = back_patch(*llama, PROMPTS[:1], [2], [[5]]).log_probs[0, 0, 2]
    other = back_patch(*llama, PROMPTS[:1], [2], [[5]], donors=[donor]).log_probs[0, 0, 2]
    plain = back_patch_one(*llama, PROMPTS[0], 2, 2, 0, donor=donor)[[5]]
    unpatched = next_log_probs(llama[0], encode(llama[1], PROMPTS[:1], side="left"))[0, [5]]
    assert torch.allclose(other, plain, atol=1e-4)
    assert not torch.allclose(own, other, atol=1e-4)
    assert not torch.allclose(own, unpatched, atol=1e-4)


def test_a_position_outside_the_prompt_is_named(llama):
    for position, message in (
        (99, "Position 99 of prompt 0"),
        (-1, "-1"),
        (0, "the first is 1"),
    ):
        with pytest.raises(IndexError, match=message):
            back_patch(*llama, PROMPTS[:1], [position], [[5]])
        with pytest.raises(IndexError, match=message):
            back_patch_one(*llama, PROMPTS[0], position, 2, 1)
    for given in ([-1], [10**6]):
        with pytest.raises(IndexError, match="Token id"):
            back_patch(*llama, PROMPTS[:1], [2], [given])
    for source, target in ((-1, 0), (5, 0), (1, -1), (2, 4)):
        with pytest.raises(IndexError, match="Layer"):
            back_patch_one(*llama, PROMPTS[0], 2, source, target)
