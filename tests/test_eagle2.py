"""Eagle 2 and 2.5: checkpoints in the published layout against the authors' numbers, and optimize() against the oracle.

data/eagle2.npz holds what the authors' code gives for the checkpoints that tests/tiny_eagle2.py writes, run aside under
transformers 4.57.1 and torchvision 0.28.0: visual tokens, the logits of each row's last three tokens, and 16 greedy
tokens, of NVlabs/Eagle's Eagle2_5_VLForConditionalGeneration (commit 783f656; attention "eager"; training-only imports
stubbed; one tensor made contiguous, without which it raises); ids, pixels and grids of tiles of the processor that is
published beside the weights, in the copy that LeRobot had. The eagle_chat checkpoint runs as one of Eagle 2.5 there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from marks import thorough
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_eagle2 import IMAGE, LAYERS, PATCH, SIDE, VARIANTS, write_eagle2
from tiny_models import (
    DATA,
    NEVER,
    assert_relative,
    gate,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
)
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM

from vte_compile import Oracle, Plan, SkippedAttention, StaticExit, export, load_engine, optimize
from vte_compile.adapters import PIA
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.eagle2 import (
    Eagle2Config,
    Eagle2ForConditionalGeneration,
    Eagle2ImageProcessor,
    Eagle2Processor,
)
from vte_compile.families.eagle2.image_processor import grid_of_tiles
from vte_compile.loading import load_model, load_processor
from vte_compile.loading import prompt as question
from vte_compile.oracle import embed
from vte_compile.tuning.samples import read_samples

QWEN2, TIED, LLAMA, QWEN3 = VARIANTS
OPTIMIZED = (QWEN2, thorough(QWEN3))
EXITS = {
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "first": [gate(0, -NEVER)],
    "middle": [gate(0, NEVER), StaticExit(1)],
    "last": [StaticExit(LAYERS - 1)],
    "natural": [gate(0, 0.5), gate(1, 0.5), StaticExit(2)],
}
LAYER = {"never": -1, "first": 0, "middle": 1, "last": LAYERS - 1}
TEXTS = ["what <image-1> and <image-2> is this", "what is", "this <image-1> what is this?"]
GREEDY = dict(do_sample=False, max_new_tokens=16, min_new_tokens=16)


@functools.cache
def golden() -> Any:
    return np.load(DATA / "eagle2.npz")


def of(name: str, key: str) -> torch.Tensor:
    """A number of the authors', for a variant."""
    return torch.from_numpy(golden()[f"{list(VARIANTS).index(name)}.{key}"])


@functools.cache
def pictures() -> list[Image.Image]:
    """Of three shapes: one tile, two and the whole picture, four and the whole picture."""
    random = np.random.RandomState(1)
    return [
        Image.fromarray(random.randint(0, 256, (*size, 3)).astype(np.uint8)) for size in ((7, 8), (9, 20), (30, 31))
    ]


@functools.cache
def folder(name: str) -> Path:
    return write_eagle2(Path(mkdtemp()) / "eagle2", **VARIANTS[name])


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    """A model and its processor, which no test may change."""
    return (
        Eagle2ForConditionalGeneration.from_pretrained(folder(name)),
        Eagle2Processor.from_pretrained(folder(name)),
    )


@functools.cache
def optimized(name: str, exits: str | None = None) -> Any:
    """What is traced is shared by all exits."""
    if exits is None:
        return optimize(loaded(name)[0], Plan(), compile=False)
    return optimize(optimized(name), plan(*EXITS[exits]))


def mixed_rows(name: str, side: str = "left") -> Any:
    """Rows with two images, none and one."""
    return loaded(name)[1](pictures(), TEXTS, padding_side=side)


def golden_rows(name: str) -> Any:
    """The rows of mixed_rows, as the authors' processor of the other checkpoints prepares them."""
    images = Eagle2ImageProcessor.from_pretrained(folder(QWEN2))
    tokens = loaded(name)[1].tokens_per_tile
    return Eagle2Processor(images, loaded(name)[1].tokenizer, tokens_per_tile=tokens)(pictures(), TEXTS)


