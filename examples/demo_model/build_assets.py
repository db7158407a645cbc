"""Turns a trained model into the package's demo assets: model folder, model card, and the held-out test split.

The accuracy in the model card is that of model.generate() on the shipped images, read through the shipped processor.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from model import build_processor
from PIL import Image
from scenes import TYPES, load_split
from transformers import AutoProcessor, LlavaForConditionalGeneration

TEST_SCENES = 160
QUESTIONS_PER_SCENE = 8
CARD = Path(__file__).with_name("model_card.md")
NOTICE = Path(__file__).with_name("FASHION_MNIST_LICENSE")


def write_test_split(folder: Path, data: str | None) -> None:
    """Write the test scenes as PNG files, their questions as JSON, and the photographs' licence."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (image, questions) in enumerate(load_split("test", TEST_SCENES, QUESTIONS_PER_SCENE, data)):
        name = f"{index:03}.png"
        image.save(folder / name, optimize=True)
        for question in questions:
            entries.append(
                {"image": name, "type": question.type, "question": question.question, "answer": question.answer}
            )
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "questions.json").write_text(f"[\n{lines}\n]\n")
    (folder / "LICENSE").write_text(NOTICE.read_text())


def write_model(source: Path, folder: Path) -> None:
    """Save the trained model with its tokenizer, processor and chat template."""
    LlavaForConditionalGeneration.from_pretrained(source).save_pretrained(folder)
    build_processor().save_pretrained(folder)


@torch.no_grad()
def measure(model_folder: Path, test_folder: Path, batch_size: int = 32) -> dict[str, float]:
    """Share of the shipped questions that generate() answers exactly, per type and over all."""
    model = LlavaForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    entries = json.loads((test_folder / "questions.json").read_text())
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(entries), batch_size):
        batch = entries[start : start + batch_size]
        content = [[{"type": "image"}, {"type": "text", "text": entry["question"]}] for entry in batch]
        inputs = processor(
            images=[Image.open(test_folder / entry["image"]) for entry in batch],
            text=[
                processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
                for parts in content
            ],
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for entry, answer in zip(batch, processor.batch_decode(output, skip_special_tokens=True), strict=True):
            right[entry["type"]].append(answer == entry["answer"])
    scores = {kind: sum(right[kind]) / len(right[kind]) for kind in TYPES}
    return scores | {"all": sum(map(sum, right.values())) / len(entries)}


def write_card(folder: Path, scores: dict[str, float]) -> None:
    """Write the model card with the measured accuracies filled in."""
    table = "\n".join(f"| {kind} | {score:.3f} |" for kind, score in scores.items())
    (folder / "README.md").write_text(CARD.read_text().replace("{accuracy}", table))


def main() -> None:
    """Parse the command line and write the assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model (train.py's OUT/model)")
    parser.add_argument("--out", type=Path, required=True, help="assets folder; gets model/ and test/")
    parser.add_argument("--data", help="folder with Fashion-MNIST (default: $FASHION_MNIST, or where Debian has it)")
    options = parser.parse_args()
    write_test_split(options.out / "test", options.data)
    write_model(options.model, options.out / "model")
    scores = measure(options.out / "model", options.out / "test")
    write_card(options.out / "model", scores)
    print("\n".join(f"{kind:10} {score:.3f}" for kind, score in scores.items()))


if __name__ == "__main__":
    main()
