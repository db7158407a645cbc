"""Attention between modalities: against a whole naive softmax, groups of tokens by hand, and how much is there."""

import pytest
import torch
from tiny_models import IMAGE_TOKENS, LAYERS, assert_close, image_prompt, one_thread, tiny, tiny_llava  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vte_compile.errors import UnsupportedModelError
from vte_compile.tuning import modality_attention, watched_attention
from vte_compile.tuning.answered import embed_answered
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.modality_attention import (
    KEYS,
    QUERIES,
    attention_shares,
    key_groups,
    measure_attention,
    query_groups,
    uniform_shares,
)
from vte_compile.tuning.samples import Sample


def visual(layout):
    return torch.tensor([c == "v" for c in layout])


def groups(layout, answer):
    """Groups of a prompt written as t and v, with an answer of so many tokens."""
    given, prompt = visual(layout + "t" * (answer - 1)), len(layout)
    return query_groups(given, prompt), key_groups(given, prompt)


def naive(probabilities, queries, keys):
    """Shares [Q, K] from a whole softmax [heads, T, T], in loops."""
    mean = probabilities.double().mean(0)
    return torch.stack(
        [torch.stack([mean[q][:, k].sum(-1).mean() for k in keys]) for q in queries],
    )


def test_groups_of_several_images():
    queries, keys = groups("ttvvtvvttt", answer=3)
    where = {name: row.nonzero().flatten().tolist() for name, row in zip(KEYS, keys, strict=True)}
    assert where == {
        "first": [0],
        "before": [1, 4],
        "visual": [2, 3, 5, 6],
        "question": [7, 8, 9],
        "answer": [10, 11],
    }
    assert bool((keys.sum(0) == 1).all())
    where = {name: row.nonzero().flatten().tolist() for name, row in zip(QUERIES, queries, strict=True)}
    assert where == {"visual": [2, 3, 5, 6], "question": [7, 8], "answer": [9, 10, 11]}


def test_a_prompt_that_begins_with_the_image_has_no_first_text():
    _, keys = groups("vvttt", answer=1)
    assert keys.sum(-1).tolist() == [0, 0, 2, 3, 0]


def test_uniform_shares_by_hand():
    queries, keys = groups("tvvtt", answer=1)
    shares = uniform_shares(queries, keys)
    # Visual tokens see 2 and 3 tokens, the first of them is text; the question is token 3, the last one token 4.
    expected = [
        [(1 / 2 + 1 / 3) / 2, 0, (1 / 2 + 2 / 3) / 2, 0, 0],
        [1 / 4, 0, 2 / 4, 1 / 4, 0],
        [1 / 5, 0, 2 / 5, 2 / 5, 0],
    ]
    assert_close(shares, torch.tensor(expected, dtype=torch.float64))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that comes up meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("budget", [2**24, 4000, 1])
def test_shares_are_those_of_the_whole_softmax(heads, kv_heads, dtype, budget, monkeypatch):
    monkeypatch.setattr(modality_attention, "_SCORES", budget)
    queries, keys = groups("tt" + "v" * 40 + "t" + "v" * 23 + "ttttt", answer=4)
    length, generator = keys.shape[1], torch.Generator().manual_seed(heads)
    query, key = (torch.randn(n, length, 8, generator=generator).to(dtype) for n in (heads, kv_heads))
    with Largest() as largest:
        found = attention_shares(query, key, 0.7, queries, keys)
    # Beside the scores of a block there are keys, and what each token pays.
    one_query = heads * length
    assert largest.numbers <= max(min(budget, one_query * length), one_query, key.numel(), len(KEYS) * length)
    wide = torch.promote_types(dtype, torch.float32)
    scores = 0.7 * query.to(wide) @ key.to(wide).repeat_interleave(heads // kv_heads, 0).transpose(1, 2)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    assert_close(found, naive(scores.softmax(-1), queries, keys), 1e-12 if dtype == torch.float64 else 1e-5)
    assert_close(found.sum(-1), torch.ones(len(QUERIES), dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("layout", ["tittt", "titittt", "ittttt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_against_the_models_own_attention_maps(layout, attention, monkeypatch):
    monkeypatch.setattr(modality_attention, "_SCORES", 64)
    ids, pixels, mask = image_prompt(layout)
    answer = (7, 3, 11)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    examiner = Examiner(tiny_llava(attn_implementation=attention))
    answered = embed_answered(examiner.model, examiner.spec, Sample.of(inputs, answer))
    found = measure_attention(examiner, answered)
    assert found.shape == (LAYERS, len(QUERIES), len(KEYS))

    eager = tiny_llava(attn_implementation="eager")
    whole = torch.cat([ids, torch.tensor([answer[:-1]])], 1)
    maps = eager(input_ids=whole, pixel_values=pixels, output_attentions=True).attentions
    queries, keys = groups(layout.replace("i", "v" * IMAGE_TOKENS), len(answer))
    for layer, probabilities in enumerate(maps):
        assert_close(found[layer], naive(probabilities[0], queries, keys))
    assert examiner.model.config.text_config._attn_implementation == attention


def test_attention_that_cannot_be_seen_is_refused(monkeypatch):
    ids, pixels, _ = image_prompt("tittt")
    examiner = Examiner(tiny_llava())
    answered = embed_answered(
        examiner.model, examiner.spec, Sample.of({"input_ids": ids, "pixel_values": pixels}, (7,))
    )
    monkeypatch.setattr(watched_attention, "_ATTENTION", "eager")  # a layer that pays no heed to what it is told
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* cannot be seen"):
        measure_attention(examiner, answered)


def test_other_scores_than_products_are_refused():
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedModelError, match="s_aux"):
        watched_attention._watched_attention(tiny().model, query, query, query, None, 1.0, s_aux=30.0)