def prompts(name: str) -> dict[str, Any]:
    return {
        "one image": loaded(name)[1](pictures()[2], "what <image-1> is this"),
        "text": loaded(name)[1](None, ["what is this", "what"]),
        "mixed, padded left": mixed_rows(name),
        "mixed, padded right": mixed_rows(name, "right"),
    }


def oracle_inputs(model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, visual = embed(model, inputs["input_ids"], inputs.get("pixel_values"))
    return embeds, visual, inputs["attention_mask"]


def changed(path: Path, **fields: Any) -> Path:
    """The same folder, with other fields in its config.json; dicts are merged."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for name, value in fields.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_tokens_are_the_authors(name: str) -> None:
    (model, _), inputs = loaded(name), golden_rows(name)
    with torch.no_grad():
        features = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions).logits[:, -3:]
    assert_relative(features, of(name, "features"))
    assert_relative(logits, of(name, "logits"))
    assert torch.equal(model.generate(**inputs, **GREEDY)[:, -16:], of(name, "tokens"))


@pytest.mark.parametrize("name", OPTIMIZED)
@pytest.mark.shows("images", "eagle2")
def test_optimized_logits_and_tokens_are_the_authors(name: str) -> None:
    fast, inputs = optimized(name), golden_rows(name)
    assert_relative(fast(**inputs).logits[:, -3:], of(name, "logits"))
    assert torch.equal(fast.generate(**inputs, **GREEDY)[:, -16:], of(name, "tokens"))


def test_ids_and_pixels_are_the_authors() -> None:
    processor, inputs = loaded(QWEN2)[1], mixed_rows(QWEN2)
    assert torch.equal(inputs["input_ids"], torch.from_numpy(golden()["ids"]))
    assert torch.equal(inputs["attention_mask"], torch.from_numpy(golden()["mask"]))
    assert_pixels(inputs, "pixel_values")
    video = processor(pictures()[2], "<video-1> what <image-1>", [pictures()[:2]], fps=[2.0], timestamps=[[0.0, 0.5]])
    assert torch.equal(video["input_ids"], torch.from_numpy(golden()["video_ids"]))
    assert_pixels(video, "video_pixels")
    assert_pixels(processor.image_processor(Image.fromarray(golden()["clear"])), "clear_pixels")


def assert_pixels(inputs: Any, key: str) -> None:
    torch.testing.assert_close(inputs["pixel_values"], torch.from_numpy(golden()[key]), rtol=1e-5, atol=1e-5)


def test_grids_of_tiles_are_the_authors() -> None:
    """Of 304 pictures; the last four are squares for which grids are equally good."""
    for width, height, size, most, columns, rows in golden()["grids"].tolist():
        assert grid_of_tiles(width, height, size, 1, most) == (columns, rows)


# ---------------------------------------------------------------- exits and skips, against the oracle


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("name", OPTIMIZED)
@pytest.mark.shows("exits", "eagle2")
def test_optimized_equals_the_oracle(name: str, exits: str) -> None:
    model, fast = loaded(name)[0], optimized(name, exits)
    oracle = Oracle(model, plan(*EXITS[exits]))
    for prompt, inputs in prompts(name).items():
        out, want = fast(**inputs), oracle.forward(*oracle_inputs(model, inputs))
        assert out.exit_layer.tolist() == want.exit_layer.tolist()
        assert_relative(out.logits, want.logits)
        assert out.past_key_values.lengths.T.tolist() == want.cache.lengths(), prompt
        if exits in LAYER:  # rows without images have nothing that could leave
            has_images = (inputs["input_ids"] == IMAGE).any(1).tolist()
            assert out.exit_layer.tolist() == [LAYER[exits] if has else -1 for has in has_images]
        step = torch.full((len(out.logits), 1), 7)
        want = oracle.forward(model.get_input_embeddings()(step), cache=want.cache)
        assert_relative(fast(input_ids=step, past_key_values=out.past_key_values).logits, want.logits)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("name", OPTIMIZED)
@pytest.mark.shows("generate", "eagle2")
def test_generated_tokens_are_the_oracles(name: str, exits: str) -> None:
    model, inputs = loaded(name)[0], mixed_rows(name)
    tokens = optimized(name, exits).generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=-1)
    want = Oracle(model, plan(*EXITS[exits])).generate(*oracle_inputs(model, inputs), max_new_tokens=16)
    assert tokens[:, -16:].tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()


@pytest.mark.shows("second turn", "eagle2")
def test_second_turn() -> None:
    """It brings a picture of its own, whose tokens leave, too."""
    (model, processor), fast = loaded(QWEN2), optimized(QWEN2, "middle")
    first, second = (processor(pictures()[i], f"what <image-1> {text}") for i, text in enumerate(("is this", "this")))
    out = fast(**second, past_key_values=fast(**first).past_key_values)
    oracle = Oracle(model, plan(*EXITS["middle"]))
    known = oracle.forward(*oracle_inputs(model, first)).cache
    want = oracle.forward(*oracle_inputs(model, second), cache=known)
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [1]
    assert_relative(out.logits, want.logits)
    assert out.past_key_values.lengths.T.tolist() == want.cache.lengths()


@pytest.mark.parametrize("name", OPTIMIZED)
def test_without_exits_equals_the_model(name: str) -> None:
    model, fast, inputs = loaded(name)[0], optimized(name), mixed_rows(name)
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        assert_relative(fast(**inputs).logits[real], model(**inputs, position_ids=positions).logits[real])
    assert torch.equal(fast.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.slow
@pytest.mark.shows("skips", "eagle2")
def test_skips_and_adapters() -> None:
    model, inputs = loaded(QWEN2)[0], mixed_rows(QWEN2)
    parts = [SkippedAttention(2, random_adapter(PIA)), SkippedAttention(3), StaticExit(1)]
    fast, oracle = optimize(model, plan(*parts), compile=False), Oracle(model, plan(*parts))
    assert_relative(fast(**inputs).logits, oracle.forward(*oracle_inputs(model, inputs)).logits)


class AsTheAuthors(nn.Module):
    """What the authors' class is from outside: it has a whole causal language model, to which generate() hands
    embeddings and all that it does not know itself, and a forward for training only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.merge = model.config, functools.partial(embed, model)
        self.language_model = Qwen2ForCausalLM(model.config.text_config)
        self.language_model.model, self.language_model.lm_head = model.model.language_model, model.lm_head
        self.language_model.eval()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("merge() has it")

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        raise AssertionError("for training")

    def generate(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        with torch.no_grad():
            embeds, _ = self.merge(input_ids, pixel_values)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)


@pytest.mark.slow
def test_the_authors_live_object() -> None:
    model, inputs = AsTheAuthors(loaded(QWEN2)[0]), mixed_rows(QWEN2)
    fast = optimize(model, plan(*EXITS["natural"]), compile=False)
    tokens = fast.generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=-1)
    oracle = Oracle(loaded(QWEN2)[0], plan(*EXITS["natural"]))
    want = oracle.generate(*oracle_inputs(loaded(QWEN2)[0], inputs), max_new_tokens=16)
    assert tokens.tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()


