"""Training adapters: gradients of what the oracle computes, resumption, seeds, and processes that agree."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from marks import thorough
from tiny_models import (
    LAYERS,
    C,
    image_prompt,
    one_thread,  # noqa: F401
    optimized,
    random_adapter,
    shared_model,
    tiny_llava,
)
from transformers import Trainer, TrainerCallback

from vte_compile import KeptAdapter, Plan, SkippedAttention, StaticExit, optimize, search_skips
from vte_compile.adapters import PIA, PlainAdapter, StaticRouter, apply_pia, apply_plain, pool, route
from vte_compile.errors import InputError
from vte_compile.fingerprint import Fingerprint
from vte_compile.oracle import Oracle, embed
from vte_compile.tuning import train_adapters as module
from vte_compile.tuning.adapted_model import AdaptedModel
from vte_compile.tuning.adapter_modules import AdapterModule, initial_adapter
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.samples import Sample
from vte_compile.tuning.train_adapters import TrainingSettings, search_and_train, train_adapters

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(steps=4, search_steps=8, batch=2, learning_rate=1e-2, width=4, kept_width=2, save_steps=2)


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**(SETTINGS | changes))


def some_samples(count=8, answer=(7, 3, 11, 5)):
    """Of several lengths; i is an image."""
    samples = []
    for seed, layout in zip(range(count), itertools.cycle(["tittt", "titittt", "ittttt"])):
        ids, pixels, mask = image_prompt(layout, seed=seed)
        inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
        samples.append(Sample.of(inputs, None if answer is None else answer[: 2 + seed % 3], f"sample {seed}"))
    return samples


def assert_same(actual: Plan, expected: Plan, tolerance: float = 0.0) -> None:
    for field in ("skips", "adapters"):
        ours, theirs = getattr(actual, field), getattr(expected, field)
        assert [part.layer for part in ours] == [part.layer for part in theirs]
        for one, other in zip(ours, theirs, strict=True):
            for name, projection in one.adapter.projections().items():
                for part in ("weight", "bias"):
                    expected_part = getattr(other.adapter.projections()[name], part)
                    torch.testing.assert_close(getattr(projection, part), expected_part, rtol=0, atol=tolerance)
            if not isinstance(one.adapter.router, StaticRouter):
                torch.testing.assert_close(
                    one.adapter.router.weight, other.adapter.router.weight, rtol=0, atol=tolerance
                )


def differs(one: Plan, other: Plan) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return True
    return False


# ---------------------------------------------------------------- modules and the loss


@pytest.mark.parametrize("router", [None, StaticRouter((0.3, 0.7))], ids=["prompt", "static"])
@pytest.mark.parametrize("kind", [PIA, PlainAdapter])
def test_modules_and_adapters_are_the_same(kind, router):
    adapter = random_adapter(kind, seed=3, router=router)
    made = AdapterModule(adapter)
    again = made.adapter()
    assert type(again) is kind
    assert (again.scale, again.groups, repr(again)) == (adapter.scale, adapter.groups, repr(adapter))
    for name, projection in adapter.projections().items():
        assert torch.equal(again.projections()[name].weight, projection.weight)
        assert torch.equal(again.projections()[name].bias, projection.bias)
    x = torch.randn(2, 5, C)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert torch.equal(route(made.router, x, mask), route(adapter.router, x, mask))
    parameters = dict(made.named_parameters())
    assert ("router.weight" in parameters) == (router is None)
    weights = route(made.router, x, mask)
    output = apply_pia(made, x, weights, pool(made, x, mask)) if kind is PIA else apply_plain(made, x, weights)
    output.square().sum().backward()
    assert all(bool(parameter.grad.abs().max() > 0) for parameter in parameters.values())


@pytest.mark.parametrize("router", ["prompt", "static"])
@pytest.mark.parametrize("kind", [PIA, PlainAdapter])
def test_initial_adapters_change_nothing_and_learn(kind, router):
    made = AdapterModule(initial_adapter(kind, C, 4, router, torch.Generator().manual_seed(0)))
    x = torch.randn(2, 5, C)

    def output():
        weights = route(made.router, x)
        return apply_pia(made, x, weights, pool(made, x)) if kind is PIA else apply_plain(made, x, weights)

    torch.testing.assert_close(output(), x)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (output() - 2 * x.roll(1, -1)).square().sum().backward()
        optimizer.step()
    assert (output() - x).abs().max() > 1e-3
    if router == "prompt":  # the experts are not the same, so that there is something to choose
        assert (made.up0.weight - made.up1.weight).abs().max() > 1e-2
        assert made.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("router", [None, StaticRouter((0.3, 0.7))], ids=["prompt", "static"])
@pytest.mark.parametrize(
    ("distill", "companion"),
    [(0.0, None), (0.4, None), (0.4, torch.linspace(-2, 2, C))],
    ids=["answers", "distill", "companion"],
)
def test_the_loss_is_the_oracles(distill, companion, router):
    """Batched and padded, it is the mean of what the oracle gives row by row, the statistics being the prompt's."""
    model = shared_model("llava")
    samples = some_samples(3)
    pias = {layer: random_adapter(PIA, layer, router=router) for layer in (1, 3)}
    plain = {layer: random_adapter(PlainAdapter, layer, router=router) for layer in (0, 1)}
    adapted = AdaptedModel(Examiner(model), pias, plain, (1,), distill, companion)
    plan = adapted.plan()
    assert (plan.companion is None) == (companion is None)
    assert [skip.layer for skip in plan.skips] == [1]
    assert [kept.layer for kept in plan.adapters] == [0]
    expected = []
    for sample in samples:
        answer = torch.tensor(sample.answer)
        prompt = embed(model, sample.inputs["input_ids"], sample.inputs["pixel_values"])
        logits = []
        for oracle in (Oracle(model, plan), Oracle(model, Plan())):
            output = oracle.forward(*prompt)
            rows = [output.logits[0, -1]]
            for token in answer[:-1]:  # token by token, as in decode
                output = oracle.forward(model.get_input_embeddings()(token[None, None]), cache=output.cache)
                rows.append(output.logits[0, -1])
            logits.append(torch.stack(rows))
        student, teacher = (F.log_softmax(each, -1) for each in logits)
        divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
        expected.append((1 - distill) * F.cross_entropy(logits[0], answer) + distill * divergence)
    loss = adapted(**adapted.collate(samples))["loss"]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=2e-5, atol=2e-5)
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    loss.backward()
    assert all(frozen)  # it is the training that freezes
    model.zero_grad(set_to_none=True)
    used = [*adapted.pias["1"].parameters(), *adapted.plain["0"].parameters()]
    assert all(parameter.grad is not None for parameter in used)
    assert adapted.plain["1"].down.weight.grad is None


