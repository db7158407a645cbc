"""DeepStack: features that a decoder adds behind its first layers, in graphs and oracle, and which are refused."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from test_families import handed_over, optimized, oracle_of
from tiny_families import family_inputs, shared_family, tiny_family
from tiny_models import NEVER, assert_relative, gate, plan
from transformers import Qwen3VLForConditionalGeneration

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.capture import capture
from vte_compile.errors import CaptureError, InputError, UnsupportedModelError
from vte_compile.families.decoder import describe
from vte_compile.families.deepstack import rows_of, spread

NAME = "qwen3_vl"
"""Two of its four layers have features."""


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_what_is_added(layer):
    """Features behind a layer count until an exit, and what would be added behind it does not; oracle and graphs."""
    parts = [gate(0, NEVER)] if layer is None else [StaticExit(layer)]
    fast, oracle = optimize(optimized(NAME), plan(*parts)), Oracle(shared_family(NAME), plan(*parts))
    inputs = family_inputs(NAME, images=[1, 2])
    prompt = handed_over(NAME, inputs)
    before = oracle.forward(**prompt).logits
    assert_relative(fast(**inputs).logits, before)
    real = prompt["attention_mask"].bool()
    for changed in (0, 1):
        features = list(prompt["deepstack"])
        features[changed] = 2 * features[changed]
        want = oracle.forward(**prompt | {"deepstack": features}).logits
        more = spread(prompt["visual_mask"], features, prompt["inputs_embeds"])
        embeds, visual, positions = (prompt[name] for name in ("inputs_embeds", "visual_mask", "position_ids"))
        with torch.no_grad():
            cache = fast._cache(None)
            got = fast._vte_runner.run(embeds, visual, real, positions, cache, last=False, token_inputs=more).logits
        assert_relative(got, want)
        # Text sees what is added behind a layer in the layers above, if the visual tokens are still there.
        assert torch.equal(want[:, -1], before[:, -1]) == (layer is not None and changed >= layer)


def test_a_visual_token_that_is_a_chunk():
    """It has features, which decode steps do not take."""
    fast, oracle = optimize(optimized(NAME), Plan()), Oracle(shared_family(NAME), Plan())
    prompt = handed_over(NAME, family_inputs(NAME, images=1))
    names = ("inputs_embeds", "visual_mask", "attention_mask", "position_ids")
    embeds, visual, real, positions = (prompt[name] for name in names)
    with torch.no_grad():
        cache, more = fast._cache(None), spread(visual, prompt["deepstack"], embeds)
        fast._vte_runner.run(embeds, visual, real.bool(), positions, cache, last=True, token_inputs=more)
        known = oracle.forward(**prompt).cache
        token, one = (
            torch.randn(1, 1, embeds.shape[2], generator=torch.Generator().manual_seed(0)),
            visual[:, :1] | True,
        )
        features = [2 * token[0], 3 * token[0]]
        more = spread(one, features, token)
        got = fast._vte_runner.run(token, one, one, None, cache, last=True, token_inputs=more).logits
    want = oracle.forward(token, one, one, cache=known, deepstack=features)
    assert_relative(got, want.logits)
    assert cache.lengths.T.tolist() == want.cache.lengths()


def test_one_graph_per_kind_of_layer():
    """Layers with features are traced each, others are copies; a decode step has no features."""
    spec = describe(shared_family(NAME))
    assert spec.token_inputs == ("deepstack_0", "deepstack_1")
    for phase in ("prefill", "decode"):
        names = [n.name for n in capture(spec, phase).graph.nodes if n.op == "placeholder"]
        assert ("deepstack_1" in names) == (phase == "prefill")
        assert "deepstack_2" not in names


def test_features_of_rows():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    features = [torch.arange(8.0).reshape(4, 2), torch.arange(8.0, 16.0).reshape(4, 2)]
    assert [[f.tolist() for f in row] for row in rows_of(mask, features)] == [
        [[[0, 1], [2, 3]], [[8, 9], [10, 11]]],
        [[], []],
        [[[4, 5], [6, 7]], [[12, 13], [14, 15]]],
    ]
    first, _ = spread(mask, features, torch.zeros(3, 3, 2))
    assert first[mask].tolist() == features[0].tolist()
    assert not first[~mask].any()
    with pytest.raises(InputError, match="3 features behind layer 0, but 4 visual tokens"):
        rows_of(mask, [features[0][:3]])


def test_the_oracle_wants_the_features():
    """Without them it would give numbers of another model."""
    oracle, prompt = oracle_of(NAME, "never"), handed_over(NAME, family_inputs(NAME, images=1))
    for wrong, count in ((None, 0), (prompt["deepstack"][:1], 1)):
        with pytest.raises(InputError, match=f"deepstack: Qwen3VLTextModel adds .* behind 2 layers, and {count} are"):
            oracle.forward(**prompt | {"deepstack": wrong})
    prompt["visual_mask"] = torch.zeros_like(prompt["visual_mask"])
    oracle.forward(**prompt | {"deepstack": None})  # of text alone


def test_a_decoder_that_adds_in_another_way():
    """Found by numbers: the signature is the same."""
    model = tiny_family(NAME)
    decoder = model.model.language_model

    def doubled(self, hidden_states, mask, features):
        return type(decoder)._deepstack_process(self, hidden_states, mask, 2 * features)

    decoder._deepstack_process = types.MethodType(doubled, decoder)
    with pytest.raises(CaptureError, match=r"what it makes of deepstack_0, deepstack_1 is something else"):
        optimize(model, Plan(), compile=False)


def test_how_many_layers_is_not_said():
    config = copy.deepcopy(shared_family(NAME).config)
    config.vision_config.deepstack_visual_indexes = []
    model = Qwen3VLForConditionalGeneration(config).eval()
    for use in (Oracle, lambda model, plan: optimize(model, plan, compile=False)):
        with pytest.raises(UnsupportedModelError, match=r"deepstack_visual_indexes in .* for how many of its 4"):
            use(model, Plan())


def test_another_signature():
    """Of a decoder with positions of one number."""
    model = tiny_family("llava")
    decoder = model.model.language_model

    class Other(type(decoder)):
        def forward(self, inputs_embeds=None, vision_mask=None, deepstack_features=None, **kwargs):
            raise NotImplementedError

    decoder.__class__ = Other
    with pytest.raises(UnsupportedModelError, match=r"^Other takes deepstack_features besides .*\(DeepStack\) are"):
        describe(model)