@pytest.mark.thorough
@pytest.mark.shows('backend="vte"', "eagle2")
def test_backend() -> None:
    """The same through torch.compile(backend="vte")."""
    torch._dynamo.reset()
    model, inputs = Eagle2ForConditionalGeneration.from_pretrained(folder(TIED)), mixed_rows(TIED)
    planned = plan(StaticExit(1))
    want = Oracle(loaded(TIED)[0], planned).forward(*oracle_inputs(loaded(TIED)[0], inputs))
    model.forward = torch.compile(model.forward, backend="vte", options={"plan": planned, "compile": False})
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    assert_relative(out.logits[:, -1], want.logits[:, -1])
    assert exit_layers(out.past_key_values).tolist() == [1, -1, 1]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.shows("ONNX Runtime", "eagle2")
def test_engine(tmp_path: Path) -> None:
    """The same in ONNX Runtime: a tile is an image to it."""
    pytest.importorskip("onnxruntime")
    model, inputs, planned = loaded(QWEN2)[0], mixed_rows(QWEN2), plan(StaticExit(1))
    export(optimize(optimized(QWEN2), planned), tmp_path / "engine", target="onnxruntime")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    out = load_engine(tmp_path / "engine").generate(**arrays, max_new_tokens=16)
    want = Oracle(model, planned).generate(*oracle_inputs(model, inputs), max_new_tokens=16)
    assert out.tokens.tolist() == want.tokens
    assert out.exit_layer.tolist() == [1, -1, 1]