# ---------------------------------------------------------------- training


def mean_loss(model, plan, samples):
    skips = {skip.layer: skip.adapter for skip in plan.skips}
    plain = {kept.layer: kept.adapter for kept in plan.adapters}
    adapted = AdaptedModel(Examiner(model), skips, plain, tuple(skips))
    with torch.no_grad():
        return float(adapted(**adapted.collate(samples))["loss"])


@pytest.mark.parametrize("router", ["prompt", "static"])
def test_training_lowers_the_loss_and_the_plan_runs(router):
    model, samples = tiny_llava(), some_samples()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = Plan(skips=[SkippedAttention(1), SkippedAttention(2)], fingerprint=Fingerprint.of(model))
    trained = train_adapters(model, samples, start, settings=settings(steps=30, router=router), progress=False)
    assert [skip.layer for skip in trained.skips] == [1, 2]
    assert [kept.layer for kept in trained.adapters] == [0, 3]
    untrained = train_adapters(
        model, samples, start, settings=settings(steps=1, router=router, learning_rate=1e-9), progress=False
    )
    assert mean_loss(model, trained, samples) < 0.8 * mean_loss(model, untrained, samples)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    fast = optimize(optimized("llava"), trained)  # the same weights
    ids, pixels, mask = image_prompt("tittt")
    answer = fast.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, do_sample=False, max_new_tokens=3)
    expected = Oracle(model, trained).generate(*embed(model, ids, pixels), max_new_tokens=3).tokens[0]
    assert answer[0, ids.shape[1] :].tolist() == expected


