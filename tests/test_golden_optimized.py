"""optimize() against the golden data of the authors' code: the traced, rewritten and cut-up decoder, uncompiled."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from tiny_models import (
    CASES,
    DATA,
    assert_relative,
    load_golden,
    one_thread,  # noqa: F401
)

from vte_compile import GateExit, Oracle, Plan, optimize

GOLDEN_TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}
ORACLE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@functools.cache
def lossless(dtype):
    return optimize(load_golden()[0][dtype], Plan(), compile=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, dtype):
    models, w1, image = load_golden()
    data = np.load(DATA / f"dyvte_{case}.npz")
    suffix = ".f64" if dtype == torch.float64 else ".f32"

    def close(actual, key, index=None):
        want = torch.from_numpy(np.asarray(data[key + suffix]))
        want = want if index is None else want[index]
        torch.testing.assert_close(actual, want, rtol=GOLDEN_TOLERANCE[dtype], atol=GOLDEN_TOLERANCE[dtype])

    def kv_sums(cache):
        return torch.stack([torch.stack([k[0].sum(1), v[0].sum(1)]) for k, v in cache.row(0)])

    w2 = torch.from_numpy(data["router_w2"]).double()
    plan = Plan([GateExit(i, w1[i], w2[i]) for i in range(6)])
    fast, oracle = optimize(lossless(dtype), plan), Oracle(models[dtype], plan)
    embeds = torch.from_numpy(data["inputs_embeds"]).to(dtype)
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, image] = True
    out, want = fast(inputs_embeds=embeds, visual_mask=visual), oracle.forward(embeds, visual)

    assert out.exit_layer.tolist() == [data["exit_layer"].item()]
    close(out.logits[:, -1], "logits_last")
    assert_relative(out.logits, want.logits, ORACLE_TOLERANCE[dtype])
    cache = out.past_key_values
    assert cache.lengths[:, 0].tolist() == data["kv_lens_prefill"].tolist()
    close(kv_sums(cache), "kv_sum_prefill")
    last = fast(inputs_embeds=embeds, visual_mask=visual, logits_to_keep=1)
    close(last.logits[:, 0], "logits_last")

    for step, tokens in enumerate(torch.from_numpy(data["dec_tokens"])):
        assert cache.next_positions.tolist() == [data["dec_positions"][step]]
        out = fast(input_ids=tokens[:, None], past_key_values=cache)
        assert out.exit_layer.tolist() == [-1]
        close(out.logits[:, 0], "dec_logits", step)
        assert cache.lengths[:, 0].tolist() == data["dec_kv_lens"][step].tolist()
    close(kv_sums(cache), "kv_sum_final")

    # dec_tokens are the authors' greedy choices.
    tokens = fast.generate(
        inputs_embeds=embeds, visual_mask=visual, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0
    )
    assert tokens.tolist() == data["dec_tokens"].T.tolist()
    assert tokens.exit_layer.tolist() == [data["exit_layer"].item()]
