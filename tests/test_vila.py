"""VILA: checkpoints in the published layout against the authors' numbers, and optimize() of them against the oracle.

data/vila.npz holds what the authors' code (NVlabs/VILA, run aside with transformers 4.46.3, attention "eager", float32)
gives for the checkpoints that tests/tiny_vila.py writes: pixels, merged embeddings, logits and greedy tokens of their
LlavaLlamaModel for two prompts with two images each; for one picture through the chat template; for a video's frames.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    DATA,
    LAYERS,
    NEVER,
    assert_relative,
    gate,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
)
from tiny_vila import VARIANTS, write_vila

from vte_compile import Oracle, Plan, SkippedAttention, StaticExit, export, load_engine, optimize
from vte_compile.adapters import PIA
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.cache_name import cache_of
from vte_compile.families.tiles import grid_of_tiles, tiles
from vte_compile.families.vila import VilaConfig, VilaForConditionalGeneration, VilaProcessor
from vte_compile.loading import load_model, load_processor, prompt
from vte_compile.oracle import embed
from vte_compile.tuning.samples import read_samples

SIGLIP, TILED, TIED, CLIP, CLASS = VARIANTS
OPTIMIZED = (SIGLIP, TILED)
"""Llama and Qwen2; to the decoder it is all the same what the features of images are made of."""
EXITS = {
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "first": [gate(0, -NEVER)],
    "middle": [gate(0, NEVER), StaticExit(1)],
    "last": [StaticExit(LAYERS - 1)],
    "natural": [gate(0, 0.5), gate(1, 0.5), StaticExit(2)],
}
LAYER = {"never": -1, "first": 0, "middle": 1, "last": LAYERS - 1}
GREEDY = dict(do_sample=False, max_new_tokens=16, min_new_tokens=16)


@functools.cache
def golden() -> Any:
    return np.load(DATA / "vila.npz")


def of(name: str, key: str) -> torch.Tensor:
    """A number of the authors', for a variant."""
    return torch.from_numpy(golden()[f"{list(VARIANTS).index(name)}.{key}"])


@functools.cache
def pictures() -> list[Image.Image]:
    return [Image.fromarray(golden()[f"picture{i}"]) for i in range(3)]


@functools.cache
def folder(name: str) -> Path:
    return write_vila(Path(mkdtemp()) / "vila", **VARIANTS[name])


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    """A model and its processor, which no test may change."""
    return VilaForConditionalGeneration.from_pretrained(folder(name)), VilaProcessor.from_pretrained(folder(name))


@functools.cache
def optimized(name: str, exits: str | None = None) -> Any:
    """What is traced is shared by all exits."""
    if exits is None:
        return optimize(loaded(name)[0], Plan(), compile=False)
    return optimize(optimized(name), plan(*EXITS[exits]))


def two_rows(name: str) -> Any:
    images = [*pictures(), pictures()[0]]
    return loaded(name)[1](images, ["what is <image> this <image>", "user <image> what <image>"])


def mixed_rows(name: str) -> Any:
    """Rows with two images, none and one."""
    return loaded(name)[1](pictures(), ["what <image> <image> is this", "what is", "this <image> what is this"])


def oracle_inputs(model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    embeds, visual = embed(model, inputs["input_ids"], inputs.get("pixel_values"))
    return embeds, visual, inputs["attention_mask"]


def copied(name: str, target: Path, **changed: Any) -> Path:
    """Another checkpoint of a variant, whose config.json says something else."""
    write_vila(target, **VARIANTS[name])
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return target


# ---------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", VARIANTS)
def test_images_and_embeddings_are_the_authors(name: str) -> None:
    (model, _), inputs, mask = loaded(name), two_rows(name), of(name, "mask")
    torch.testing.assert_close(inputs["pixel_values"], of(name, "pixel_values"), rtol=1e-5, atol=1e-5)
    embeds, _ = embed(model, inputs["input_ids"], inputs["pixel_values"])
    assert inputs["attention_mask"].sum(-1).tolist() == mask.sum(-1).tolist()
    assert_relative(embeds[inputs["attention_mask"].bool()], of(name, "embeds")[mask])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.shows("images", "vila")
def test_logits_and_tokens_are_the_authors(name: str) -> None:
    (model, _), inputs = loaded(name), two_rows(name)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want, mask = of(name, "logits"), of(name, "mask")
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions).logits[inputs["attention_mask"].bool()]
    assert_relative(logits, want[mask])
    assert torch.equal(model.generate(**inputs, **GREEDY)[:, -16:], of(name, "tokens"))
    if name in OPTIMIZED:
        fast = optimized(name)
        assert_relative(fast(**inputs).logits[inputs["attention_mask"].bool()], want[mask])
        assert torch.equal(fast.generate(**inputs, **GREEDY)[:, -16:], of(name, "tokens"))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.shows("videos", "vila")
