"""Samples from conversations, datasets and batches: the processor's output and the labels; errors name the sample."""

import logging
from operator import length_hint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE, image_prompt
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from vte_compile.demo.data import ASSETS
from vte_compile.errors import InputError
from vte_compile.tuning.samples import Sample, read_samples

QUESTION = "what is at row 1 column 2 ?"
IDS = SimpleNamespace(image_token_id=IMAGE)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ASSETS / "model")


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96, 3), np.uint8))


def text_only(record):
    return {**record, "image": None}


def asked(content, answer="bag"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def parts(image):
    return [image, {"type": "text", "text": QUESTION}]


# ---------------------------------------------------------------- conversations


@pytest.fixture
def file(tmp_path):
    picture().save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def conversations(file: Path):
    """The same question about the same picture, in each format."""
    image = picture()
    return {
        "pil": asked(parts({"type": "image", "image": image})),
        "path": asked(parts({"type": "image", "path": str(file)})),
        "url-part": asked(parts({"type": "image_url", "image_url": {"url": str(file)}})),
        "dataset-part": asked([{"type": "image", "image": image, "text": None}, {**parts({})[1], "image": None}]),
        "placeholder": {"messages": asked(parts({"type": "image"})), "images": [image]},
        "string": {"messages": asked(f"<image>\n{QUESTION}"), "images": [file]},
        "beside": {"messages": asked(QUESTION), "image": image},
        "bytes": {"messages": asked(QUESTION), "image": {"bytes": file.read_bytes(), "path": None}},
        "path-of-dataset": {"messages": asked(QUESTION), "image": {"bytes": None, "path": str(file)}},
        "answer-parts": {"messages": asked(QUESTION, [{"type": "text", "text": "bag"}]), "image": image},
        "llava": {
            "id": "7",
            "image": str(file),
            "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "bag"}],
        },
        "question": {"question": QUESTION, "answer": "bag", "image": image},
    }


FORMATS = list(conversations(Path(__file__)))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_processors_output(processor, file, name):
    (sample,) = read_samples([conversations(file)[name]], processor)
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts({"type": "image"})}], add_generation_prompt=True
    )
    expected = processor(images=picture(), text=text, return_tensors="pt")
    assert set(sample.inputs) == set(expected)
    for key, value in expected.items():
        assert torch.equal(sample.inputs[key], value), key
    tokenizer = processor.tokenizer
    assert sample.answer == (*tokenizer("bag", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    assert sample.name == "samples[0]"
    assert sample.key == Sample.of(expected, sample.answer).key


def test_without_an_answer(processor):
    conversation = [{"role": "user", "content": parts({"type": "image", "image": picture()})}]
    answered, alone, question = read_samples(
        [[*conversation, *asked("")[1:]], conversation, {"question": QUESTION, "image": picture()}], processor
    )
    assert (alone.answer, question.answer) == (None, None)
    assert torch.equal(answered.inputs["input_ids"], alone.inputs["input_ids"])
    assert alone.key == question.key != answered.key


def test_earlier_turns_and_several_images_belong_to_the_prompt(processor):
    first = asked(parts({"type": "image"}), "yes")
    record = {
        "messages": [*first, *asked([{"type": "image"}, {"type": "text", "text": "how many hat ?"}], "3")],
        "images": [picture(1), picture(2)],
    }
    (sample,) = read_samples([record], processor)
    ids = sample.inputs["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 2 * 144
    assert sample.inputs["pixel_values"].shape[0] == 2
    text = processor.tokenizer.decode(ids).replace("<image>", "").split()
    assert text[text.index("yes") - 2 : text.index("yes") + 2] == ["assistant", ":", "yes", "<eos>"]
    assert processor.tokenizer.decode(sample.answer).split() == ["3", "<eos>"]


def test_an_answer_without_end_token_has_no_blanks_behind_it(processor):
    template = processor.chat_template
    processor = AutoProcessor.from_pretrained(ASSETS / "model")
    processor.chat_template = template.replace("<eos> ", "  ")
    (sample,) = read_samples([asked(parts({"type": "image", "image": picture()}))], processor)
    assert sample.answer == tuple(processor.tokenizer("bag")["input_ids"])


class Columns:
    """A map-style dataset like datasets.Dataset: rows by number, columns by name."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def test_a_dataset_and_its_count(processor):
    rows = Columns(question=[QUESTION] * 3, answer=["bag", "hat", None], image=[picture(n) for n in range(3)])
    reader = read_samples(rows, processor)
    assert length_hint(reader) == 3
    samples = list(reader)
    assert [sample.name for sample in samples] == ["samples[0]", "samples[1]", "samples[2]"]
    assert [sample.answer is None for sample in samples] == [False, False, True]
    assert len({sample.key for sample in samples}) == 3
    assert length_hint(read_samples(iter(rows), processor)) == 0  # a stream
    assert [sample.key for sample in read_samples(iter(samples))] == [sample.key for sample in samples]


def test_text_only_samples_are_left_out_with_one_warning(processor, caplog):
    record = {"question": QUESTION, "answer": "bag", "image": picture()}
    with caplog.at_level(logging.WARNING):
        samples = list(read_samples([text_only(record), record, text_only(record)], processor))
    assert [sample.name for sample in samples] == ["samples[1]"]
    assert [entry.getMessage() for entry in caplog.records] == ["2 of 3 samples have no image and are left out"]
    with pytest.raises(InputError, match="all 2 are text only"):
        list(read_samples([text_only(record)] * 2, processor))


IMAGE_PART = {"type": "image", "image": picture()}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (asked(parts(IMAGE_PART), ""), "empty answer"),
        (asked(parts(IMAGE_PART), " \n"), "empty answer"),
        ({"messages": asked(parts({"type": "image"}))}, "1 image placeholders, but 0 images"),
        ({"messages": asked("<image>"), "images": [picture()] * 2}, "1 image placeholders, but 2 images"),
        (asked(parts({"type": "image", "path": "no such file"})), "image 0: cannot be read"),
        (asked(parts({"type": "video"})), "message 0: a part of type 'video'"),
        ([{"role": "tool", "content": QUESTION}], "its role is 'tool'"),
        ([{"role": "user", "content": 7}], "expected text or a list of parts"),
        (["what"], "expected a message"),
        ([], "expected a conversation"),
        ({"text": QUESTION, "image": picture()}, "it has text, image"),
        ([{"role": "assistant", "content": [IMAGE_PART]}], "no question"),
        ([*asked(parts(IMAGE_PART)), *asked("")[1:]], "no question"),
        ({"role": "user", "content": QUESTION}, "is a message"),
        (7, "expected a conversation"),
    ],
)
def test_conversations_that_cannot_be_used(processor, item, message):
    with pytest.raises(InputError, match=rf"^samples\[1\].*{message}"):
        list(read_samples([asked(parts(IMAGE_PART)), item], processor))


def test_processors_that_cannot_be_used(processor):
    given = [asked(parts(IMAGE_PART))]
    with pytest.raises(InputError, match=r"samples\[0\]: .*need the model's processor"):
        list(read_samples(given))
    with pytest.raises(InputError, match="no image processor"):
        list(read_samples(given, processor.tokenizer))
    changed = AutoProcessor.from_pretrained(ASSETS / "model")
    for template, message in [
        (None, "no chat template"),
        (processor.chat_template.replace("{{ part['text'] }}", ""), "leaves out the text 'what is at"),
        (processor.chat_template.replace("<bos>", "{{ messages | length }}"), "otherwise when an answer follows"),
        ("{{ nothing.of_that_name }}", "failed: UndefinedError"),
        ("<bos> <image> {% if messages | length > 1 %}bag{% endif %}", "leaves out the text"),
    ]:
        changed.chat_template = template
        with pytest.raises(InputError, match=rf"^samples\[0\]: .*{message}"):
            list(read_samples(given, changed))


def test_a_prompt_that_ends_with_the_image(processor):
    changed = AutoProcessor.from_pretrained(ASSETS / "model")
    changed.chat_template = "<bos> {{ messages[0]['content'][1]['text'] }} <image> ."
    with pytest.raises(InputError, match=r"samples\[0\]: no question behind the image: 1 tokens"):
        list(read_samples([asked(parts(IMAGE_PART))[:1]], changed))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"train": []}, "one of its values"),
        ({"input_ids": torch.zeros(1, 3)}, "one batch"),
        ("folder", "got str"),
        (7, "got int"),
    ],
)
def test_what_is_no_samples_at_all(samples, message):
    with pytest.raises(InputError, match=message):
        read_samples(samples)


def test_no_samples():
    with pytest.raises(InputError, match="there are none"):
        list(read_samples([]))


# ---------------------------------------------------------------- batches


def batch(*layouts, answers=None, seed=0):
    """Processor output of rows, and labels for their last tokens; i is an image of four tokens, . padding."""
    ids, pixels, mask = image_prompt(*layouts, seed=seed)
    outputs = {"input_ids": ids, "attention_mask": mask}
    if pixels is not None:
        outputs["pixel_values"] = pixels
    if answers is not None:
        outputs["labels"] = torch.full_like(ids, -100)
        for row, count in enumerate(answers):
            end = int(mask[row].nonzero().max()) + 1
            outputs["labels"][row, end - count : end] = ids[row, end - count : end]
    return outputs


@pytest.mark.parametrize(
    "layouts",
    [(".....tittttt", "titittttt"), ("tittttt.....", "titittttt"), ("tiitttt", "titttttt..")],
    ids=["left", "right", "side-by-side"],
)
def test_rows_are_split_and_unpadded(layouts):
    given = batch(*layouts, answers=(2, 3))
    samples = list(read_samples([given], IDS))
    images = list(given["pixel_values"].split([layout.count("i") for layout in layouts]))
    for row, sample in enumerate(samples):
        real = given["input_ids"][row, given["attention_mask"][row].bool()].tolist()
        count = (2, 3)[row]
        assert sample.inputs["input_ids"].tolist() == [real[:-count]]
        assert sample.answer == tuple(real[-count:])
        assert torch.equal(sample.inputs["pixel_values"], images[row])
        assert sample.inputs["attention_mask"].tolist() == [[1] * (len(real) - count)]
        assert sample.name == f"samples[0], row {row}"


def test_a_data_loader_and_its_count():
    prompts = [batch("tittttt", answers=[2], seed=n) for n in range(5)]

    def collate(rows):
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    loader = DataLoader(prompts, batch_size=2, collate_fn=collate)
    reader = read_samples(loader, IDS)
    assert length_hint(reader) == 5
    assert length_hint(read_samples(list(loader), IDS)) == 5
    assert [sample.key for sample in reader] == [sample.key for sample in read_samples(prompts)]


def test_without_labels_or_without_images(caplog):
    given = batch("tittttt", "ttttttt...")
    samples = list(read_samples([given], IDS))
    assert [sample.name for sample in samples] == ["samples[0], row 0"]
    assert samples[0].answer is None
    assert samples[0].inputs["pixel_values"].shape[0] == 1
    assert "1 of 2 samples have no image" in caplog.text


def test_what_else_the_processor_gave_goes_with_its_row():
    given = batch("tittt", "tittt")
    given |= {
        "image_sizes": torch.tensor([[8, 8], [8, 8]]),
        "mm_token_type_ids": (given["input_ids"] == IMAGE).long(),
    }
    for row, sample in enumerate(read_samples([given], IDS)):
        assert torch.equal(sample.inputs["image_sizes"], given["image_sizes"][row : row + 1])
        assert torch.equal(sample.inputs["mm_token_type_ids"], given["mm_token_type_ids"][row : row + 1])
    (alone,) = read_samples([{**batch("tittt"), "extra": torch.ones(7)}])
    assert alone.inputs["extra"].shape == (7,)


def test_images_side_by_side_and_tiles():
    """Fewer runs of image tokens than images: all take the same number of tokens."""
    given = batch("tiittt", "tittttttt")
    assert [len(s.inputs["pixel_values"]) for s in read_samples([given], IDS)] == [2, 1]
    sized = given | {"image_sizes": torch.tensor([[8, 8], [8, 4], [8, 8]])}
    with pytest.raises(InputError, match="3 images belong to which row cannot be known"):
        list(read_samples([sized], IDS))


def changed(given, **values):
    return {**given, **values}


GOOD = batch("tittttt", answers=[2])
TWO = batch("tittttt", "tittttt", answers=[2, 2])


def labelled(*places, shift=0):
    labels = torch.full_like(GOOD["input_ids"], -100)
    for place in places:
        labels[0, place] = GOOD["input_ids"][0, place + shift]
    return changed(GOOD, labels=labels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(GOOD, labels=GOOD["labels"][:, 1:]), r"labels \[1, 9\] is not aligned with input_ids \[1, 10\]"),
        (labelled(-3, -2, shift=1), "misaligned"),
        (labelled(-1, -3), "one answer at the end"),
        (labelled(-2, -3), "one answer at the end"),
        (labelled(), "empty answer"),
        (labelled(*range(-5, 0)), "no question behind the image: 0 tokens"),
        (labelled(*range(-4, 0)), "no question behind the image: 1 tokens"),
        (changed(GOOD, pixel_values=None), "image tokens, but there are no pixel_values"),
        (changed(batch("ttttt"), pixel_values=torch.zeros(1, 3, 8, 8)), "pixel_values, but no image token"),
        (changed(GOOD, pixel_values=[torch.zeros(3, 8, 8)]), "return_tensors='pt'"),
        (changed(GOOD, input_ids=GOOD["input_ids"][0]), r"expected \[batch, tokens\]"),
        (changed(TWO, attention_mask=None), "which tokens are padding"),
        (changed(TWO, attention_mask=TWO["attention_mask"][:, 1:]), "attention_mask .* is not aligned"),
        (changed(TWO, pixel_values=torch.zeros(3, 3, 8, 8)), "3 images belong to which row cannot be known"),
        (changed(TWO, extra=torch.ones(7)), "what of extra"),
    ],
)
def test_batches_that_cannot_be_used(given, message):
    with pytest.raises(InputError, match=rf"^samples\[1\].*{message}"):
        list(read_samples([GOOD, given], IDS))


def test_several_rows_need_the_image_token():
    with pytest.raises(InputError, match=r"samples\[0\]: which of 2 images .* pass the processor"):
        list(read_samples([TWO]))
    assert len(list(read_samples([TWO], SimpleNamespace(image_token_index=IMAGE)))) == 2


# ---------------------------------------------------------------- keys


def test_the_key_is_the_contents():
    inputs = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.ones(1, 3, 2, 2)}
    key = Sample.of(inputs, (1,)).key
    assert key == "aa64fd93a28a61cc7aed04af125c27bd"  # the same in each run and on each machine
    assert key == Sample.of(dict(reversed(inputs.items())), [1], name="other").key
    assert key == Sample.of({**inputs, "attention_mask": torch.ones(1, 2)}, (1,)).key
    others = [
        Sample.of(inputs, None),
        Sample.of(inputs, (1, 1)),
        Sample.of({**inputs, "input_ids": torch.tensor([[1, 3]])}, (1,)),
        Sample.of({**inputs, "pixel_values": torch.ones(1, 3, 2, 2).bfloat16()}, (1,)),
        Sample.of({**inputs, "pixel_values": torch.ones(1, 3, 4, 1)}, (1,)),
    ]
    assert len({key, *(other.key for other in others)}) == 6
