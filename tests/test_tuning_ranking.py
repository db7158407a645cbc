"""Ranking of skips: what it measures is what the oracle gives, its choice is greedy, and it goes on where it was."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LAYERS, image_prompt, one_thread, optimized, shared_model, tiny_llava  # noqa: F401

import vte_compile
from vte_compile import Plan, SkippedAttention, optimize, search_skips
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.oracle import Oracle, embed
from vte_compile.tuning import deletions, ranking_work
from vte_compile.tuning.deletions import Deleter
from vte_compile.tuning.ranking import DeletionEffect, rank_skips
from vte_compile.tuning.samples import Sample


def sample(layout="tittt", answer=(7, 3, 11, 5), seed=0):
    """A sample of the tiny LLaVA; i is an image."""
    ids, pixels, mask = image_prompt(layout, seed=seed)
    return Sample.of({"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}, answer, f"sample {seed}")


def some_samples(count=3, answer=(7, 3, 11, 5)):
    layouts = itertools.cycle(["tittt", "titittt", "ittttt"])
    return [sample(next(layouts), answer, seed) for seed in range(count)]


def by_oracle(model, given, skips):
    """Mean cross entropy and argmax of the answer, with these attentions skipped."""
    answer = torch.tensor(given.answer)
    ids = torch.cat([given.inputs["input_ids"], answer[None, :-1]], 1)
    plan = Plan(skips=[SkippedAttention(layer) for layer in skips])
    logits = Oracle(model, plan).forward(*embed(model, ids, given.inputs["pixel_values"])).logits[0, -len(answer) :]
    return F.cross_entropy(logits, answer), logits.argmax(-1)


@pytest.mark.parametrize("tokens_at_once", [4096, 1], ids=["all-branches", "one-branch"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_round_is_what_the_oracle_gives(attention, tokens_at_once, monkeypatch):
    monkeypatch.setattr(deletions, "_BRANCH_TOKENS", tokens_at_once)
    model = tiny_llava(attn_implementation=attention)
    given = some_samples()
    found = rank_skips(model, given, skips=2, progress=False)
    full = [by_oracle(model, each, ()) for each in given]
    assert found.loss == pytest.approx(float(sum(loss for loss, _ in full)) / 3, rel=1e-5)
    assert [len(effects) for effects in found.rounds] == [LAYERS, LAYERS - 1]
    for number, effects in enumerate(found.rounds):
        for effect in effects:
            deleted = {*found.chosen[:number], effect.layer}
            measured = [by_oracle(model, each, deleted) for each in given]
            loss = sum(float(loss) for loss, _ in measured) / 3
            same = [
                (argmax == reference).double().mean()
                for (_, argmax), (_, reference) in zip(measured, full, strict=True)
            ]
            assert effect.loss_increase == pytest.approx(loss - found.loss, abs=2e-5)
            assert effect.changed_positions == pytest.approx(1 - float(sum(same)) / 3, abs=1e-6)
            assert effect.changed_answers == sum(bool(share < 1) for share in same) / 3
        assert found.chosen[number] == min(effects, key=lambda effect: effect.loss_increase).layer
    assert max(effect.changed_answers for effect in found.rounds[0]) > 0
    assert {skip.layer for skip in found.plan.skips} == set(found.chosen)


def test_an_attention_that_does_nothing_changes_nothing():
    model = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.o_proj.weight.zero_()
    effect = rank_skips(model, some_samples(), skips=1, progress=False).rounds[0][2]
    assert effect == DeletionEffect(2, pytest.approx(0, abs=1e-6), 0, 0)


def test_without_labels_changed_answers_are_changed_greedy_answers():
    model = shared_model("llava")
    given = some_samples(4, None)
    found = rank_skips(model, given, skips=1, max_new_tokens=5, progress=False)
    prompts = [embed(model, each.inputs["input_ids"], each.inputs["pixel_values"]) for each in given]
    full = Oracle(model, Plan())
    for effect in found.rounds[0]:
        skipping = Oracle(model, Plan(skips=[SkippedAttention(effect.layer)]))
        tokens = [[m.generate(*each, max_new_tokens=5).tokens for each in prompts] for m in (full, skipping)]
        assert effect.changed_answers == sum(a != b for a, b in zip(*tokens, strict=True)) / 4


def test_the_plan_runs(tmp_path):
    model = shared_model("llava")
    plan = vte_compile.search_skips(model, some_samples(), skips=2, work=tmp_path, progress=False)
    plan.check(model)
    ids, pixels, mask = image_prompt("tittt")
    fast = optimize(optimized("llava"), plan)
    answer = fast.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, do_sample=False, max_new_tokens=3)
    given = embed(model, ids, pixels)
    assert answer[0, ids.shape[1] :].tolist() == Oracle(model, plan).generate(*given, max_new_tokens=3).tokens[0]
    table = json.loads((tmp_path / "vte_ranking.json").read_text())
    assert [len(effects) for effects in table["rounds"]] == [LAYERS, LAYERS - 1]
    assert sorted(table["chosen"]) == [skip.layer for skip in plan.skips]
    assert set(table["rounds"][0][0]) == {"layer", "loss_increase", "changed_positions", "changed_answers"}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("answer", [(7, 3), None], ids=["labels", "own-answers"])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch, answer):
    model, given = shared_model("llava"), some_samples(3, answer)
    expected = rank_skips(model, given, skips=2, max_new_tokens=4, progress=False)
    effects, calls = Deleter.effects, []

    def counted(self, *arguments, **options):
        if len(calls) == 4:
            raise Interrupted
        calls.append(arguments)
        return effects(self, *arguments, **options)

    monkeypatch.setattr(Deleter, "effects", counted)
    with pytest.raises(Interrupted):
        rank_skips(model, given, skips=2, work=tmp_path, max_new_tokens=4, progress=False)
    calls[:] = [None] * 5  # further calls are fine; they are counted
    if answer is None:  # the answers are known too
        monkeypatch.setattr("vte_compile.tuning.ranking.own_answer", None)
    found = rank_skips(model, given, skips=2, work=tmp_path, max_new_tokens=4, progress=False)
    assert found == expected
    assert len(calls) == 5 + 2
    # One more skip takes one more round, of the same samples.
    more = rank_skips(model, given, skips=3, work=tmp_path, max_new_tokens=4, progress=False)
    assert len(calls) == 5 + 2 + 3
    assert more.rounds[:2] == expected.rounds


def test_a_killed_run_loses_little(tmp_path, monkeypatch):
    monkeypatch.setattr(ranking_work, "_FLUSH_AFTER", 0.0)
    files = []

    def noted(file, data):
        files.append(json.loads(data))

    monkeypatch.setattr(ranking_work, "write_atomically", noted)
    rank_skips(shared_model("llava"), some_samples(), skips=1, work=tmp_path, progress=False)
    assert [sum(map(len, content["measured"].values())) for content in files] == [0, 1, 2, 3, 3]


def test_losses_that_are_not_finite_rank_last(tmp_path):
    model = tiny_llava()
    effects = Deleter.effects

    def overflowing(self, *arguments, **options):
        losses, changed, full = effects(self, *arguments, **options)
        return losses.index_fill(0, torch.tensor([0]), math.inf), changed, full

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Deleter, "effects", overflowing)
        found = rank_skips(model, some_samples(), skips=1, work=tmp_path, progress=False)
    assert rank_skips(model, some_samples(), skips=1, work=tmp_path, progress=False) == found
    assert found.rounds[0][0].loss_increase == math.inf
    assert found.chosen != (0,)
    assert found.as_json()["rounds"][0][0]["loss_increase"] is None


def test_nan_of_the_model_is_an_error():
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises((InputError, UnsupportedModelError)):
        rank_skips(model, some_samples(), skips=1, progress=False)


def test_bad_input(tmp_path):
    model = shared_model("llava")
    for skips in (0, LAYERS + 1):
        with pytest.raises(InputError, match=f"skips: expected 1 to {LAYERS}"):
            search_skips(model, some_samples(), skips=skips, progress=False)
    with pytest.raises(InputError, match="method"):
        search_skips(model, some_samples(), skips=1, method="magic")
    with pytest.raises(InputError, match="there are none"):
        search_skips(model, [], skips=1, progress=False)
    with pytest.raises(InputError, match=r"sample 0: answer tokens \[99\].*saved in"):
        search_skips(model, [sample(answer=(99,))], skips=1, work=tmp_path, progress=False)
    with pytest.raises(InputError, match="optimized"):
        search_skips(optimized("llava"), some_samples(), skips=1)


def test_a_folder_that_does_not_fit(tmp_path):
    model = shared_model("llava")
    rank_skips(model, some_samples(1), skips=1, work=tmp_path, progress=False)
    file = tmp_path / ranking_work.FILE_NAME
    content = json.loads(file.read_text())

    other = tiny_llava()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(InputError, match="another model"):
        rank_skips(other, some_samples(1), skips=1, work=tmp_path, progress=False)
    (key,) = content["measured"][""]
    damaged = [
        "{",
        "[]",
        json.dumps(content | {"schema_version": 2}),
        json.dumps(content | {"measured": {"": {key: {"loss": [1.0], "changed": [0.0], "full": 1.0}}}}),
        json.dumps(content | {"measured": {"1,2": content["measured"][""]}}),
        json.dumps(content | {"answers": {"a": ["b"]}}),
    ]
    for text in damaged:
        file.write_text(text)
        with pytest.raises(InputError, match=r"damaged|schema_version is 2"):
            rank_skips(model, some_samples(1), skips=1, work=tmp_path, progress=False)
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(InputError, match="cannot be"):
        rank_skips(model, some_samples(1), skips=1, work=taken, progress=False)
