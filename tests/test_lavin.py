"""LaVIN: checkpoints in the authors' layout against their code's numbers, and optimize() of them against the oracle.

data/lavin.npz holds what the authors' code (luogen1996/LaVIN; for "eas.features", LaVIN-EAS of DoubtedSteam/EAS; run
aside on a CPU in float32, its calls of half() taken out) gives for the weights of tests/tiny_lavin.py: visual tokens of
two images, one by one ("features") and together ("features_batch"); for the prompts of `GOLDEN`, router weights, and
logits of the prompt and behind each of the tokens `NEXT`, in one go ("prefill") and step by step ("decode"); of
LaVIN-EAS, step by step ("eas.image.decode"), with the pooled vectors of the prompt, as after their folding, where their
unfolded code takes those of each new token. data/eas_lavin.npz holds LaVIN-EAS's decoder, in float64.
"""

from __future__ import annotations

import functools
import json
import os
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lavin import LAYERS, TOKENS, C, clip, inputs, llama, save, weights
from tiny_models import DATA, NEVER, assert_close, assert_relative, one_thread, to_float64  # noqa: F401

from vte_compile import GateExit, Oracle, Plan, StaticExit, optimize
from vte_compile.adapters import StaticRouter
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.errors import InputError, PlanError, PlanMismatchError, UnsupportedModelError
from vte_compile.families.cache_name import cache_name, cache_of
from vte_compile.families.lavin import (
    LavinForConditionalGeneration,
    lavin_plan,
    load_lavin,
    load_meta_llama,
    read_lavin_checkpoint,
)
from vte_compile.oracle import embed
from vte_compile.oracle.blocks import PromptStatistics, planned_blocks

SKIP = [1]
PROMPTS = ("tittt", "ttttittttt")
GREEDY: dict[str, Any] = dict(do_sample=False, max_new_tokens=16, min_new_tokens=16)


@functools.cache
def loaded(eas: bool = False) -> tuple[Any, Any]:
    """A model and its checkpoint, which no test may change."""
    checkpoint = read_lavin_checkpoint(save(Path(mkdtemp()) / "checkpoint-19.pth", weights(eas)))
    return load_lavin(llama(), clip(), checkpoint), checkpoint


@functools.cache
def adapters(eas: bool = False) -> Plan:
    return lavin_plan(*loaded(eas), skip=SKIP if eas else ())


@functools.cache
def traced(eas: bool = False) -> Any:
    """What is traced is shared by all plans."""
    return optimize(loaded(eas)[0], Plan(), compile=False)


def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**given).logits
    return output


# ---------------------------------------------------------------- the authors' numbers


GOLDEN = {"image": "ttitttt", "text": "tttttt"}
NEXT = torch.tensor([[5, 17, 33, 2]])


@functools.cache
def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def test_visual_tokens_are_the_authors() -> None:
    given = inputs("i", "i")["pixel_values"]
    for eas, name in ((False, "features"), (True, "eas.features")):
        with torch.no_grad():
            features = loaded(eas)[0].model.image_features(given)
        assert_relative(features, golden("lavin")[name])
    # LaVIN's code routes all images of a batch by the first of them; here each is as if it were alone.
    together, alone = golden("lavin")["features_batch"], golden("lavin")["features"]
    assert_relative(together[0], alone[0])
    assert float((together[1] - alone[1]).abs().max()) > 0.1


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.shows("images", "lavin")
def test_logits_are_the_authors(name: str) -> None:
    model, checkpoint = loaded()
    plan = lavin_plan(model, checkpoint, image=name == "image")
    routers: list[Any] = [kept.adapter.router for kept in plan.adapters]
    assert_close(torch.tensor([router.weights for router in routers]), golden("lavin")[f"{name}.weights"])
    fast, given = optimize(traced(), plan), inputs(GOLDEN[name])
    length = given["input_ids"].shape[1]
    for key, shift in (("prefill", 0), ("decode", -1)):
        expected = golden("lavin")[f"{name}.{key}"]
        with torch.no_grad():
            output = fast(**given, use_cache=True)
            steps = [output.logits[:, -1]]
            for step, token in enumerate(NEXT.split(1, dim=1)):
                # Their decode gives the first new token the position of the prompt's last, unlike their training.
                positions = torch.tensor([[length + step + shift]])
                output = fast(input_ids=token, position_ids=positions, **{cache_name(fast): cache_of(output)})
                steps.append(output.logits[:, -1])
        assert_relative(torch.cat(steps), expected)
    assert float((golden("lavin")[f"{name}.decode"] - golden("lavin")[f"{name}.prefill"]).abs().max()) > 1e-3


