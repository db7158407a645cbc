"""Mixtures of experts: where each token chooses its experts they work as any decoder does; other routing is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from marks import thorough
from test_families import WITHOUT_ADAPTERS
from tiny_models import (
    LAYERS,
    NEVER,
    TINY,
    C,
    assert_relative,
    chunk,
    gate,
    one_thread,  # noqa: F401
    plan,
)
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import vte_compile
from vte_compile import Oracle, Plan, StaticExit, load_engine, optimize
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.errors import UnsupportedModelError
from vte_compile.families.cache_name import cache_name, cache_of
from vte_compile.plan import SkippedAttention

EXITS = {
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "first": [gate(0, -NEVER)],
    "middle": [gate(0, NEVER), StaticExit(1)],
    "last": [StaticExit(LAYERS - 1)],
}
GREEDY = dict(do_sample=False, max_new_tokens=8)


def mixture_of(name, layers):
    """A random language model whose tokens choose two of four experts."""
    torch.manual_seed(0)
    experts = TINY | dict(num_hidden_layers=layers, num_experts_per_tok=2)
    if name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**experts, num_local_experts=4, sliding_window=None))
    else:  # with an expert that all tokens share, and a layer without experts
        sizes = dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24)
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**experts, **sizes, decoder_sparse_step=1, mlp_only_layers=[1]))
    model.generation_config.eos_token_id = None
    return model.eval()


@functools.cache
def mixture(name):
    """One that nobody changes."""
    return mixture_of(name, LAYERS)


@functools.cache
def optimized(name):
    return optimize(mixture(name), Plan(), compile=False)


@pytest.mark.parametrize("exits", list(EXITS))
@pytest.mark.parametrize("name", ["mixtral", thorough("qwen2_moe")])
@pytest.mark.shows("exits", "mixtral")
def test_exits_equal_the_oracle(name, exits):
    """A row with an image, one without, one with two; then decode steps."""
    embeds, visual, real = chunk("..tvvvvttt", "tttttttttt", ".tvvttvvtt")
    fast, oracle = optimize(optimized(name), plan(*EXITS[exits])), Oracle(mixture(name), plan(*EXITS[exits]))
    out = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real)
    want = oracle.forward(embeds, visual, real)
    forced = {"never": -1, "first": 0, "middle": 1, "last": LAYERS - 1}[exits]
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [forced, -1, forced]
    assert_relative(out.logits, want.logits)
    for token in (7, 8):
        ids = torch.full((3, 1), token)
        out = fast(input_ids=ids, past_key_values=out.past_key_values)
        want = oracle.forward(oracle.embed_tokens(ids), cache=want.cache)
        assert_relative(out.logits, want.logits)


@pytest.mark.parametrize("name", ["mixtral", thorough("qwen2_moe")])
@pytest.mark.shows("generate", "mixtral")
def test_generate_without_exits_equals_the_model(name):
    for ids in (torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])):
        assert torch.equal(optimized(name).generate(ids, **GREEDY), mixture(name).generate(ids, **GREEDY))


@pytest.mark.parametrize("name", ["mixtral", thorough("qwen2_moe")])
@pytest.mark.shows("second turn", "mixtral")
def test_second_turn(name):
    """Rows that exit and one of text; a turn of text, one with an image, whose tokens leave, too, and a decode step."""
    parts = plan(gate(0, NEVER), StaticExit(1))
    fast, oracle = optimize(optimized(name), parts), Oracle(mixture(name), parts)
    given, cache = {}, None
    for seed, layouts in enumerate((("..tvvttt", "tttttttt"), ("tt.", "ttt"), ("tvvtt", "vvttt"), ("t", "t"))):
        embeds, visual, real = chunk(*layouts, seed=seed)
        out = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real, **given)
        want = oracle.forward(embeds, visual, real, cache=cache)
        assert out.exit_layer.tolist() == want.exit_layer.tolist()
        assert_relative(out.logits, want.logits)
        given, cache = {cache_name(fast): cache_of(out)}, want.cache
    assert cache_of(out).lengths.T.tolist() == cache.lengths()


@pytest.mark.shows("skips", "mixtral")
def test_experts_in_a_loop(record_property):
    """The model's own loop over experts cannot be traced; its config stays as it was. An attention is skipped, too."""
    record_property("note", WITHOUT_ADAPTERS)
    model = MixtralForCausalLM(copy.deepcopy(mixture("mixtral").config))
    model.load_state_dict(mixture("mixtral").state_dict())
    model.config._experts_implementation = "eager"
    parts = [SkippedAttention(1), StaticExit(2)]
    embeds, visual, _ = chunk("ttvvvvttt", "tvvttvvtt")
    want = Oracle(model.eval(), plan(*parts)).forward(embeds, visual)
    out = optimize(model, plan(*parts), compile=False)(inputs_embeds=embeds, visual_mask=visual)
    assert_relative(out.logits, want.logits)
    assert out.exit_layer.tolist() == [2, 2]
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("target", ["onnxruntime", "aoti", "tensorrt"])
def test_engines_have_no_grouped_products(target, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"'grouped_mm': call model\.set_experts_implementation"):
        vte_compile.export(optimized("mixtral"), tmp_path / "engine", target=target)


