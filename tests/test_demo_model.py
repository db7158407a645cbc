"""The demo model: its assets load and answer; its training script is deterministic and resumes exactly."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vte_compile import GateExit, Plan, SkippedAttention
from vte_compile.fingerprint import Fingerprint
from vte_compile.tuning.guarantee import Certificate
from vte_compile.tuning.ranking import DeletionEffect, SkipRanking
from vte_compile.tuning.report import CalibrationReport, LayerReport

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "vte_compile" / "demo" / "assets"
MODULES = ("scenes", "model", "train", "build_assets", "make_plans")


@pytest.fixture
def example(monkeypatch):
    """The example's modules, importable under their bare names for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "demo_model")
    loaded = SimpleNamespace(**{name: __import__(name) for name in MODULES})
    yield loaded
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ASSETS / "model", local_files_only=True)


@pytest.fixture(scope="module")
def shipped():
    return json.loads((ASSETS / "test" / "questions.json").read_text())


@pytest.fixture
def photos(example):
    """Stand-in photographs: noise of another brightness for each class."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(20 + 35 * label, 56 + 35 * label, (20, 24, 24), np.uint8) for label in range(6)]
    return example.scenes.Photos(noise)


def ask(processor, entry):
    """The processor's inputs for a shipped question."""
    content = [{"type": "image"}, {"type": "text", "text": entry["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=Image.open(ASSETS / "test" / entry["image"]), text=text, return_tensors="pt")


def test_answers_shipped_questions(processor, shipped):
    model = LlavaForConditionalGeneration.from_pretrained(ASSETS / "model", local_files_only=True).eval()
    sample = shipped[::16]
    right = 0
    for entry in sample:
        inputs = ask(processor, entry)
        output = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(output, skip_special_tokens=True) == entry["answer"]
    assert right / len(sample) > 0.85


def test_processor_gives_what_the_model_was_trained_on(processor, shipped, example):
    inputs = ask(processor, shipped[0])
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_token).sum() == 144
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    assert processor.tokenizer.padding_side == "left"

    stage = example.train.LanguageStage(example.model.build_model(layers=1))
    packed = stage.pack([[example.scenes.Question(shipped[0]["type"], shipped[0]["question"], "")]])
    trained_on = [*stage.prefix, *[image_token] * 144, *packed.ids[0].tolist()]
    assert inputs["input_ids"][0].tolist() == trained_on

    pixels = np.asarray(Image.open(ASSETS / "test" / shipped[0]["image"]))
    scene = example.scenes.Scene(pixels, np.empty(0), np.empty(0))
    assert torch.equal(inputs["pixel_values"], example.train.to_pixels([scene], torch.device("cpu")))


def test_test_split_is_complete(shipped, example):
    assert {entry["type"] for entry in shipped} == set(example.scenes.TYPES)
    images = {entry["image"] for entry in shipped}
    assert images == {path.name for path in (ASSETS / "test").glob("*.png")}
    assert len(shipped) == 8 * len(images) == 8 * example.build_assets.TEST_SCENES


def test_shipped_split_is_the_one_the_script_draws(shipped, example):
    try:
        drawn = list(example.scenes.load_split("test", 3))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for index, (image, questions) in enumerate(drawn):
        entries = [entry for entry in shipped if entry["image"] == f"{index:03}.png"]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(ASSETS / "test" / f"{index:03}.png")))
        assert [(q.question, q.answer) for q in questions] == [(e["question"], e["answer"]) for e in entries]


