"""companion_token: attentions in which the first token of a prompt is alone, against the oracle's numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import LAYERS, C, assert_close, captured, embeddings, nodes_of, positions, run_graph, shared
from tiny_models import random_adapter

from vte_compile import Oracle, Plan, SkippedAttention
from vte_compile.adapters import PIA
from vte_compile.errors import CaptureError
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.companion_token import companion_token
from vte_compile.passes.residual import SDPA

COMPANION = torch.linspace(-2, 2, C)
CAT = torch.ops.aten.cat.default


def planned(layer: int, companion: torch.Tensor | None = COMPANION) -> Plan:
    return Plan(skips=[SkippedAttention(layer, random_adapter(PIA, layer))], companion=companion)


def rewritten(plan: Plan, last: bool, family: str = "llama"):
    graph = captured(family=family)
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(plan, last_token_logits=last))}
    return graph, results["companion_token"]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("llama", LAYERS - 1), ("gemma", 1)])
def test_first_token_is_alone(family: str, layer: int, last: bool) -> None:
    plan, tokens = planned(layer), 6
    graph, result = rewritten(plan, last, family)
    assert (result.applied, result.refusals) == (LAYERS - 1, [])
    # Where the last attention has one query, the last token's, there is nothing of the companion's to compute. (A PIA
    # above it wants the mean of all tokens.)
    whole = LAYERS - 1 - int(last and layer == 0)
    assert len(nodes_of(graph, SDPA)) == LAYERS - 1 + whole
    embeds = embeddings(tokens)
    out = run_graph(graph, torch.cat([COMPANION[None, None], embeds], 1), positions(tokens + 1, -1))
    want = Oracle(shared(family), plan).forward(embeds)
    assert_close(out[0][:, -1], want.logits[:, -1])
    if not last:
        assert_close(out[0][:, 1:], want.logits)
    row = want.cache.rows[0]
    expected = [tensor for pair in row.layers if pair is not None for tensor in pair]
    for ours, theirs in zip(out[1 : 1 + len(expected)], expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("gemma", 1), ("llama", LAYERS - 1)])
def test_chunks_have_it_behind_their_rows(family: str, layer: int) -> None:
    """Rows of unequal lengths, whose place behind the last token is free, and then decode steps."""
    graph, plan, lengths = captured("chunk", family=family), planned(layer), [5, 3, 1]
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(plan, one_prompt=False))}
    # The last attention is cut to the last token, but where a PIA above it wants the mean of all tokens. (Gemma's
    # blocks refuse the cut.)
    cut = family == "llama" and layer == 0
    assert results["companion_token"].applied == LAYERS - 1 - int(cut)
    oracle, known = Oracle(shared(family), plan), None
    kept = [i for i in range(LAYERS) if i != layer]
    heads = shared(family).config.num_key_value_heads
    past = [torch.full((3, heads, 4, 8), torch.nan) for _ in (*kept, *kept)]
    filled = torch.zeros(3, dtype=torch.long)
    state = [torch.zeros(3, *shape) for shape in state_shapes(graph)]
    for step, counts in enumerate((lengths, [1, 1, 1])):
        new, rows = torch.tensor(counts), embeddings(max(counts), 3, seed=step)
        real = torch.arange(max(counts)) < new[:, None]
        want = oracle.forward(rows, attention_mask=real, cache=known)
        padded = torch.nn.functional.pad(rows.masked_fill(~real[..., None], 9), (0, 0, 0, int(not step)), value=9)
        at = filled[:, None] + torch.arange(padded.shape[1])
        out = run_graph(graph, padded, at, new, filled, *past, *state)
        assert_close(out[0][:, 0], want.logits[range(3), new - 1])
        past, state = out[1 : 1 + len(past)], out[1 + len(past) :]
        filled, known = filled + new, want.cache


def state_shapes(graph) -> list[torch.Size]:
    """Of what adapters know of the prompt, without the batch."""
    names = {value.name for value in graph.prompt_state}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder" and node.name in names]
    return [node.meta["val"].shape[1:] for node in placeholders]


def test_nothing_changes_without_a_companion_and_in_other_phases() -> None:
    _, result = rewritten(planned(0, None), True)
    assert result.applied == 0
    graph = captured("decode")
    before = len(list(graph.graph.nodes))
    assert companion_token(graph, PassSettings(planned(0))).applied == 0
    assert len(list(graph.graph.nodes)) == before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [(False, "layer 0: .* is not known to be plain causal"), (True, "LlamaModel takes block_ids besides")],
    ids=["a mask", "more inputs"],
)
def test_what_is_not_plain_causal_is_an_error(inputs: bool, message: str) -> None:
    graph = captured()
    graph.spec = replace(graph.spec, has_blocks=inputs)
    with pytest.raises(CaptureError, match=rf"pass companion_token failed on the prefill graph.*{message}"):
        run_passes((annotate_layers, companion_token), graph, PassSettings(planned(0)))