class Interrupted(Exception):
    pass


class InterruptingCallback(TrainerCallback):
    """Stops a run after so many steps, of all of its phases."""

    left = 0

    def on_step_end(self, args, state, control, **kwargs):
        InterruptingCallback.left -= 1
        if InterruptingCallback.left == 0:
            raise Interrupted


@pytest.fixture
def interrupted_after(monkeypatch):
    """A function that lets trainings stop after so many steps."""
    original = module.Trainer

    def with_callback(*arguments, callbacks, **options):
        return original(*arguments, callbacks=[*callbacks, InterruptingCallback()], **options)

    def after(steps):
        InterruptingCallback.left = steps

    monkeypatch.setattr(module, "Trainer", with_callback)
    yield after
    InterruptingCallback.left = 0


def test_interrupted_training_goes_on(tmp_path, interrupted_after):
    model, samples = shared_model("llava"), some_samples()
    start = Plan(skips=[SkippedAttention(1)])
    options = dict(settings=settings(steps=7), progress=False, seed=1)
    expected = train_adapters(model, samples, start, **options)
    interrupted_after(5)
    with pytest.raises(Interrupted):
        train_adapters(model, samples, start, work=tmp_path, **options)
    assert (tmp_path / "train" / "checkpoint-4").is_dir()
    interrupted_after(0)
    assert_same(train_adapters(model, samples, start, work=tmp_path, **options), expected)
    assert_same(train_adapters(model, samples, start, work=tmp_path, **options), expected)  # nothing is left to do
    # Killed while the last checkpoint was written: the one before it is there.
    (tmp_path / "train" / "checkpoint-7" / "trainer_state.json").write_text("{")
    assert_same(train_adapters(model, samples, start, work=tmp_path, **options), expected)
    assert differs(train_adapters(model, samples, start, settings=settings(steps=7), progress=False, seed=2), expected)


@pytest.mark.parametrize("steps", [thorough(5, id="in-the-search"), pytest.param(10, id="in-the-training")])
def test_an_interrupted_search_goes_on(steps, tmp_path, interrupted_after):
    model, samples = shared_model("llava"), some_samples()
    options = dict(skips=2, settings=settings(), progress=False, seed=1)
    expected = search_and_train(model, samples, **options)
    assert len(expected.skips) == 2
    interrupted_after(steps)
    with pytest.raises(Interrupted):
        search_and_train(model, samples, work=tmp_path, **options)
    interrupted_after(0)
    assert_same(search_and_train(model, samples, work=tmp_path, **options), expected)
    state = json.loads((tmp_path / "search" / "checkpoint-8" / "trainer_state.json").read_text())
    scores = state["stateful_callbacks"]["SearchCallback"]["attributes"]["redundancy"]["scores"]
    assert len(scores) == LAYERS
    assert any(scores)


def test_the_search_finds_the_attention_that_does_nothing():
    model = tiny_llava()
    with torch.no_grad():  # what deleting the others does is large
        model.model.language_model.layers[2].self_attn.o_proj.weight.zero_()
    plan = search_skips(
        model,
        some_samples(10, None),
        skips=1,
        method="redundancy",
        training=settings(search_steps=60, steps=1, learning_rate=1e-6, kept_width=None),
        max_new_tokens=4,
        progress=False,
    )
    assert [skip.layer for skip in plan.skips] == [2]
    assert plan.adapters == ()
    plan.check(model)


