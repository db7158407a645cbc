"""Decode steps as CUDA graphs: with a stand-in that records a step and runs it again, against the oracle.

What a stand-in cannot show, a real recording, is for test_on_a_gpu.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import (
    assert_relative,
    chunk,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    shared_model,
    tiny,
)

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.errors import InputError
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.runtime import decode_graphs, fused_steps, growing

EXITS = plan(StaticExit(0))
ROWS = ("ttvvvvttt", "..ttttttt")


@pytest.fixture(scope="module")
def model():
    """Heads of a size that there are kernels for; the second layer has a window, and scores are capped."""
    types = ["full_attention", "sliding_attention"]
    model = tiny("gemma2", num_hidden_layers=2, head_dim=64, layer_types=types)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def whole(model):
    """With fused attentions and graphs, on a CPU too."""
    fast = optimize(model, Plan(), compile=False)
    fast._vte_runner.fuse_attention = fast._vte_runner.cuda_graphs = True
    return fast


@pytest.fixture
def fast(whole):
    """The same with graphs of its own."""
    return optimize(whole, EXITS)


class Recorder:
    """In the place of CUDA graphs: what is replayed is the step, which is only told what was recorded."""

    def __init__(self):
        self.records = self.replays = 0

    def __call__(self, step, device):
        self.records += 1

        def replay():
            self.replays += 1
            return self.replay(step)

        return replay

    def replay(self, step):
        return step()


@pytest.fixture
def recorder(monkeypatch):
    return use(Recorder(), monkeypatch)


def use(recorder, monkeypatch):
    monkeypatch.setattr(decode_graphs, "cuda_graph", recorder)
    return recorder


class Chat:
    """A prompt, and decode steps, each compared with the oracle's."""

    def __init__(self, fast, model, rows=ROWS):
        self.fast, self.oracle, self.steps = fast, Oracle(model, fast.plan), 0
        embeds, visual, self.mask = chunk(*rows)
        out = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=self.mask.long(), logits_to_keep=1)
        self.cache, self.want = cache_of(out), self.oracle.forward(embeds, visual, self.mask)

    def step(self, count=1):
        for _ in range(count):
            self.steps += 1
            embeds, visual, real = chunk(*["t"] * len(self.mask), seed=self.steps)
            self.mask = torch.cat([self.mask, real], 1)
            given = {"attention_mask": self.mask.long(), CACHE: self.cache}
            out = self.fast(inputs_embeds=embeds, visual_mask=visual, **given)
            self.want = self.oracle.forward(embeds, visual, cache=self.want.cache)
            assert_relative(out.logits, self.want.logits, 1e-4)
        assert self.cache.lengths.T.tolist() == self.want.cache.lengths()
        for b, row in enumerate(self.want.cache.rows):
            for ours, theirs in zip(self.cache.row(b), row.layers, strict=True):
                assert_relative(ours[0], theirs[0], 1e-4)
                assert_relative(ours[1], theirs[1], 1e-4)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "one row"])
def test_replays_are_the_oracles_steps(fast, model, rows, recorder):
    """One step as it is, one recorded, whose replay is compared, one more that is, and then replays alone."""
    chat = Chat(fast, model, rows)
    chat.step(1)
    assert (recorder.records, recorder.replays) == (0, 0)
    chat.step(1)
    assert (recorder.records, recorder.replays) == (1, 1)
    chat.step(4)
    assert (recorder.records, recorder.replays) == (1, 5)


def test_by_the_kernels(fast, model, recorder, monkeypatch):
    """Interpreted: the ends of rows are read from a tensor."""
    launch = pytest.importorskip("vte_compile.kernels.triton_decode_attention").launch
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is not on where there is a GPU: test_on_a_gpu runs the kernels there")
    monkeypatch.setattr(fused_steps, "decode_attention", launch)
    Chat(fast, model).step(4)
    assert recorder.records == 1


def test_a_buffer_that_grew_is_recorded_anew(fast, model, recorder, monkeypatch):
    monkeypatch.setattr(growing, "_MIN_ROOM", 4)
    monkeypatch.setattr(growing, "_ROOM_PART", 1000)
    Chat(fast, model).step(12)
    assert recorder.records == 3
    assert recorder.replays == 3 * 3  # of four steps each, the first runs as it is


def test_a_weight_that_was_replaced_is_recorded_anew(model, recorder):
    model = copy.deepcopy(model)
    fast = optimize(model, EXITS, compile=False)
    fast._vte_runner.fuse_attention = fast._vte_runner.cuda_graphs = True
    chat = Chat(fast, model)
    chat.step(4)
    norm = model.model.layers[1].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight + 1)
    chat.step(3)
    norm.weight.data.mul_(0.5)  # in place: nothing moves
    chat.step(1)
    assert recorder.records == 2


