"""Does each engine of the shipped model answer as the optimized model does, token for token?

    python benchmarks/engine_answers.py --json benchmarks/results/engine_answers.json

Over the whole shipped test set, greedily, with the learned exits: both forms of the ONNX engine, in three precisions.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import JsonOption, write_report
from PIL import Image
from rich.console import Console
from tqdm import tqdm

import vte_compile
from vte_compile.demo.data import Assets
from vte_compile.loading import load_model, load_processor
from vte_compile.loading import prompt as in_template


def main(
    questions: Annotated[int | None, typer.Option(help="How many; default: all.")] = None,
    threads: int = 1,
    json_file: JsonOption = None,
) -> None:
    """Count the answers that are the same."""
    logging.disable(logging.WARNING)
    rows = compare(questions, threads)
    for row in rows:
        Console().print(f"{row['case']}: {row['same_tokens']} of {row['questions']} answers with the same tokens")
    if json_file is not None:
        write_report(json_file, "engine_answers.py", {"threads": threads}, rows)


def compare(count: int | None, threads: int) -> list[dict[str, Any]]:
    """Each engine's answers beside the optimized model's."""
    torch.set_num_threads(threads)
    assets = Assets.find()
    model, processor = load_model(assets.model, "cpu"), load_processor(assets.model)
    fast = vte_compile.optimize(model, vte_compile.Plan.from_pretrained(assets.plan), compile=False)
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for kind in ("float32", "int8", "int4"):
            path, quantize = Path(folder) / kind, None if kind == "float32" else kind
            vte_compile.export(fast, path, target="onnxruntime", quantize=quantize)
            for form in ("staged", "single"):
                engines[kind, form] = vte_compile.load_engine(path, threads=threads, form=form)
        same = dict.fromkeys(engines, 0)
        asked = assets.questions if count is None else assets.spread(count)
        for question in tqdm(asked, desc="questions", unit="question"):
            text = in_template(processor, question.text, 1)
            inputs = processor(images=[Image.open(question.image)], text=text, return_tensors="pt")
            ids = inputs["input_ids"]
            wanted = fast.generate(**inputs, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :].tolist()
            for key, engine in engines.items():
                given = engine.generate(
                    ids.numpy(), pixel_values=inputs["pixel_values"].numpy(), do_sample=False, max_new_tokens=10
                )
                same[key] += given.tokens[0, : given.lengths[0]].tolist() == wanted
    return [
        {"case": f"{kind}, {form}", "questions": len(asked), "same_tokens": number}
        for (kind, form), number in same.items()
    ]


if __name__ == "__main__":
    typer.run(main)