def test_a_full_disk(tmp_path, monkeypatch):
    save, written = Trainer._save_checkpoint, []

    def full(self, *arguments):
        if written:
            raise OSError(28, "No space left on device")
        written.append(save(self, *arguments))

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    options = dict(settings=settings(), work=tmp_path, progress=False)
    model, start = shared_model("llava"), Plan(skips=[SkippedAttention(1)])
    with pytest.raises(InputError, match=r"train: a checkpoint cannot be written.*No space left.*same folder"):
        train_adapters(model, some_samples(), start, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.undo()
    expected = train_adapters(model, some_samples(), start, **(options | {"work": None}))
    assert_same(train_adapters(model, some_samples(), start, **options), expected)


def test_a_model_in_low_precision():
    """Adapters are trained and stored in float32."""
    model = tiny_llava().to(torch.bfloat16)
    plan = train_adapters(
        model, some_samples(), Plan(skips=[SkippedAttention(1)]), settings=settings(distill=0.5), progress=False
    )
    assert plan.skips[0].adapter.down.weight.dtype == torch.float32
    plan.check(model)


def test_bad_input(tmp_path, monkeypatch):
    model, samples = shared_model("llava"), some_samples()
    start = Plan(skips=[SkippedAttention(1)])
    for bad in (Plan(), Plan(exits=[StaticExit(0)], skips=start.skips)):
        with pytest.raises(InputError, match="plan: expected one that skips"):
            train_adapters(model, samples, bad)
    with pytest.raises(InputError, match="batch: 9 has to be"):
        train_adapters(model, samples, start, settings=settings(batch=9), progress=False)
    with pytest.raises(InputError, match="2 or more"):
        search_and_train(model, samples[:1], skips=1)
    with pytest.raises(InputError, match="skips: expected 1 to"):
        search_and_train(model, samples, skips=LAYERS + 1)
    train_adapters(model, samples, start, settings=settings(), work=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"another training \(settings, seed differ\)"):
        train_adapters(model, samples, start, settings=settings(steps=5), work=tmp_path, seed=3, progress=False)
    (tmp_path / "vte_training.json").write_text("[")
    with pytest.raises(InputError, match="damaged"):
        train_adapters(model, samples, start, settings=settings(), work=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"the loss is nan, with attentions \[1\] skipped.*Checkpoints"):
        train_adapters(model, samples, start, settings=settings(learning_rate=1e30), progress=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"pip install 'vte-compile\[train\]'"):
        train_adapters(model, samples, start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"width": 3}, "width: expected an even number"),
        ({"kept_width": 0}, "kept_width"),
        ({"distill": 1.5}, "distill"),
        ({"router": "both"}, "router"),
        ({"search": "clip"}, "search"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_give_the_plan_of_one(tmp_path):
    """Search and training; only the order in which gradients are summed up differs."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, torch\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "torch.set_num_threads(1)\n"
        "from test_train_adapters import settings, shared_model, some_samples, search_and_train\n"
        "plan = search_and_train(shared_model('llava'), some_samples(10), skips=2, settings=settings(batch=4),\n"
        "                        work=sys.argv[1] + '-work', progress=False)\n"
        "plan.save_pretrained(sys.argv[1] + os.environ['RANK'])\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.Popen([*launch, str(script), str(tmp_path / "two")])
    expected = search_and_train(
        shared_model("llava"), some_samples(10), skips=2, settings=settings(batch=4), progress=False
    )
    assert two.wait(timeout=120) == 0
    plans = [Plan.from_pretrained(tmp_path / f"two{rank}") for rank in (0, 1)]
    assert_same(plans[1], plans[0])
    assert_same(plans[0], expected, tolerance=1e-4)
    assert all(isinstance(kept, KeptAdapter) for kept in plans[0].adapters)