def test_a_replayed_step_is_launched_before_its_views_are_made(fast, model, recorder, monkeypatch):
    """A view of each layer's keys and values takes time in which a GPU would wait."""
    chat = Chat(fast, model)
    chat.step(4)
    order = []
    views = type(chat.cache).next_columns
    monkeypatch.setattr(type(chat.cache), "next_columns", lambda cache: order.append("views") or views(cache))
    replay = recorder.replay
    monkeypatch.setattr(recorder, "replay", lambda step: order.append("launch") or replay(step))
    chat.step(1)
    assert order == ["launch", "views"]


def test_decode_steps_do_not_look_for_visual_tokens(monkeypatch):
    """Of a step nobody asks; ids that are put on a GPU for it would be waited for."""
    model = shared_model("llava")
    fast = optimize(model, plan(StaticExit(0)), compile=False)
    ids, pixels, mask = image_prompt("titt")
    cache = cache_of(fast(input_ids=ids, pixel_values=pixels, attention_mask=mask))
    monkeypatch.delattr(torch, "isin")
    fast(input_ids=torch.full((1, 1), 7), **{CACHE: cache})
    with pytest.raises(AttributeError, match="isin"):
        fast(input_ids=torch.full((1, 2), 7), **{CACHE: cache})


def test_requests_that_take_turns_are_not_recorded(fast, model, recorder):
    first, second = Chat(fast, model), Chat(fast, model)
    for _ in range(3):
        first.step()
        second.step()
    assert recorder.records == 0
    second.step(2)
    assert recorder.records == 1


class Stale(Recorder):
    """Gives what it gave first."""

    first = None

    def replay(self, step):
        if self.first is None:
            self.first = step().clone()
        return self.first


class Reading(Recorder):
    """Writes nothing into the cache."""

    def replay(self, step):
        right = fused_steps.decode_attention
        fused_steps.decode_attention = lambda query, *rest: right(query, rest[0].clone(), rest[1].clone(), *rest[2:])
        try:
            return step()
        finally:
            fused_steps.decode_attention = right


class Failing(Recorder):
    def __call__(self, step, device):
        super().__call__(step, device)
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("kind", "reason", "replays"),
    [
        (Stale, "a replayed step differs from the step itself by", 2),
        (Reading, "a replayed step differs from the step itself by nan", 1),
        (Failing, "a step cannot be recorded: RuntimeError: operation not permitted when", 0),
    ],
)
def test_wrong_graphs_are_not_used(fast, model, kind, reason, replays, monkeypatch, caplog):
    """Steps and cache are right all the same."""
    recorder = use(kind(), monkeypatch)
    Chat(fast, model).step(5)
    assert f"decode steps run without CUDA graphs: {reason}" in caplog.text
    assert (recorder.records, recorder.replays) == (1, replays)
    Chat(fast, model).step(3)
    assert recorder.records == 1


def test_generate(fast, recorder):
    """Beams move rows at each step: they run as they are. Outside of inference mode, and in it."""
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    plain = optimize(fast, EXITS)
    plain._vte_runner.cuda_graphs = False
    for options, records in (({}, 1), ({"num_beams": 2}, 0)):
        options |= {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0}
        before = recorder.records
        assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))
        assert recorder.records == before + records
    chat_cache = cache_of(fast(ids))
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            fast(torch.full((2, 1), 7), **{CACHE: chat_cache})


def test_the_switch(fast, model, caplog):
    runner = fast._vte_runner
    program = runner.program("decode", batched=True)
    assert runner.decode_graphs(program) is runner.decode_graphs(program) is not None
    assert pickle.loads(pickle.dumps(runner)).cuda_graphs
    off = optimize(model, EXITS, compile=False, cuda_graphs=False)
    assert off._vte_runner.decode_graphs(program) is None
    assert optimize(off, Plan())._vte_runner.cuda_graphs is False
    with pytest.raises(InputError, match="cuda_graphs: a new plan cannot change that"):
        optimize(off, Plan(), cuda_graphs=True)
    with pytest.raises(InputError, match="cuda_graphs=True: its engines are not known to be recordable"):
        optimize(model, EXITS, backend="tensorrt", cuda_graphs=True)
    runner.cuda_graphs = None  # by the device, which is a CPU
    assert (runner.decode_graphs(program) is None) == (not torch.cuda.is_available())
    runner.cuda_graphs, runner.fuse_attention = True, False
    unfused = optimize(fast, EXITS)._vte_runner
    assert unfused.decode_graphs(unfused.program("decode", batched=True)) is None
    assert "decode steps run without CUDA graphs: their attention is not fused." in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(model, compile, caplog):
    """Real graphs, in half precision, over a buffer that grows: tokens as without them, and no warning."""
    model = copy.deepcopy(model).cuda().half()
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0)).cuda()
    options = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": 0}
    fast = optimize(model, EXITS, compile=compile)
    plain = optimize(model, EXITS, compile=compile, cuda_graphs=False)
    assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))
    [graphs] = fast._vte_runner._decode_graphs.values()
    assert graphs._recorded is not None
    assert not graphs._recorded.checks
    assert "CUDA graphs" not in caplog.text