def test_chats_and_videos_are_the_authors(name: str) -> None:
    """The chat template, the tiles of a single picture, where answers stop; frames behind each other."""
    model, processor = loaded(name)
    parts = [{"type": "image", "image": pictures()[0]}, {"type": "text", "text": "what is this"}]
    messages = [{"role": "user", "content": parts}]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    torch.testing.assert_close(chat["pixel_values"], of(name, "chat_pixels"), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_relative(embed(model, **chat)[0], of(name, "chat_embeds"))
        video = processor(None, "what <vila/video> this", pictures()[:2])
        assert_relative(embed(model, **video)[0], of(name, "video_embeds"))
    assert model.generation_config.eos_token_id == of(name, "stop").tolist()
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    again = processor(pictures()[:1], text, add_special_tokens=False)
    assert all(torch.equal(again[key], chat[key]) for key in chat)


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_in_the_published_layout(name: str, tmp_path: Path) -> None:
    (model, processor), inputs = loaded(name), two_rows(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for part in ("llm", "vision_tower", "mm_projector"):
        with safe_open(tmp_path / part / "model.safetensors", "pt") as file:
            keys = set(file.keys())
        if (folder(name) / part / "model.safetensors").is_file():
            assert keys == load_file(folder(name) / part / "model.safetensors").keys()
    written, published = (json.loads((where / "config.json").read_text()) for where in (tmp_path, folder(name)))
    same = published.keys() - {"llm_cfg", "vision_tower_cfg", "mm_projector_cfg"}
    assert {key: written[key] for key in same} == {key: published[key] for key in same}
    again = VilaForConditionalGeneration.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path / "alone")
    prepared = VilaProcessor.from_pretrained(tmp_path / "alone")(
        [*pictures(), pictures()[0]],
        [
            "what is <image> this <image>",
            "user <image> what <image>",
        ],
    )
    assert all(torch.equal(prepared[key], inputs[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(again(**prepared).logits, model(**inputs).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (name == TIED)


def test_parts_in_a_folder_model(tmp_path: Path) -> None:
    """As in repositories of NVILA that have the code beside the weights; and another type of numbers."""
    write_vila(tmp_path / "model", **VARIANTS[SIGLIP])
    model = VilaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    out = model.generate(**VilaProcessor.from_pretrained(tmp_path)(pictures()[:1], "<image> what"), max_new_tokens=2)
    assert out.shape[1] > 6


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["VTE_TEST_EVIL"],)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTE_TEST_EVIL", str(tmp_path / "evil"))
    write_vila(tmp_path / "vila", **VARIANTS[CLIP])
    file = tmp_path / "vila" / "mm_projector" / "pytorch_model.bin"
    torch.save({**torch.load(file, weights_only=True), "evil": Evil()}, file)
    with pytest.raises(InputError, match="mm_projector"):
        VilaForConditionalGeneration.from_pretrained(tmp_path / "vila")
    assert not (tmp_path / "evil").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    load = VilaForConditionalGeneration.from_pretrained
    with pytest.raises(InputError, match="no such folder, and no such model on the hub"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json: there is no such file. A VILA checkpoint has"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(InputError, match=r"model_type is 'llava', which is not VILA's \(llava_llama, vila\)"):
        load(tmp_path)

    broken = copied(SIGLIP, tmp_path / "broken")
    weights = load_file(broken / "mm_projector" / "model.safetensors")
    del weights["layers.2.weight"]
    save_file(weights, broken / "mm_projector" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"mm_projector: its weights do not fit .* missing: layers\.2\.weight"):
        load(broken)
    (broken / "mm_projector" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="mm_projector"):
        load(broken)
    (broken / "mm_projector" / "config.json").unlink()
    with pytest.raises(InputError, match=r"mm_projector/config\.json: there is no such file"):
        load(broken)
    (broken / "llm" / "tokenizer.json").unlink()
    (broken / "vision_tower" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="there is no such file"):
        VilaProcessor.from_pretrained(broken)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"s2": True}, "s2: images at several scales are not supported"),
        ({"dynamic_s2": True, "ps3": True}, "dynamic_s2, ps3: images at several scales"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres': only None, resize, pad, dynamic"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls', expected patch, cls_patch"),
        ({"mm_vision_select_feature": "patch"}, "mlp_downsample wants a square of patches"),
        ({"vision_resolution": 16}, "vision_resolution is 16, the vision tower's image_size 8"),
    ],
)
def test_unsupported_checkpoints_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        VilaForConditionalGeneration.from_pretrained(copied(SIGLIP, tmp_path / "vila", **changed))


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        (
            "mm_projector",
            {"mm_projector_type": "mlp_downsample_3x3_s2"},
            "mm_projector_type is 'mlp_downsample_3x3_s2'",
        ),
        ("vision_tower", {"model_type": "radio"}, "model_type is 'radio': only siglip_vision_model and clip_vision"),
    ],
)
def test_unsupported_parts_are_refused(part: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_vila(tmp_path / "vila", **VARIANTS[SIGLIP]) / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UnsupportedModelError, match=message):
        VilaForConditionalGeneration.from_pretrained(tmp_path / "vila")