def write_meta_llama(folder: Path, weights: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """Meta's files; norms are in each, matrices are cut."""
    layers, size = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers")), 64
    folder.mkdir()
    params = {"dim": size, "n_layers": layers, "n_heads": 4, "norm_eps": 1e-5, "multiple_of": 32, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(shards):
        part = {}
        for key, tensor in weights.items():
            by_inputs = any(name in key for name in ("wo.", "w2.", "tok_embeddings"))
            cut = tensor if tensor.ndim == 1 else tensor.tensor_split(shards, 1 if by_inputs else 0)[i]
            part[key] = cut.clone()
        torch.save({**part, "rope.freqs": torch.zeros(8)}, folder / f"consolidated.{i:02}.pth")
    return folder


def test_meta_llama_and_eas_blocks_are_the_authors(tmp_path: Path) -> None:
    """Each block of LaVIN-EAS's decoder for itself: its modality token is in the pool's mean, so it is given here."""
    data = golden("eas_lavin")
    own = {key[2:]: tensor.double() for key, tensor in data.items() if key.startswith("w.")}
    base = {key: tensor for key, tensor in own.items() if "adapter" not in key}
    model: Any = load_meta_llama(write_meta_llama(tmp_path / "7B", base))
    assert model.dtype == torch.float64
    model = to_float64(model)
    plan = Plan.from_eas_checkpoint(own, data["skip_layers"].tolist())
    rotation = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(1, 15)[None])
    whole = data["h_prefill"].double()
    prompt = torch.ones(1, 15, dtype=torch.bool)
    for layer, block in enumerate(planned_blocks(model.model.layers, plan)):
        with torch.no_grad():
            known = block.statistics(whole, prompt)
            assert known is not None
            routed = block.statistics(whole[:, 1:], prompt[:, 1:])
            assert routed is not None
            known = PromptStatistics(routed.weights, known.pooled)
            mask = torch.full((14, 14), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            output, _ = block(whole[:, 1:], known, position_embeddings=rotation, attention_mask=mask)
        whole = data["block_out_prefill.f64"][layer]
        assert_close(known.weights, data["cache_weights.f64"][layer], 1e-10)
        assert_close(output, whole[:, 1:], 1e-10)


def test_lavin_eas_is_the_authors(tmp_path: Path) -> None:
    """The whole decoder, with the modality token as companion token: 1e-10 of what the authors' code gives."""
    data = golden("eas_lavin")
    own = {key[2:]: tensor.double() for key, tensor in data.items() if key.startswith("w.")}
    base = {key: tensor for key, tensor in own.items() if "adapter" not in key}
    model = to_float64(load_meta_llama(write_meta_llama(tmp_path / "7B", base, shards=1)))
    prompt = data["h_prefill"].double()
    plan = replace(Plan.from_eas_checkpoint(own, data["skip_layers"].tolist()), companion=prompt[0, 0])
    output = Oracle(model, plan).forward(prompt[:, 1:])
    assert_close(output.logits[:, -1], data["logits.f64"][0], 1e-10)
    known = output.cache.rows[0].statistics
    assert_close(torch.stack([known[layer].weights for layer in range(4)]), data["cache_weights.f64"], 1e-10)
    pooled: list[Any] = [known[layer].pooled for layer in data["skip_layers"].tolist()]
    assert_close(torch.stack(pooled).flatten(), data["cache_x_prefill.f64"].flatten(), 1e-10)
    fast = optimize(model, plan, compile=False)
    assert_close(logits(fast, {"inputs_embeds": prompt[:, 1:]})[:, -1], data["logits.f64"][0], 1e-10)
    without = logits(optimize(fast, replace(plan, companion=None)), {"inputs_embeds": prompt[:, 1:]})[:, -1]
    assert float((without - data["logits.f64"][0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.shows("skips", "lavin")
def test_lavin_eas_of_a_checkpoint_is_the_authors(name: str) -> None:
    """Image, prompt and decode steps, through optimize()."""
    model, checkpoint = loaded(eas=True)
    plan = lavin_plan(model, checkpoint, skip=SKIP, image=name == "image")
    fast, given = optimize(traced(eas=True), plan), inputs(GOLDEN[name])
    expected, length = golden("lavin")[f"eas.{name}.decode"], given["input_ids"].shape[1]
    with torch.no_grad():
        output = fast(**given, use_cache=True)
        steps = [output.logits[:, -1]]
        for step, token in enumerate(NEXT.split(1, dim=1)):
            positions = torch.tensor([[length + step - 1]])  # as in their decode
            output = fast(input_ids=token, position_ids=positions, **{cache_name(fast): cache_of(output)})
            steps.append(output.logits[:, -1])
    assert_relative(torch.cat(steps), expected)


def test_what_is_no_llama_of_metas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"params.json: expected Meta's n_layers"):
        load_meta_llama(tmp_path)
    own = {key[2:]: tensor for key, tensor in golden("eas_lavin").items() if key.startswith("w.") and "ada" not in key}
    for number, (change, message) in enumerate(
        (
            ({"extra.weight": torch.zeros(2)}, "extra.weight: nothing that a LLaMA has"),
            ({"norm.weight": torch.zeros(2)}, "not those of a LLaMA with 4 layers"),
            ({"layers.1.attention.wq.weight": torch.zeros(2, 3)}, "not those of a LLaMA with 4 layers"),
        )
    ):
        folder = write_meta_llama(tmp_path / str(number), {**own, **change}, shards=1)
        with pytest.raises(InputError, match=message):
            load_meta_llama(folder)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(InputError, match=r"no consolidated\.00\.pth"):
        load_meta_llama(folder)


# ---------------------------------------------------------------- optimize() and the oracle


def gate(layer: int, threshold: float) -> GateExit:
    """A random gate of width 5."""
    generator = torch.Generator().manual_seed(layer)
    w1, w2 = torch.randn(5, 2 * C, generator=generator) * 0.2, torch.randn(2, 5, generator=generator)
    return GateExit(layer, w1, w2, threshold)


EXITS: dict[str, tuple[int, list[GateExit | StaticExit]]] = {
    "never": (-1, [gate(0, NEVER)]),
    "first": (0, [StaticExit(0)]),
    "middle": (1, [StaticExit(1)]),
    "last": (LAYERS - 1, [StaticExit(LAYERS - 1)]),
}


@pytest.mark.parametrize(("eas", "exits"), [(False, "never"), (False, "first"), (True, "middle"), (True, "last")])
@pytest.mark.shows("exits", "lavin")
@pytest.mark.shows("generate", "lavin")
@pytest.mark.shows("skips", "lavin")
def test_optimized_model_gives_the_oracles_numbers_and_tokens(eas: bool, exits: str) -> None:
    layer, candidates = EXITS[exits]
    model = loaded()[0]  # the visual tokens of LaVIN-EAS would be others, but as many
    plan = replace(adapters(eas), exits=candidates)
    given = inputs(*PROMPTS)
    fast, oracle = optimize(traced(), plan), Oracle(model, plan)
    embeds, visual = embed(model, given["input_ids"], given["pixel_values"])
    assert visual.sum(1).tolist() == [TOKENS, TOKENS]
    expected = oracle.forward(embeds, visual, given["attention_mask"])
    assert expected.exit_layer.tolist() == [layer, layer]
    last = logits(fast, given)[:, -1]
    assert_close(last, expected.logits[:, -1], 1e-4)
    assert float((last - logits(model, given)[:, -1]).abs().max()) > 0.1  # the plan's adapters matter
    tokens = fast.generate(**given, **GREEDY)
    assert tokens.exit_layer.tolist() == [layer, layer]
    answers = oracle.generate(embeds, visual, given["attention_mask"], max_new_tokens=16)
    assert tokens[:, given["input_ids"].shape[1] :].tolist() == answers.tokens


def with_exit(layer: int) -> Plan:
    return Plan(exits=[StaticExit(layer)], adapters=adapters().adapters)


@pytest.mark.shows("second turn", "lavin")
def test_second_turn() -> None:
    """Of text, and one with an image of its own, whose tokens leave, too."""
    model, plan = loaded()[0], with_exit(1)
    fast, oracle = optimize(traced(), plan), Oracle(model, plan)
    cache, known = {}, None
    for row, layer in (("ttitt", 1), ("ttt", -1), ("titt", 1)):
        given = inputs(row)
        with torch.no_grad():
            out = fast(**given, **cache)
        want = oracle.forward(*embed(model, given["input_ids"], given.get("pixel_values")), cache=known)
        assert out.exit_layer.tolist() == want.exit_layer.tolist() == [layer]
        assert_close(out.logits, want.logits, 1e-4)
        cache, known = {cache_name(fast): cache_of(out)}, want.cache


@pytest.mark.thorough
@pytest.mark.shows('backend="vte"', "lavin")
def test_backend() -> None:
    """The same through torch.compile(backend="vte"), with LaVIN's adapters."""
    torch._dynamo.reset()
    model, plan = load_lavin(llama(), clip(), loaded()[1]), with_exit(1)
    given = inputs(*PROMPTS)
    embeds, visual = embed(model, given["input_ids"], given["pixel_values"])
    want = Oracle(model, plan).generate(embeds, visual, given["attention_mask"], max_new_tokens=6)
    model.forward = torch.compile(model.forward, backend="vte", options={"plan": plan, "compile": False})
    out = model.generate(**given, do_sample=False, max_new_tokens=6, eos_token_id=-1, return_dict_in_generate=True)
    assert out.sequences[:, -6:].tolist() == want.tokens
    assert exit_layers(cache_of(out)).tolist() == [1, 1]
    torch._dynamo.reset()


def test_text_only_and_rows_of_both_kinds() -> None:
    """What is visual is the oracle's business; which plan fits which prompt is the caller's."""
    model, checkpoint = loaded()
    plan = lavin_plan(model, checkpoint, image=False)
    fast, oracle = optimize(traced(), plan), Oracle(model, plan)
    for rows in (("tttt", "tttttt"), ("tttt", "ttit")):
        given = inputs(*rows)
        embeds, visual = embed(model, given["input_ids"], given.get("pixel_values"))
        expected = oracle.forward(embeds, visual, given["attention_mask"]).logits
        assert_close(logits(fast, given)[:, -1], expected[:, -1], 1e-4)


# ---------------------------------------------------------------- plans and files


def test_plans_have_the_routers_of_the_modality_token() -> None:
    model, checkpoint = loaded()
    plans = [lavin_plan(model, checkpoint, image=image) for image in (False, True)]
    assert [kept.layer for kept in plans[0].adapters] == list(range(LAYERS))
    for row, plan in enumerate(plans):
        first = plan.adapters[0].adapter.router
        assert isinstance(first, StaticRouter)
        w, eps = checkpoint.state_dict, 1e-6
        token, router = w["adapter_modality_embedding.weight"][row], "layers.0.adapter_attn.expert_weights."
        norm = model.model.language_model.layers[0].input_layernorm.weight.detach()
        normed = norm * token * torch.rsqrt(token.pow(2).mean() + eps)
        answer = w[f"{router}weight"] @ normed + w[f"{router}bias"]
        assert_close(torch.tensor(first.weights), torch.softmax(answer / 10, -1))
    assert plans[0].adapters[0].adapter.router != plans[1].adapters[0].adapter.router
    with pytest.raises(InputError, match="of LaVIN-EAS: pass skip"):
        lavin_plan(*loaded(eas=True))
    with pytest.raises(InputError, match="of LaVIN, which skips no attention: leave skip out"):
        lavin_plan(*loaded(), skip=SKIP)


def test_settings_of_the_file_count(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pth", weights(), args=Namespace(adapter_scale=0.5, temperature=5.0))
    checkpoint = read_lavin_checkpoint(path)
    assert (checkpoint.scale, checkpoint.temperature) == (0.5, 5.0)
    plan = lavin_plan(load_lavin(llama(), clip(), checkpoint), checkpoint)
    assert plan.adapters[0].adapter.scale == 0.5
    assert plan.adapters[0].adapter.router != adapters().adapters[0].adapter.router


def test_save_and_load(tmp_path: Path) -> None:
    model, given = loaded()[0], inputs(*PROMPTS)
    model.save_pretrained(tmp_path)
    again = LavinForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_close(logits(again, given), logits(model, given))
    assert again.config.image_token_id == model.config.image_token_id


def test_files_of_several_processes_and_folders(tmp_path: Path) -> None:
    """DistributedDataParallel's names, and LLaMA and CLIP from folders."""
    llama().save_pretrained(tmp_path / "llama")
    clip().save_pretrained(tmp_path / "clip")
    path = save(tmp_path / "c.pth", {f"module.{key}": tensor for key, tensor in weights().items()})
    model = load_lavin(tmp_path / "llama", tmp_path / "clip", path)
    given = inputs(*PROMPTS)
    assert_close(logits(model, given), logits(loaded()[0], given))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["VTE_TEST_EVIL"],)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTE_TEST_EVIL", str(tmp_path / "evil"))
    path = save(tmp_path / "c.pth", weights(), scaler=Evil())
    with suppress(InputError):  # whether the file is refused, or read without what the code would have made
        read_lavin_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_what_is_no_checkpoint_of_lavin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    with pytest.raises(InputError, match="no such file"):
        read_lavin_checkpoint(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot read it"):
        read_lavin_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="holds no 'model' of tensors"):
        read_lavin_checkpoint(path)
    block = "backbone.visual.transformer.resblocks.0."
    normal = {f"{block[:-2]}{i}.adapter_attn.conv_D.weight": None for i in range(8)}
    for change, error, message in (
        ({"extra.weight": torch.zeros(1)}, InputError, "extra.weight: nothing that LaVIN's adapters have"),
        ({f"{block}adapter_mlp.conv_A.weight": torch.zeros(1)}, UnsupportedModelError, "in front of MLPs"),
        ({"layers.0.adapter_mlp.conv_A.weight": torch.zeros(1)}, UnsupportedModelError, "in front of MLPs"),
        ({"adapter_modality_embedding.weight": None}, InputError, "lacks adapter_modality_embedding.weight"),
        (normal, UnsupportedModelError, "have no experts"),
        ({f"{block}adapter_attn.conv_A.bias": None}, InputError, r"lacks layers.0.adapter_attn.conv_A.bias"),
        ({f"{block}adapter_attn.conv_A.bias": torch.zeros(3)}, InputError, "expected shape"),
        ({f"{block[:-2]}8.adapter_attn.conv_A.bias": torch.zeros(8)}, InputError, "with this CLIP it has also"),
        ({"adapter_proj.conv_B.weight": torch.zeros(3, 16)}, InputError, "expected shape"),
    ):
        changed = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
        with pytest.raises(error, match=message):
            load_lavin(llama(), clip(), save(path, changed))
    model, first = loaded()[0], "layers.0."
    fifth = {f"layers.{LAYERS}.{key[len(first) :]}": w for key, w in weights().items() if key.startswith(first)}
    for change, problem, message in (
        ({"adapter_modality_embedding.weight": torch.zeros(2, C + 1)}, InputError, "expected shape"),
        ({"layers.0.adapter_attn.conv_A.bias": None}, PlanError, "conv_A.bias: the checkpoint lacks it"),
        (fifth, PlanMismatchError, "layer"),
    ):
        changed = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
        with pytest.raises(problem, match=message):
            lavin_plan(model, save(path, changed))