def test_conversations_for_calibration() -> None:
    """As calibrate(), evaluate() and analyze() read them."""
    processor = loaded(QWEN2)[1]
    asked = {"role": "user", "content": "<image>\nwhat is this?"}
    chats = [{"messages": [asked, {"role": "assistant", "content": "a cat"}], "images": pictures()[1:2]}]
    (sample,) = read_samples(chats, processor=processor)
    text = "<|im_start|>user\n<image-1>what is this?<|im_end|>\n<|im_start|>assistant\n"
    want = processor(pictures()[1], text)
    assert all(torch.equal(sample.inputs[name], want[name]) for name in want)
    assert processor.decode(sample.answer) == "a cat<|im_end|>"


# ---------------------------------------------------------------- the architecture


@pytest.mark.parametrize("name", VARIANTS)
def test_visual_tokens_are_eagles(name: str) -> None:
    """Against the formulas, on the published weights: pre-norm blocks, pixel shuffle, MLP."""
    (model, processor), weights = loaded(name), {}
    for file in folder(name).glob("*.safetensors"):
        weights |= load_file(file)
    pixels = processor(pictures()[1], "<image-1>")["pixel_values"]
    v, config = "vision_model.vision_model.", model.config

    def norm(x: torch.Tensor, at: str, eps: float = 1e-6) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{at}.weight"], weights[f"{at}.bias"], eps)

    def linear(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])

    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    kernel = weights[f"{v}embeddings.patch_embedding.weight"].flatten(1)
    x = F.linear(patches, kernel, weights[f"{v}embeddings.patch_embedding.bias"])
    states = [x + weights[f"{v}embeddings.position_embedding.weight"]]
    for i in range(3):
        b, x = f"{v}encoder.layers.{i}.", states[-1]
        normed = norm(x, f"{b}layer_norm1")
        q, k, value = (linear(normed, f"{b}self_attn.{n}_proj").unflatten(-1, (2, 8)).transpose(1, 2) for n in "qkv")
        mixed = ((q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{b}self_attn.out_proj")
        hidden = F.gelu(linear(norm(x, f"{b}layer_norm2"), f"{b}mlp.fc1"), approximate="tanh")
        states.append(x + linear(hidden, f"{b}mlp.fc2"))
    x = norm(states[-1], f"{v}post_layernorm") if config.select_layer == -1 else states[config.select_layer]
    if config.use_pixel_shuffle:
        grid = x.unflatten(1, (SIDE, SIDE))
        quarters = [grid[:, row::2, column::2] for row in range(2) for column in range(2)]
        x = torch.cat(quarters, -1).flatten(1, 2)
    if config.mlp_connector_layers == 2:
        x = linear(F.gelu(linear(norm(x, "mlp1.0", 1e-5), "mlp1.1")), "mlp1.3")
    else:
        x = linear(x, "mlp1.0")
    with torch.no_grad():
        assert_relative(torch.stack(model.get_image_features(pixels).pooler_output), x)
    assert x.shape[1] == config.tokens_per_tile == processor.tokens_per_tile


def test_padding_and_company_do_not_matter() -> None:
    model, inputs = loaded(QWEN2)[0], mixed_rows(QWEN2)
    alone = loaded(QWEN2)[1](pictures()[2], "this <image-1> what is this?")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(**inputs, position_ids=positions).logits[2, inputs["attention_mask"][2].bool()]
        assert_relative(whole, model(**alone).logits[0])


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_in_the_published_layout(name: str, tmp_path: Path) -> None:
    (model, processor), inputs = loaded(name), mixed_rows(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    published = {key for file in folder(name).glob("*.safetensors") for key in load_file(file)}
    assert load_file(tmp_path / "model.safetensors").keys() == {key for key in published if ".head." not in key}
    written, was = (json.loads((where / "config.json").read_text()) for where in (tmp_path, folder(name)))
    assert written["architectures"] == ["Eagle2_5_VLForConditionalGeneration"]
    assert written["model_type"] == "eagle_2_5_vl"
    for field in ("downsample_ratio", "force_image_size", "select_layer", "template", "use_thumbnail", "loss_version"):
        assert written[field] == was[field]
    assert written["image_token_index"] == IMAGE
    again = Eagle2ForConditionalGeneration.from_pretrained(tmp_path)
    prepared = Eagle2Processor.from_pretrained(tmp_path)(pictures(), TEXTS)
    assert all(torch.equal(prepared[key], inputs[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(again(**prepared).logits, model(**inputs).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id == 258
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (name == TIED)


def test_made_from_a_config(tmp_path: Path) -> None:
    config = Eagle2Config.from_pretrained(folder(QWEN2))
    model = Eagle2ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"vision_model", "mlp1", "language_model"}
    again, pixels = Eagle2ForConditionalGeneration.from_pretrained(tmp_path), torch.randn(1, 3, 8, 8)
    assert torch.equal(again.model.image_features(pixels), model.model.image_features(pixels))


def test_another_type_of_numbers() -> None:
    model = Eagle2ForConditionalGeneration.from_pretrained(folder(QWEN2), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate(**mixed_rows(QWEN2), max_new_tokens=2).shape[0] == 3


def test_code_of_a_checkpoint_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json names the authors' code; loading neither runs it nor asks whether to."""
    path = write_eagle2(tmp_path / "eagle2", old=True)
    assert "auto_map" in json.loads((path / "config.json").read_text())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (path / "configuration_eagle_chat.py").write_text("raise AssertionError('ran')")
    Eagle2ForConditionalGeneration.from_pretrained(path)
    Eagle2Processor.from_pretrained(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    load, path = Eagle2ForConditionalGeneration.from_pretrained, write_eagle2(tmp_path / "eagle2")
    weights = load_file(path / "model.safetensors")
    missing = {name: weight for name, weight in weights.items() if name != "mlp1.1.weight"}
    for written, message in (
        (missing, r"missing: .*multi_modal_projector\.1\.weight"),
        ({**weights, "vision_model.convnext.weight": torch.zeros(1)}, r"unexpected: vision_model\.convnext\.weight"),
    ):
        save_file(written, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"its weights do not fit its config.json: {message}"):
            load(path)
    with pytest.raises(InputError, match=r"model_type is 'llava', not Eagle 2's \(eagle_2_5_vl, eagle_chat\)"):
        load(changed(path, model_type="llava"))
    old = write_eagle2(tmp_path / "old", old=True)
    special = json.loads((old / "tokenizer.json").read_text().replace("<IMG_CONTEXT>", "<other>"))
    (old / "tokenizer.json").write_text(json.dumps(special))
    (old / "tokenizer_config.json").write_text(
        (old / "tokenizer_config.json").read_text().replace("IMG_CONTEXT", "other")
    )
    with pytest.raises(InputError, match="its tokenizer has no <IMG_CONTEXT>"):
        load(old)
    (old / "tokenizer.json").unlink()
    (old / "vocab.json").unlink()
    (old / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        Eagle2Processor.from_pretrained(old)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_llm_lora": 16}, "use_llm_lora: adapters beside the weights"),
        ({"force_image_size": 16}, "force_image_size is 16, but SigLIP's image_size 8"),
        ({"downsample_ratio": 0.75}, "downsample_ratio is 0.75: expected 1/2"),
        ({"downsample_ratio": 1 / 3}, "a tile has 4 patches along a side"),
        ({"mlp_connector_layers": 3}, "mlp_connector_layers is 3: only 2, and 1"),
        ({"use_pixel_shuffle": False}, "mlp_connector_layers is 2: only 2, and 1, which may go without use_pixel_sh"),
        ({"select_layer": -9}, "select_layer is -9, but SigLIP has 3 layers"),
        ({"vision_config": {"model_type": "radio"}}, "vision_config: .*radio"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model': only siglip_vision_model"),
        ({"text_config": {"model_type": "phi3"}}, "text_config: model_type is 'phi3': only llama, qwen2, qwen3"),
    ],
)
def test_unsupported_checkpoints_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Eagle2ForConditionalGeneration.from_pretrained(changed(write_eagle2(tmp_path / "eagle2"), **fields))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_command_line_loads_it(name: str) -> None:
    """Both published layouts, without running their code."""
    model, processor = load_model(folder(name), "cpu"), load_processor(folder(name))
    assert type(model) is Eagle2ForConditionalGeneration
    text = question(processor, "what is this", 1)
    inputs = processor(images=pictures()[0], text=[text], return_tensors="pt")
    assert torch.equal(model(**inputs).logits, loaded(name)[0](**inputs).logits)


# ---------------------------------------------------------------- the processor


def test_chats() -> None:
    """Numbers of pictures, tokens around them, one placeholder for each visual token of each tile."""
    processor = loaded(QWEN2)[1]
    parts = [{"type": "image", "image": image} for image in pictures()[:2]]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image-1><image-2>what?<|im_end|>\n<|im_start|>assistant\n"
    chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    one, three = ("<img>" + "<IMG_CONTEXT>" * 4 * tiles + "</img>" for tiles in (1, 3))
    shown = f"<|im_start|>user\n<image 1>{one}<image 2>{three}what?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(chat["input_ids"][0]) == shown
    assert (chat["input_ids"] == IMAGE).sum() == 16
    assert chat["pixel_values"].shape == (4, 3, 8, 8)
    again = processor(pictures()[:2], text)
    assert all(torch.equal(again[key], chat[key]) for key in chat)
    both = processor.apply_chat_template([messages, messages], add_generation_prompt=True, tokenize=True)
    assert torch.equal(both["input_ids"], chat["input_ids"].repeat(2, 1))
    few = processor(pictures()[1], "<image-1>", max_dynamic_tiles=1)
    assert (few["input_ids"] == IMAGE).sum() == 4


def test_chats_of_old_checkpoints() -> None:
    """They have no template of their own, and the numbers of tiles are in their config.json."""
    processor = loaded(LLAMA)[1]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": pictures()[2]}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "that"},
        {"role": "user", "content": [{"type": "video", "video": pictures()}]},
    ]
    want = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image-1>what?<|im_end|>\n"
        "<|im_start|>assistant\nthat<|im_end|>\n<|im_start|>user\n<video-1><|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == want
    assert processor.image_processor.max_dynamic_tiles == 3
    chat = processor.apply_chat_template(messages, tokenize=True)
    tiles = processor.image_processor(pictures()[2])["tiles"][0] + 3
    assert len(chat["pixel_values"]) == tiles <= 6
    assert int((chat["input_ids"] == IMAGE).sum()) == 4 * tiles


@pytest.mark.shows("videos", "eagle2")
def test_videos() -> None:
    processor = loaded(QWEN2)[1]
    frame = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    video = processor(None, "<video-1> what", [pictures()[:2]])
    assert processor.decode(video["input_ids"][0]) == f"The first video: Frame 1: {frame}Frame 2: {frame} what"
    timed = processor(None, "<video-1>", pictures()[:2], fps=[2.0], timestamps=[[0.0, 0.5]])
    at = [f"Frame {i + 1} sample at {i / 2:.2f}s: {frame}" for i in range(2)]
    assert processor.decode(timed["input_ids"][0]) == f"The first video sampled with 2.00 fps: {''.join(at)}"
    mixed = processor(pictures()[0], ["<video-1><image-1>", "<video-1>"], [pictures()[:2], pictures()[1:]])
    first, second = (processor.image_processor(pictures()[i], max_dynamic_tiles=1)["pixel_values"] for i in range(2))
    assert torch.equal(mixed["pixel_values"][:3], torch.cat([first, second, first]))
    with torch.no_grad():
        assert loaded(QWEN2)[0](**mixed).logits.shape[0] == 2


def test_pictures_are_taken_by_their_numbers() -> None:
    processor = loaded(QWEN2)[1]
    turned = processor(pictures()[:2], "<image-2> <image-1>")["pixel_values"]
    straight = processor(pictures()[:2], "<image-1> <image-2>")["pixel_values"]
    assert torch.equal(turned, straight.roll(-1, 0))


def test_what_the_processor_refuses() -> None:
    processor = loaded(QWEN2)[1]
    for given, message in (
        ((None, "what <image-1>"), "The texts hold 1 <image-...>, but 0 images were given"),
        ((pictures(), "what <image-1>"), "The texts hold 1 <image-...>, but 3 images were given"),
        ((None, "what", [pictures()]), "The texts hold 0 <video-...>, but 1 videos were given"),
        ((pictures()[:2], ["what", "<image-1><image-3>"]), r"text 1: numbers of its images are \[1, 3\]: expected"),
        ((None, []), "Pass text"),
    ):
        with pytest.raises(InputError, match=message):
            processor(*given)
    with pytest.raises(InputError, match="return_tensors='pt', padding=True"):
        processor(None, "what", return_tensors="np")
    with pytest.raises(InputError, match="timestamps: 1 of a video with 2 frames"):
        processor(None, "<video-1>", [pictures()[:2]], timestamps=[[0.0]])
    with pytest.raises(InputError, match="expected parts of type text, image or video, got 'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "text": ""}]}], tokenize=True)
    with pytest.raises(InputError, match="max_dynamic_tiles: expected at least 1, got 0"):
        processor.image_processor(pictures()[0], max_dynamic_tiles=0)
    with pytest.raises(UnsupportedModelError, match="pad_during_tiling True"):
        Eagle2ImageProcessor(pad_during_tiling=True)
    with pytest.raises(InputError, match="1 images make 4 visual tokens, but input_ids hold 5 placeholders"):
        loaded(QWEN2)[0](input_ids=torch.full((1, 5), IMAGE), pixel_values=torch.zeros(1, 3, 8, 8))


def test_grid_of_tiles() -> None:
    """Shapes by hand: likeness of shape, times how much of the picture's size is there, of which 60% is enough."""
    assert grid_of_tiles(448, 448, 448, 1, 12) == (1, 1)
    assert grid_of_tiles(560, 560, 448, 1, 12) == (1, 1)  # 64% of the pixels
    assert grid_of_tiles(600, 600, 448, 1, 12) == (2, 2)  # 56%
    assert grid_of_tiles(4000, 4000, 448, 1, 12) == (3, 3)
    assert grid_of_tiles(896, 448, 448, 1, 12) == (2, 1)
    assert grid_of_tiles(448, 5000, 448, 1, 12) == (1, 11)
    assert grid_of_tiles(1000, 1000, 448, 1, 1) == (1, 1)


def test_tiles() -> None:
    """Row by row, the whole picture last; bytes become numbers from -1 to 1."""
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    processor = Eagle2ImageProcessor(size={"height": 8, "width": 8}, max_dynamic_tiles=4)
    pixels = processor(Image.fromarray(picture))["pixel_values"]
    whole = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
    assert pixels.shape == (5, 3, 8, 8)
    for tile, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        torch.testing.assert_close(pixels[tile], whole[:, row : row + 8, column : column + 8])
    small = Image.fromarray(picture).resize((8, 8), Image.Resampling.BICUBIC)
    thumbnail = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(pixels[4], thumbnail, rtol=0, atol=1.01 / 127.5)  # a shade of Pillow's
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    torch.testing.assert_close(processor(clear)["pixel_values"], torch.ones(1, 3, 8, 8))
