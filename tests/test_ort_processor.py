"""Text and pictures of ONNX engines are those of transformers' processors, which these tests compare with."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import TEMPLATE, llama, llava, tokenizer  # noqa: F401
from transformers import AutoProcessor, CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from vte_compile.demo.data import Assets
from vte_compile.errors import EngineError, InputError
from vte_compile.export.chat_template import ChatTemplate
from vte_compile.export.image_processor import ImageProcessor, NotKnownError, open_picture
from vte_compile.export.processor import Processor
from vte_compile.loading import prompt as in_template

SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "clip": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    "clip bilinear": CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE, resample=2, image_std=[0.3] * 3),
    "clip exact": CLIPImageProcessor(size={"height": 20, "width": 30}, do_center_crop=False),
    "clip padded crop": CLIPImageProcessor(size={"shortest_edge": 21}, crop_size={"height": 40, "width": 33}),
    "clip raw": CLIPImageProcessor(do_resize=False, crop_size=SQUARE, do_rescale=False, do_normalize=False),
    "siglip": SiglipImageProcessor(size=SQUARE),
    "llava": LlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
    "llava square": LlavaImageProcessor(do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE),
}


def random_picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


@pytest.mark.parametrize("size", [(50, 37), (33, 64), (16, 16), (45, 90)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name: str, size: tuple[int, int]) -> None:
    theirs = PROCESSORS[name]
    ours = ImageProcessor.from_config(json.loads(theirs.to_json_string()))
    picture = random_picture(*size)
    expected = theirs(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ours(picture), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P"])
def test_pictures_of_other_modes(mode: str, tmp_path: Path) -> None:
    picture = random_picture(40, 40, "RGB" if mode == "P" else mode)
    picture = picture.convert("P") if mode == "P" else picture
    theirs = PROCESSORS["siglip"]
    expected = theirs(picture, return_tensors="np")["pixel_values"][0]
    ours = ImageProcessor.from_config(json.loads(theirs.to_json_string()))
    np.testing.assert_allclose(ours(open_picture(picture, "here")), expected, atol=1e-5)
    picture.save(tmp_path / "picture.png")
    for path in (tmp_path / "picture.png", str(tmp_path / "picture.png")):
        np.testing.assert_allclose(ours(open_picture(path, "here")), expected, atol=1e-5)


def test_pictures_from_arrays_and_rotated_files(tmp_path: Path) -> None:
    picture = random_picture(20, 30)
    assert np.array_equal(np.asarray(open_picture(np.asarray(picture), "here")), np.asarray(picture))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png", "here").size == (30, 20)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.png", r"here nowhere\.png: .*No such file"),
        (__file__, "here .*test_ort_processor.py: cannot identify"),
        (np.zeros((3, 4, 4), np.uint8), r"here: expected an array \[height, width, 3\] of uint8"),
        (np.zeros((4, 4, 3)), "got float64"),
        (b"bytes", "got a bytes"),
    ],
)
def test_what_is_no_picture(picture, message) -> None:
    with pytest.raises(InputError, match=message):
        open_picture(picture, "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor_type": "InternVLImageProcessor"},
        {"size": {"longest_edge": 32}},
        {"size": {"shortest_edge": 0}},
        {"size": None},
        {"crop_size": 32},
        {"resample": 9},
        {"do_pad": True},
        {"image_mean": [0.5]},
        {"rescale_factor": "1/255"},
    ],
)
def test_what_is_not_known(changes) -> None:
    with pytest.raises(NotKnownError, match=next(iter(changes))):
        ImageProcessor.from_config(json.loads(PROCESSORS["clip"].to_json_string()) | changes)


# ---------------------------------------------------------------- whole prompts


@pytest.fixture(scope="module")
def folder(llava: Path, tmp_path_factory) -> Path:  # noqa: F811
    """The files a processor saves, alone."""
    saved = tmp_path_factory.mktemp("processor") / "processor"
    AutoProcessor.from_pretrained(llava).save_pretrained(saved)
    return saved


def features_of(made: dict[str, np.ndarray], count: int = 16) -> list[np.ndarray]:
    """An encoder whose features are the image's mean."""
    return [np.full((count, 2), image.mean(), np.float32) for image in made["pixel_values"]]


def test_prompts_of_the_demo() -> None:
    """The shipped model's questions: the same tokens and pixels as from its own processor."""
    assets = Assets.find()
    theirs, ours = AutoProcessor.from_pretrained(assets.model), Processor(assets.model, True)
    for question in assets.spread(40):
        seen = []

        def encode(made, seen=seen):
            seen.append(made["pixel_values"])
            return features_of(made, 144)

        prompt = ours.prompt(ours.messages(question.text, [question.image]), encode)
        picture = Image.open(question.image).convert("RGB")
        text = in_template(theirs, question.text, 1)
        expected = theirs(text=text, images=[picture], return_tensors="np")
        assert prompt.ids == expected["input_ids"][0].tolist()
        np.testing.assert_allclose(seen[0], expected["pixel_values"], atol=1e-5)
        answer = theirs.tokenizer(question.answer)["input_ids"]
        assert ours.decode([*answer, 2]) == theirs.decode([*answer, 2], skip_special_tokens=True)
        alone = ours.prompt(ours.messages(question.text, []), encode)
        assert alone.ids == theirs(text=in_template(theirs, question.text))["input_ids"][0]
        assert alone.features is None