# ---------------------------------------------------------------- the processor


def test_texts_around_images(tmp_path: Path) -> None:
    """What the checkpoint's encoders of images and videos put around each of them."""
    encoder = json.dumps(
        {"_target_": "llava.model.encoders.BasicImageEncoder", "start_tokens": "is", "end_tokens": None}
    )
    processor = VilaProcessor.from_pretrained(copied(SIGLIP, tmp_path / "vila", image_encoder=encoder))
    image = processor.image_token_id
    assert processor(pictures()[:1], "user <image> this")["input_ids"].tolist() == [[3, 6, *[image] * 4, 7]]
    assert processor(None, "<vila/video>", pictures()[:2])["input_ids"].tolist() == [2 * [*[image] * 4, 2]]
    other = VilaProcessor.from_pretrained(
        copied(SIGLIP, tmp_path / "other", video_encoder='{"_target_": "TSPVideoEncoder"}')
    )
    with pytest.raises(UnsupportedModelError, match=r"video_encoder .*TSPVideoEncoder.*: only BasicVideoEncoder"):
        other(None, "<vila/video>", pictures()[:2])


def test_what_the_processor_refuses() -> None:
    processor = loaded(SIGLIP)[1]
    for given, message in (
        ((None, "what <image>"), "The texts hold 1 <image>, but 0 were given"),
        ((pictures(), "what <image>"), "The texts hold 1 <image>, but 3 were given"),
        ((None, "what", pictures()), "The texts hold 0 <vila/video>, but 1 were given"),
        ((None, []), "Pass text"),
        ((None, "<vila/video>", "film.mp4"), "expected a list of frames .* got 'film.mp4': read the frames first"),
        ((None, "<vila/video>", [pictures(), []]), r"expected a list of frames .* got \[\]"),
    ):
        with pytest.raises(InputError, match=message):
            processor(*given)
    with pytest.raises(InputError, match="return_tensors='pt' or 'np', padding=True"):
        processor(None, "what", return_tensors="tf")
    with pytest.raises(InputError, match="expected parts of type text, image or video, got 'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])


def test_rows_are_padded() -> None:
    processor = loaded(SIGLIP)[1]
    left, right = (processor(None, ["what", "what is this"], padding_side=side) for side in ("left", "right"))
    assert left["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert right["input_ids"].tolist()[0][0] == 5
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert "pixel_values" not in left


def test_grid_of_tiles() -> None:
    """Shapes by hand: the closest one; of equally close ones the larger, if the picture is large enough for it."""
    assert grid_of_tiles(10, 10, 448, 1, 12) == (1, 1)
    assert grid_of_tiles(1000, 1000, 448, 1, 12) == (3, 3)
    assert grid_of_tiles(700, 700, 448, 1, 12) == (2, 2)
    assert grid_of_tiles(800, 400, 448, 1, 12) == (2, 1)
    assert grid_of_tiles(100, 1200, 448, 1, 12) == (1, 12)
    assert grid_of_tiles(300, 400, 448, 2, 6) == (2, 3)
    picture = Image.fromarray(np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3))
    cut = tiles(picture, 4, 1, 4)
    assert [np.array(tile).tolist() for tile in cut[:2]] == [np.array(picture)[:, i : i + 4].tolist() for i in (0, 4)]
    assert len(cut) == 3
    assert cut[2].size == (4, 4)
    assert len(tiles(picture, 4, 1, 4, thumbnail=False)) == 2
    assert len(tiles(picture, 4, 1, 1)) == 1


# ---------------------------------------------------------------- the model


def test_images_that_do_not_fit() -> None:
    model, inputs = loaded(SIGLIP)[0], mixed_rows(SIGLIP)
    for call in (model, optimized(SIGLIP, "middle")):
        with pytest.raises(InputError, match="2 images make 8 visual tokens, but input_ids hold 12 placeholders"):
            call(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    embeds = model.get_input_embeddings()(torch.tensor([[3, 4]]))
    with pytest.raises(InputError, match="Images need input_ids"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    with pytest.raises(InputError, match="vision_feature_layer: not an option of this model"):
        model(**inputs, vision_feature_layer=-1)
    with pytest.raises(InputError, match="state_dict: not possible"):
        model.save_pretrained("unused", state_dict={})


def test_images_as_embeddings() -> None:
    """What is merged outside of the model gives the same numbers."""
    model, inputs = loaded(CLIP)[0], mixed_rows(CLIP)
    embeds, _ = embed(model, inputs["input_ids"], inputs["pixel_values"])
    with torch.no_grad():
        want = model(**inputs).logits
        assert_relative(model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, want)


# ---------------------------------------------------------------- optimize(): the oracle


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("name", OPTIMIZED)
@pytest.mark.shows("exits", "vila")
def test_exits_equal_the_oracle(name: str, exits: str) -> None:
    """A padded batch of several images, none and one; then a decode step."""
    (model, _), inputs, fast = loaded(name), mixed_rows(name), optimized(name, exits)
    oracle = Oracle(model, plan(*EXITS[exits]))
    out, want = fast(**inputs), oracle.forward(*oracle_inputs(model, inputs))
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    if exits in LAYER:
        assert out.exit_layer.tolist() == [LAYER[exits], -1, LAYER[exits]]
    assert_relative(out.logits, want.logits)
    assert out.past_key_values.lengths.T.tolist() == want.cache.lengths()
    step = torch.tensor([[7], [8], [9]])
    want = oracle.forward(model.get_input_embeddings()(step), cache=want.cache)
    assert_relative(fast(input_ids=step, past_key_values=out.past_key_values).logits, want.logits)


@pytest.mark.parametrize(("name", "exits"), [*((SIGLIP, exits) for exits in EXITS), (TILED, "natural")])
@pytest.mark.shows("generate", "vila")
def test_generate_equals_the_oracle(name: str, exits: str) -> None:
    (model, _), inputs = loaded(name), mixed_rows(name)
    never_ends = dict(do_sample=False, max_new_tokens=16, eos_token_id=-1)
    tokens = optimized(name, exits).generate(**inputs, **never_ends)
    want = Oracle(model, plan(*EXITS[exits])).generate(*oracle_inputs(model, inputs), max_new_tokens=16)
    assert tokens[:, -16:].tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()


@pytest.mark.shows("second turn", "vila")
def test_second_turn() -> None:
    """It brings a picture of its own, whose tokens leave, too."""
    (model, processor), fast = loaded(SIGLIP), optimized(SIGLIP, "middle")
    first, second = (processor(pictures()[i : i + 1], ["what <image> is this"[i:]]) for i in range(2))
    out = fast(**second, past_key_values=fast(**first).past_key_values)
    oracle = Oracle(model, plan(*EXITS["middle"]))
    known = oracle.forward(*oracle_inputs(model, first)).cache
    want = oracle.forward(*oracle_inputs(model, second), cache=known)
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [1]
    assert_relative(out.logits, want.logits)
    assert out.past_key_values.lengths.T.tolist() == want.cache.lengths()


def test_text_alone_equals_the_model() -> None:
    model, processor = loaded(TILED)
    inputs = processor(None, ["what is", "this"])
    want = model.generate(**inputs, **GREEDY)
    tokens = optimized(TILED, "first").generate(**inputs, **GREEDY)
    assert torch.equal(tokens, want)
    assert tokens.exit_layer.tolist() == [-1, -1]


@pytest.mark.shows("skips", "vila")
def test_skips_and_adapters() -> None:
    """Beside an exit, in a decoder whose embeddings are its last layer too."""
    parts = [StaticExit(2), SkippedAttention(0), SkippedAttention(2, random_adapter(PIA, 1))]
    model = VilaForConditionalGeneration.from_pretrained(folder(TIED))
    inputs = mixed_rows(TIED)
    fast, oracle = optimize(model, plan(*parts), compile=False), Oracle(loaded(TIED)[0], plan(*parts))
    want = oracle.forward(*oracle_inputs(loaded(TIED)[0], inputs))
    assert_relative(fast(**inputs).logits, want.logits)


@pytest.mark.thorough
@pytest.mark.shows('backend="vte"', "vila")
def test_backend() -> None:
    """The same through torch.compile(backend="vte")."""
    torch._dynamo.reset()
    model, inputs = VilaForConditionalGeneration.from_pretrained(folder(CLIP)), mixed_rows(CLIP)
    planned = plan(*EXITS["middle"])
    want = Oracle(loaded(CLIP)[0], planned).forward(*oracle_inputs(loaded(CLIP)[0], inputs))
    model.forward = torch.compile(model.forward, backend="vte", options={"plan": planned, "compile": False})
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    assert_relative(out.logits[:, -1], want.logits[:, -1])
    assert exit_layers(cache_of(out)).tolist() == [1, -1, 1]
    torch._dynamo.reset()


def test_the_command_line_loads_it(tmp_path: Path) -> None:
    """As any model; tuning reads its samples with its processor."""
    model, processor = load_model(folder(SIGLIP), "cpu"), load_processor(folder(SIGLIP))
    assert type(model) is VilaForConditionalGeneration
    text = prompt(processor, "what is this", 1)
    inputs = processor(images=pictures()[0], text=[text], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[0, 3, *[60] * 4, 2, 5, 6, 7, 1, 0, 4]]
    (sample,) = read_samples([{"question": "what is this", "answer": "this", "image": pictures()[0]}], processor)
    assert torch.equal(sample.inputs["pixel_values"], inputs["pixel_values"])
    optimized(SIGLIP, "middle").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = optimize(load_model(tmp_path, "cpu"), compile=False)
    assert again(**inputs).exit_layer.tolist() == [1]
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')  # as LLaVA's own checkpoints have it
    with pytest.raises(InputError, match="llava_llama"):
        load_model(tmp_path, "cpu")


@pytest.mark.thorough
@pytest.mark.shows("ONNX Runtime", "vila")
def test_onnx_engine(tmp_path: Path) -> None:
    """Tokens of the oracle, by pixels and by chat()."""
    model, processor = loaded(SIGLIP)
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": pictures()[0]}, {"type": "text", "text": "what is"}]}],
        add_generation_prompt=True,
        tokenize=True,
    )
    want = Oracle(model, plan(*EXITS["middle"])).generate(
        *oracle_inputs(model, chat), max_new_tokens=6, eos_token_id=model.generation_config.eos_token_id
    )
    export(optimized(SIGLIP, "middle"), tmp_path / "engine", target="onnxruntime", processor=processor)
    engine = load_engine(tmp_path / "engine")
    out = engine.generate(**{name: tensor.numpy() for name, tensor in chat.items()}, max_new_tokens=6)
    assert out.tokens[0, : out.lengths[0]].tolist() == want.tokens[0]
    assert out.exit_layer.tolist() == [1]
    said = engine.chat("what is", pictures()[0], max_new_tokens=6)
    assert said.text == processor.tokenizer.decode(want.tokens[0], skip_special_tokens=True)


def test_config_of_a_model_made_by_hand(tmp_path: Path) -> None:
    """A config is enough for a model of random weights, which can be saved and loaded."""
    model = VilaForConditionalGeneration(VilaConfig.from_pretrained(folder(CLASS)))
    assert model.config.image_seq_length == model.config.tokens_per_image == 10
    model.save_pretrained(tmp_path)
    loaded(CLASS)[1].save_pretrained(tmp_path)
    again = VilaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(ours, model.state_dict()[name]) for name, ours in again.state_dict().items())
