"""backend="vte" while it serves: after warm-up, neither lengths nor exits nor decode steps compile anything.

The warm-up that is needed: two prompts with an image, of different lengths, since Dynamo takes the first length for a
constant; two decode steps behind the first, for the same reason; and a prompt without image, if there will be such,
which takes another path through the model. How many images a prompt has is a constant to LLaVA's own forward, which
makes a list of them: each number of images needs the same.
"""

from __future__ import annotations

import pytest
import torch
from marks import thorough
from tiny_models import (
    IMAGE,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    tiny,
    tiny_llava,
)
from torch._dynamo.utils import counters

from vte_compile import StaticExit
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.dynamo.report import recording
from vte_compile.errors import InputError
from vte_compile.runtime.inductor import find_backend

STEPS = 64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """The wrappers around transformers' forward are one function for all models, with one limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many Dynamo compiled so far."""
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def serve(compiled, steps: int, **prompt) -> tuple[int, list[int]]:
    """One request, greedily: the exit layer and the tokens."""
    output = compiled(**prompt, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    exit_layer = int(exit_layers(cache))
    tokens = [output.logits[:, -1:].argmax(-1)]
    for _ in range(steps):
        output = compiled(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    return exit_layer, torch.cat(tokens, 1)[0].tolist()


@pytest.mark.slow
def test_llava_serves_without_new_graphs():
    exits = plan(gate(0, 0.3), gate(1, 0.2), StaticExit(2))
    compiled = torch.compile(tiny_llava(3), backend="vte", options={"plan": exits, "compile": False})

    def prompt(layout: str, seed: int = 0):
        ids, pixels, _ = image_prompt(layout, seed=seed)
        return {"input_ids": ids, "pixel_values": pixels}

    for layout, steps in (("titt", 2), ("ttittttt", 0), ("ttttt", 0)):
        serve(compiled, steps, **prompt(layout))
    before, seen = graphs(), set()
    # Two to twelve tokens before the image, one to ten behind it; every fifth prompt is text alone.
    layouts = ["t" * (2 + 7 * i % 11) + "i" + "t" * (1 + 3 * i % 10) for i in range(20)]
    layouts[4::5] = ["t" * n for n in (5, 9, 14, 21)]
    for seed, layout in enumerate(layouts):
        exit_layer, _ = serve(compiled, STEPS, **prompt(layout, seed))
        assert (exit_layer == -1) == ("i" not in layout)
        seen.add(exit_layer)
        assert graphs() == before, f"prompt {seed}, {layout}, was compiled anew"
    assert len(set(map(len, layouts))) >= 10
    assert seen == {-1, 0, 1, 2}


@pytest.mark.slow
def test_compiled_decoder_serves_without_new_pieces():
    """A language model alone, whose prompts hold the placeholder: one graph of Dynamo's for each phase."""
    if not find_backend(torch.device("cpu"), None):
        pytest.skip("needs a C++ compiler")
    options = {"plan": plan(gate(0, 0.3), StaticExit(1)), "compile": True, "visual_token_ids": [IMAGE]}
    compiled = torch.compile(tiny(num_hidden_layers=3), backend="vte", options=options)

    def prompt(layout: str, seed: int = 0):
        ids, _, _ = image_prompt(layout, seed=seed)
        return {"input_ids": ids}

    with recording() as compiled_graphs:
        for layout, steps in (("titt", 2), ("ttittttt", 0)):
            serve(compiled, steps, **prompt(layout))
    (compiler,) = {graph.runner.compiler for graph in compiled_graphs}
    before, pieces, seen = graphs(), compiler.compilations, set()
    for seed, layout in enumerate(["tttitt", "tititittt", "ttttt", "itttttttt", "ittittttt", "ttttitttt"]):
        exit_layer, _ = serve(compiled, 8, **prompt(layout, seed))
        seen.add(exit_layer)
        assert (graphs(), compiler.compilations) == (before, pieces), f"prompt {seed}, {layout}, was compiled anew"
    assert seen == {-1, 0, 1}


@pytest.mark.parametrize(("marked", "traced"), [(True, [1, 1]), (False, [1, 2])])
def test_prompts_whose_length_is_marked_are_traced_once(marked, traced):
    options = {"plan": plan(StaticExit(0)), "compile": False, "visual_token_ids": [IMAGE]}
    compiled = torch.compile(tiny(num_hidden_layers=2), backend="vte", options=options)
    before, seen = graphs(), []
    for layout in ("titt", "ttittttt"):
        ids, _, _ = image_prompt(layout)
        if marked:
            torch._dynamo.mark_dynamic(ids, 1)
        exit_layer, _ = serve(compiled, 0, input_ids=ids)
        assert exit_layer == 0
        seen.append(graphs() - before)
    assert seen == traced


@pytest.mark.parametrize("cache", ["dynamic", thorough("static")])
def test_a_generation_that_dynamo_gives_up_is_an_error(cache):
    """The model's own code would attend to handles, which are NaN, or to buffers that nobody filled."""
    model = tiny(num_hidden_layers=2)
    ids, settings = torch.tensor([[5, 6, 7, 8]]), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **settings).tolist()
    own = model.forward
    model.forward = torch.compile(own, backend="vte", options={"compile": False})
    with torch._dynamo.config.patch(recompile_limit=1):  # one graph, for the prompt
        for _ in range(2):
            with pytest.raises(InputError, match="recompile_limit"):
                model.generate(ids, **settings, cache_implementation=cache)
    # What was never compiled is as it was, also when tracing is over.
    model.forward = own
    assert model.generate(ids, **settings, cache_implementation=cache).tolist() == want
    torch._dynamo.reset()
    model.forward = torch.compile(own, backend="vte", options={"compile": False})
    assert model.generate(ids, **settings, cache_implementation=cache).tolist() == want


def test_exit_layers_of_another_cache():
    """As of a model that Dynamo stopped compiling (recompile_limit), and runs as it is."""
    cache = tiny(num_hidden_layers=1)(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with pytest.raises(InputError, match="that the uncompiled model filled"):
        exit_layers(cache)