def test_missing_photographs_are_explained(example, tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        example.scenes.Photos.load("train", tmp_path)


def test_scenes_are_deterministic(example, photos):
    first, second = (example.scenes.draw_scene(photos, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    asked = [example.scenes.draw_questions(first, 12, np.random.default_rng(8)) for _ in range(2)]
    assert asked[0] == asked[1]
    assert len(set(asked[0])) == 12


def test_answers_are_true(example):
    """Against a scene written out by hand: a red bag at the top left, a blue bag below, a blue coat at its right."""
    scenes = example.scenes
    classes, colors = np.full((2, 4, 4), scenes.EMPTY)
    for row, column, thing, color in [(0, 0, "bag", "red"), (1, 0, "bag", "blue"), (1, 1, "coat", "blue")]:
        classes[row, column] = scenes.CLASS_NAMES.index(thing)
        colors[row, column] = scenes.COLOR_NAMES.index(color)
    scene = scenes.Scene(np.zeros((96, 96, 3), np.uint8), classes, colors)
    rng = np.random.default_rng(0)
    answers = {q.question: q.answer for _ in range(60) for q in scenes.draw_questions(scene, 8, rng)}
    assert answers["what is at row 1 column 1?"] == "bag"
    assert answers["what is at row 4 column 4?"] == "nothing"
    assert answers["what color is at row 2 column 2?"] == "blue"
    assert answers["what color is the coat?"] == "blue"
    assert answers["what is the red item?"] == "bag"
    assert answers["is there a red bag?"] == "yes"
    assert answers["is there a red coat?"] == "no"
    assert answers["what row is the blue bag in?"] == "2"
    assert answers["list row 2."] == "blue bag blue coat nothing nothing"
    assert answers["how many bag are there?"] == "2"
    assert answers["how many blue items are there?"] == "2"


def test_packed_training_agrees_with_the_model(example, photos):
    """The packed forward pass sees exactly what the model sees at inference, one question at a time."""
    torch.manual_seed(0)
    model, processor = example.model.build_model(layers=2).eval(), example.model.build_processor()
    rng = np.random.default_rng(0)
    scene = example.scenes.draw_scene(photos, rng)
    questions = example.scenes.draw_questions(scene, 6, rng)
    stage = example.train.LanguageStage(model)
    packed = stage.pack([questions])
    with torch.no_grad():
        logits = iter(stage.logits([scene], packed))
        for question in questions:
            message = [{"type": "image"}, {"type": "text", "text": question.question}]
            text = processor.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)
            inputs = processor(
                images=Image.fromarray(scene.image), text=f"{text} {question.answer}", return_tensors="pt"
            )
            answered = len(question.answer.split()) + 1
            for expected in model(**inputs).logits[0, -answered:]:
                torch.testing.assert_close(next(logits), expected, rtol=1e-4, atol=1e-5)
        assert next(logits, None) is None


@pytest.mark.parametrize("stopped", [{"vision": 1, "language": 0}, {"vision": 3, "language": 2}])
def test_training_resumes_bit_identically(example, photos, monkeypatch, tmp_path, stopped):
    train = example.train
    monkeypatch.setattr(example.scenes.Photos, "load", lambda split, root: photos)
    for stage in (train.VisionStage, train.LanguageStage):
        monkeypatch.setattr(stage, "evaluate", lambda self, photos: {})
    steps = {"vision": 3, "language": 4}

    def run(folder, resume=False, stop=None):
        settings = train.Settings(seed=0, steps=steps, layers=1, batch={"vision": 2, "language": 1})
        if stop:
            step_of, calls = train.train_step, []

            def interrupted(stage, *rest):
                calls.append(stage.name)
                if calls.count("vision") > stop["vision"] or calls.count("language") > stop["language"]:
                    raise KeyboardInterrupt
                return step_of(stage, *rest)

            monkeypatch.setattr(train, "train_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train.train(settings, folder, None, "cpu", resume, every=1)
            monkeypatch.setattr(train, "train_step", step_of)
        else:
            train.train(settings, folder, None, "cpu", resume, every=1)

    run(tmp_path / "straight")
    run(tmp_path / "halted", stop=stopped)
    run(tmp_path / "halted", resume=True)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "halted")]
    assert weights[0] == weights[1]


def test_plans_are_made_from_one_question_per_scene_without_its_answer(example, photos, monkeypatch):
    monkeypatch.setattr(example.scenes.Photos, "load", lambda split, root: photos)
    asked = list(example.make_plans.conversations("calibration", 3, None))
    assert [set(each) for each in asked] == [{"image", "question"}] * 3
    assert len({each["image"].tobytes() for each in asked}) == 3


def test_a_plan_is_written_with_its_card(example, tmp_path):
    model = example.model.build_model(layers=2, hidden=32, vision_hidden=32)
    gate = GateExit(0, torch.ones(4, 64), torch.ones(2, 4), 1.5)
    plan = Plan([gate], Fingerprint.of(model), [SkippedAttention(1)])
    certificate = Certificate("exact", 200, 0.02, 0.05, (1.5,), 3, 0.04, 0.019, 7, 50.0, 80.0)
    report = CalibrationReport(
        samples={"train": 500, "selection": 200, "certification": 200},
        settings={"seed": 0},
        layers=(LayerReport(0, 0.5, 0.9, 0.95, 1.5, 0.75, 2),),
        certificate=certificate,
        cost_unit="FLOPs",
        widths=(),
    )
    ranking = SkipRanking(plan.fingerprint, 64, 0.1, ((DeletionEffect(1, 0.0, 0.0, 0.0),),), (1,))
    example.make_plans.save(tmp_path, "exits and skips", plan, report, ranking)
    again = Plan.from_pretrained(tmp_path)
    assert (again.exits[0].threshold, [skip.layer for skip in again.skips]) == (1.5, [1])
    card = (tmp_path / "README.md").read_text()
    for text in ("<= 2%, with confidence 95%", "3 of 200", "1/1.60", "900 scenes", "| 0 | 1.50 | 75.0% | 2 |",
                 "| never | | 25.0% | 1 |", "of layer 1, without adapters, found on 64 scenes"):  # fmt: skip
        assert text in card
    made = json.loads((tmp_path / "calibration.json").read_text())
    assert made["certificate"]["changed"] == 3
    assert made["environment"]["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "ranking.json").read_text())["chosen"] == [1]