@pytest.mark.slow
@pytest.mark.shows("ONNX Runtime", "mixtral")
def test_onnx_engine(tmp_path):
    """Each token with the weights of its own experts: that converts."""
    torch.manual_seed(0)
    config = MixtralConfig(**(TINY | {"num_hidden_layers": 2}), num_local_experts=4, sliding_window=None)
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("batched_mm")
    fast = optimize(model, plan(StaticExit(0)), compile=False)
    vte_compile.export(fast, tmp_path / "engine", target="onnxruntime", forms=("staged",))
    embeds, visual, _ = chunk("ttvvvvttt")
    engine = load_engine(tmp_path / "engine")
    out = engine.prefill(inputs_embeds=embeds.numpy(), visual_mask=visual.numpy())
    assert out.exit_layer.tolist() == [0]
    assert_relative(torch.from_numpy(out.logits), Oracle(model, fast.plan).forward(embeds, visual).logits[:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", thorough("qwen2_moe")])
@pytest.mark.shows('backend="vte"', "mixtral")
def test_backend(name):
    """Prompts with the placeholder of an image and without, and decode steps, token for token as optimize()."""
    torch._dynamo.reset()
    parts, ids = [gate(0, 0.1), StaticExit(1)], torch.tensor([[3, 60, 60, 60, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3]])
    model = mixture_of(name, layers=2)
    fast = optimize(mixture_of(name, layers=2), plan(*parts), compile=False)
    options = {"plan": plan(*parts), "compile": False, "visual_token_ids": [60]}
    model.forward = torch.compile(model.forward, backend="vte", options=options)
    want = fast.generate(ids, visual_mask=ids == 60, **GREEDY)
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert exit_layers(out.past_key_values).tolist() == want.exit_layer.tolist()
    assert min(want.exit_layer.tolist()) == -1 < max(want.exit_layer.tolist())


@pytest.mark.parametrize("kind", ["loop", "expert choice"])
def test_backend_refuses(kind, caplog):
    """The model still gives what it gives uncompiled."""
    torch._dynamo.reset()
    model, ids = mixture_of("mixtral", layers=1 if kind == "loop" else LAYERS), torch.tensor([[3, 4, 5, 6, 7]])
    if kind == "loop":
        model.config._experts_implementation = "eager"
    else:
        for layer in model.model.layers:
            layer.mlp = ExpertChoice()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        options = {"plan": plan(StaticExit(0)), "compile": False}
        out = torch.compile(model, backend="vte", options=options)(ids, use_cache=True)
    assert_relative(out.logits, want)
    assert {"loop": "set_experts_implementation('grouped_mm')", "expert choice": "expert-choice"}[kind] in caplog.text


class ExpertChoice(nn.Module):
    """Each expert takes the half of all tokens that fit it best."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(C, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(2))

    def forward(self, hidden):
        tokens = hidden.reshape(-1, C)
        scores = self.gate(tokens).softmax(-1)
        result = torch.zeros_like(tokens)
        for score, expert in zip(scores.T, self.experts, strict=True):
            chosen = score.topk(len(tokens) // 2 or 1)
            result = result.index_add(0, chosen.indices, chosen.values[:, None] * expert(tokens[chosen.indices]))
        return result.view_as(hidden)


def test_expert_choice_is_refused():
    torch.manual_seed(1)
    model = MixtralForCausalLM(mixture("mixtral").config).eval()
    for layer in model.model.layers:
        layer.mlp = ExpertChoice()
    with pytest.raises(
        UnsupportedModelError, match=r"MixtralForCausalLM: a token's hidden .* \(expert-choice routing\)"
    ):
        optimize(model, Plan(), compile=False)