def test_several_turns_and_pictures(folder: Path) -> None:
    theirs, ours = AutoProcessor.from_pretrained(folder), Processor(folder, True)
    pictures = [random_picture(40, 30), random_picture(32, 50), random_picture(9, 9)]
    chat = [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what is w1"},
                                     {"type": "image", "image": np.asarray(pictures[1])}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w2"}]},
        {"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "image", "image": pictures[2]}]},
    ]  # fmt: skip
    seen = []
    prompt = ours.prompt(chat, lambda made: [seen.append(made["pixel_values"]), *features_of(made)][1:])
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.ids == np.ravel(expected["input_ids"]).tolist()
    assert prompt.features is not None
    assert prompt.features.shape == (48, 2)
    np.testing.assert_allclose(seen[0], np.stack(expected["pixel_values"]), atol=1e-5)


def test_a_tokenizer_alone(llama: Path) -> None:  # noqa: F811
    ours = Processor(llama, False)
    assert ours.messages("what is", []) == [{"role": "user", "content": "what is"}]
    assert ours.prompt(ours.messages("what <image>", []), features_of).ids == [7, 4]  # no placeholder to such a model
    with pytest.raises(InputError, match="a language model alone"):
        ours.messages("what is", [random_picture(4, 4)])
    with pytest.raises(InputError, match="no chat template"):
        ours.prompt([{"role": "user", "content": "what"}] * 2, features_of)


def test_without_a_chat_template(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    theirs, ours = AutoProcessor.from_pretrained(copy), Processor(copy, True)
    assert theirs.chat_template is None
    pictures = [random_picture(8, 8)] * 2
    for text, count in [("what is", 2), ("what is", 0), ("<image> what", 1)]:
        prompt = ours.prompt(ours.messages(text, pictures[:count]), features_of)
        inputs = {"images": pictures[:count]} if count else {}
        assert prompt.ids == theirs(text=in_template(theirs, text, count), **inputs)["input_ids"][0]


def test_the_first_token_comes_once(folder: Path, tmp_path: Path) -> None:
    """Where both the template and the tokenizer begin with it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "tokenizer.json").read_text())
    special = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    config["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": special},
    }
    (copy / "tokenizer.json").write_text(json.dumps(config))
    theirs, ours = AutoProcessor.from_pretrained(copy), Processor(copy, True)
    assert ours.encode("what is") == theirs.tokenizer("what is")["input_ids"] == [1, 7, 8]
    chat = ours.messages("what is", [])
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ours.prompt(chat, features_of).ids == np.ravel(expected["input_ids"]).tolist()
    assert ours.prompt(chat, features_of).ids.count(1) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a text, or a list"),
        ([{"content": "hi"}], r"messages\[0\]: expected a role and a content"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content: expected a text, or a list of parts"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "expected a part of type 'image' or 'text', got 'sound'"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\].content\[0\]: has no picture"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "http://x.org/a.png"}]}],
            r"http://x.org/a.png: .*No",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "see <image>"}]}], "0 pictures, but 1 placeholders"),
    ],
)
def test_messages_of_another_kind(messages, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        Processor(folder, True).prompt(messages, features_of)


def test_an_unknown_processor_is_left_to_transformers(folder: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = 0.5  # of all channels
    (copy / "processor_config.json").write_text(json.dumps(config))
    chat = Processor(copy, True).messages("what is", [random_picture(40, 30)])
    expected = Processor(folder, True).prompt(chat, features_of)
    with caplog.at_level(logging.INFO, "vte_compile"):
        given = Processor(copy, True).prompt(chat, features_of)
    assert "image_mean 0.5 is left to transformers" in caplog.text
    assert given.ids == expected.ids
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EngineError, match=r"image_mean 0.5 is not known .* transformers, which knows it, is not inst"):
        Processor(copy, True).prompt(chat, features_of)
    config["processor_class"] = "AbacusProcessor"
    (copy / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="processor_class 'AbacusProcessor' is not known"):
        Processor(copy, True).prompt(chat, features_of)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_damaged_files(name: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for content in ("{", "[]"):
        (copy / name).write_text(content)
        with pytest.raises(EngineError, match=name):
            Processor(copy, True)


# ---------------------------------------------------------------- templates


def test_templates_see_plain_data_and_stay_in_their_sandbox(tmp_path: Path) -> None:
    picture = random_picture(4, 4)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    assert ChatTemplate("{{ messages[0].content[0].image }}", {}).render(chat) == "<Image>"
    assert ChatTemplate("{{ messages|tojson }}", {}).render([{"role": "a", "n": ("<é>", 1, None)}]) == (
        '[{"role": "a", "n": ["<é>", 1, null]}]'
    )
    for source in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__init__.__globals__ }}",
        "{{ raise_exception('only one message') }}",
        "{{ messages[5].role.x }}",
        "{{ 'x' * (10 ** 5) ** 9 }}",
    ):
        with pytest.raises(InputError, match="the chat template does not take them"):
            ChatTemplate(source, {}).render(chat)
    with pytest.raises(EngineError, match="cannot be compiled"):
        ChatTemplate("{% if %}", {})


def test_variables_and_blocks_of_templates() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "a"}, {"role": "b"}]) == "<s>a"


def test_templates_in_older_places(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    chat = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
    expected = Processor(copy, True).prompt(chat, features_of).ids
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert Processor(copy, True).prompt(chat, features_of).ids == expected
    (copy / "chat_template.json").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    assert Processor(copy, True).prompt(chat, features_of).ids == expected
