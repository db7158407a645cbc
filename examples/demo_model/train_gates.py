"""Trains the demo model's exit gates by DyVTE's procedure (arXiv 2411.19628) and writes them as a plan.

Four steps, each on other photographs than the next: labels and features of training questions, gates trained on them, a
threshold chosen on calibration questions, and the outcome measured on the shipped test split, through generate() of the
optimized model. Labels and features are cached in --work: an interrupted run goes on where it was, and a second run
only trains.

The paper draws one layer per step and continues the batch with and without visual tokens. Here one pass over an image
and all its questions gives the labels of all layers, which are the same: after each layer the text tokens alone branch
off, and they are few.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import TYPES, Question, load_split
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vte_compile import GateExit, Plan, StaticExit, optimize
from vte_compile.families.decoder import find_decoder
from vte_compile.fingerprint import Fingerprint
from vte_compile.oracle import embed

ASSETS = Path(__file__).parents[2] / "vte_compile" / "demo" / "assets"
IGNORE = -100
SHARED, PADDING = -1, -2  # owners of the tokens that are no question's own

# The paper's two conditions for the label "may exit".
AGREEING_POSITIONS, LOSS_RATIO = 0.99, 1.03

SCENES_AT_ONCE = 8
SHARD = 64  # scenes per cache file
QUESTIONS_PER_SCENE = {"train": 16, "calibration": 8}
Conversation = tuple[Image.Image, Sequence[str], Sequence[list[int]]]
"""An image, questions about it, and their answers' tokens."""


@dataclass(frozen=True)
class Packed:
    """Images with all their questions and answers behind them, one row each; [B, T] but for `pixels`.

    `owner` is the number of the question that a token belongs to, counted over all rows. `label` is the token to be
    predicted where an answer is, else IGNORE. `asked` marks the prompt's tokens of a question, `last` the last of them.
    """

    ids: Tensor
    positions: Tensor
    owner: Tensor
    label: Tensor
    asked: Tensor
    last: Tensor
    pixels: Tensor


@dataclass(frozen=True)
class Examined:
    """What exits do to n questions, for the decoder's L layers.

    `features` [L - 1, n, 2C]: what the gate after each layer but the last reads. `same` [L - 1, n]: the share of answer
    positions whose argmax an exit after that layer leaves as it is. `loss` [L, n]: mean cross-entropy of the answer for
    each exit, and in the last row for none.
    """

    features: Tensor
    same: Tensor
    loss: Tensor

    @property
    def unchanged(self) -> Tensor:
        """[L - 1, n]: no answer position changes."""
        return self.same == 1

    def may_exit(self, slack: float) -> Tensor:
        """[L - 1, n]: the label. With a slack of 0 it is the paper's; see --slack."""
        return (self.same > AGREEING_POSITIONS) & (self.loss[:-1] < LOSS_RATIO * self.loss[-1] + slack)


def prompt_of(processor: Any, question: str) -> str:
    """The prompt as text, with one placeholder for the image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def pack(processor: Any, conversations: Sequence[Conversation]) -> Packed:
    """Lay out each image with its questions in one row: what stands before the image, the image, the questions."""
    rows, pixels, owner = [], [], 0
    for image, questions, answers in conversations:
        inputs = processor(images=image, text=prompt_of(processor, questions[0]), return_tensors="pt")
        ids = inputs["input_ids"][0]
        ids = ids[: int((ids == processor.image_token_id).nonzero().max()) + 1].tolist()
        shared = len(ids)
        row = {"ids": ids, "positions": list(range(shared)), "owner": [SHARED] * shared, "label": [IGNORE] * shared}
        row |= {"asked": [False] * shared, "last": [False] * shared}
        for question, answer in zip(questions, answers, strict=True):
            prompt = processor.tokenizer(prompt_of(processor, question))["input_ids"]
            append_question(row, prompt[prompt.index(processor.image_token_id) + 1 :], answer, owner, shared)
            owner += 1
        rows.append(row)
        pixels.append(inputs["pixel_values"])
    fill = {"ids": processor.tokenizer.pad_token_id, "positions": 0, "owner": PADDING, "label": IGNORE}
    fill |= {"asked": False, "last": False}
    columns = {
        name: nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, value)
        for name, value in fill.items()
    }
    return Packed(**columns, pixels=torch.cat(pixels))


def append_question(row: dict[str, list[Any]], prompt: list[int], answer: list[int], owner: int, start: int) -> None:
    """Append a question and its answer, whose last token is only predicted, as if they began at position `start`."""
    asked, length = len(prompt), len(prompt) + len(answer) - 1
    row["ids"] += prompt + answer[:-1]
    row["positions"] += range(start, start + length)
    row["owner"] += [owner] * length
    row["label"] += [IGNORE] * (asked - 1) + answer
    row["asked"] += [True] * asked + [False] * (length - asked)
    row["last"] += [n == asked - 1 for n in range(length)]


def visibility(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T]: a token sees what is shared and its own question, up to itself."""
    visible = (owner[:, None, :] == owner[:, :, None]) | (owner == SHARED)[:, None, :]
    return torch.zeros(visible.shape, dtype=dtype, device=owner.device).masked_fill(~visible.tril(), -torch.inf)[
        :, None
    ]


def mean_per_question(values: Tensor, owner: Tensor) -> Tensor:
    """Means over the tokens of each question: [..., tokens, d] -> [..., questions, d]."""
    number = int(owner.max()) + 1
    count = torch.bincount(owner, minlength=number).to(values.dtype)
    sums = values.new_zeros(*values.shape[:-2], number, values.shape[-1])
    return sums.index_add(values.ndim - 2, owner, values) / count[:, None]


def run_layer(decoder: Any, index: int, hidden: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """One decoder layer over hidden [B, T, C], without a cache."""
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    output = decoder.layers[index](
        hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False
    )
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@torch.no_grad()
def examine(model: LlavaForConditionalGeneration, packed: Packed) -> Examined:
    """Features, changes and losses of all exits, from one pass with the images and one branch of text per exit."""
    decoder: Any = find_decoder(model)
    hidden, visual = embed(model, packed.ids, packed.pixels)
    text = ~visual[0]  # the image stands in the same columns of each row
    mask, owner, layers = visibility(packed.owner, hidden.dtype), packed.owner, len(decoder.layers)
    text_mask, text_positions = mask[:, :, text][..., text], packed.positions[:, text]
    rest = packed.asked & ~packed.last
    features, branches = [], hidden.new_empty(0, *hidden[:, text].shape)
    for index in range(layers):
        hidden = run_layer(decoder, index, hidden, mask, packed.positions)
        if n := len(branches):
            branches = run_layer(
                decoder, index, branches.flatten(0, 1), text_mask.repeat(n, 1, 1, 1), text_positions.repeat(n, 1)
            ).unflatten(0, (n, -1))
        branches = torch.cat([branches, hidden[None, :, text]])
        features.append(torch.cat([mean_per_question(hidden[rest], owner[rest]), hidden[packed.last]], -1))
    labeled = packed.label != IGNORE
    logits = model.lm_head(decoder.norm(branches[:, labeled[:, text]])).float()
    target, chosen = packed.label[labeled].expand(layers, -1), logits.argmax(-1)
    losses = F.cross_entropy(logits.mT, target, reduction="none")
    measured = torch.stack([losses, (chosen == chosen[-1]).float()], -1)
    loss, same = mean_per_question(measured, owner[labeled]).unbind(-1)
    return Examined(torch.stack(features[:-1]).float(), same[:-1], loss)


@torch.no_grad()
def generate(
    model: Any, processor: Any, asked: Sequence[tuple[Image.Image, str]], batch: int = 32
) -> tuple[list[list[int]], list[int]]:
    """Greedy answers' tokens, the end token included, and the exit layers (-1 = never)."""
    end = processor.tokenizer.eos_token_id
    answers: list[list[int]] = []
    exits: list[int] = []
    for start in tqdm(range(0, len(asked), batch), "generate", leave=False, dynamic_ncols=True):
        images, questions = zip(*asked[start : start + batch], strict=True)
        texts = [prompt_of(processor, question) for question in questions]
        inputs = processor(images=list(images), text=texts, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, do_sample=False)
        exits += getattr(output, "exit_layer", torch.full((len(texts),), -1)).tolist()
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            answers.append(row[: row.index(end) + 1] if end in row else row)
    return answers, exits


def answer_truly(processor: Any, questions: Sequence[Question]) -> list[list[int]]:
    """The right answers' tokens, the end token included."""
    tokenizer = processor.tokenizer
    return [[*tokenizer(q.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for q in questions]


def examine_scenes(
    model: LlavaForConditionalGeneration,
    processor: Any,
    scenes: Sequence[tuple[Image.Image, list[Question]]],
    own_answers: bool,
) -> Examined:
    """Examine the questions of some scenes, with the right answers or with those the model itself gives."""
    if own_answers:
        given = iter(
            generate(model, processor, [(image, q.question) for image, questions in scenes for q in questions])[0]
        )
        answers = [list(islice(given, len(questions))) for _, questions in scenes]
    else:
        answers = [answer_truly(processor, questions) for _, questions in scenes]
    parts = []
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        chunk = [
            (image, [q.question for q in questions], tokens)
            for (image, questions), tokens in zip(scenes, answers, strict=True)
        ][start : start + SCENES_AT_ONCE]
        packed = Packed(*(value.to(model.device) for value in vars(pack(processor, chunk)).values()))
        parts.append(examine(model, packed))
    return concatenate(parts)


def concatenate(parts: Sequence[Examined]) -> Examined:
    """The questions of all parts, on the CPU."""
    return Examined(*(torch.cat([vars(part)[name] for part in parts], 1).cpu() for name in Examined.__annotations__))


def collect(
    model: LlavaForConditionalGeneration,
    processor: Any,
    scenes: Iterator[tuple[Image.Image, list[Question]]],
    shards: Sequence[Path],
    own_answers: bool,
) -> Examined:
    """Examine SHARD scenes for each of the files in `shards`; those already written are only read."""
    parts = []
    for path in tqdm(shards, "labels and features", unit=f" x {SHARD} scenes", dynamic_ncols=True):
        drawn = list(islice(scenes, SHARD))
        if not path.exists():
            examined = examine_scenes(model, processor, drawn, own_answers)
            save_file({name: value.contiguous() for name, value in vars(examined).items()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        parts.append(Examined(**load_file(path)))
    return concatenate(parts)


@dataclass(frozen=True)
class Recipe:
    """How the gates are trained: their own width M, and AdamW's settings."""

    width: int
    epochs: int
    seed: int
    rate: float = 3e-3
    decay: float = 0.01
    batch: int = 256


def train_gates(features: Tensor, labels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Train one gate per layer, all side by side.

    Args:
        features: [G, n, 2C].
        labels: [G, n], True where the sample may exit.

    Returns:
        w1 [G, M, 2C] and w2 [G, 2, M]. The features are scaled to unit size in training, which w1 absorbs.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    gates, samples, inputs = features.shape
    scale = features.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    scaled, target = features / scale, labels.long()
    w1 = (torch.randn(gates, recipe.width, inputs, generator=generator) * inputs**-0.5).to(features.device)
    w2 = (torch.randn(gates, 2, recipe.width, generator=generator) * recipe.width**-0.5).to(features.device)
    weights = [w1.requires_grad_(), w2.requires_grad_()]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * (samples // recipe.batch)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    progress = tqdm(range(recipe.epochs), "gates", unit="epoch", dynamic_ncols=True)
    for _ in progress:
        order = torch.randperm(samples, generator=generator).to(features.device)
        for chosen in order.split(recipe.batch)[: samples // recipe.batch]:
            z = F.gelu(scaled[:, chosen] @ w1.mT) @ w2.mT
            # A mean over the samples and a sum over the gates, which share nothing.
            loss = F.cross_entropy(z.permute(1, 2, 0), target[:, chosen].T) * gates
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item() / gates:.3f}")
    return (w1.detach() / scale).contiguous(), w2.detach()


def scores_of(features: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """z[exit] - z[keep] of each gate: [G, n]."""
    z = F.gelu(features @ w1.mT) @ w2.mT
    return z[..., 1] - z[..., 0]


@dataclass(frozen=True)
class Choice:
    """A threshold for all gates, and what it leads to where it was chosen."""

    threshold: float
    agreement: float
    mean_cost: float


def outcome(scores: Tensor, unchanged: Tensor, threshold: float) -> Choice:
    """Agreement and mean cost when each sample exits at the first gate whose score [G, n] exceeds the threshold.

    The cost of an exit is the number of layers that the image went through.
    """
    fires = F.pad(scores > threshold, (0, 0, 0, 1), value=True)
    first = fires.int().argmax(0, keepdim=True)
    kept = F.pad(unchanged, (0, 0, 0, 1), value=True).gather(0, first)
    return Choice(threshold, kept.double().mean().item(), (first + 1).double().mean().item())


def choose_threshold(scores: Tensor, unchanged: Tensor, target: float, tries: int = 1000) -> Choice:
    """The cheapest threshold that leaves at least a share `target` of the answers unchanged.

    Scores are differences of two logits, so one threshold for all gates asks of each the same confidence. Thresholds
    of their own, chosen greedily, did no better on questions they were not chosen on.
    """
    candidates = torch.linspace(scores.min().item(), scores.max().item(), tries).tolist()
    found = (outcome(scores, unchanged, threshold) for threshold in candidates)
    return min((each for each in found if each.agreement >= target), key=lambda each: each.mean_cost)


def build_plan(model: nn.Module, w1: Tensor, w2: Tensor, threshold: float) -> Plan:
    """One gate after each layer but the last."""
    gates = zip(w1.cpu(), w2.cpu(), strict=True)
    exits = [GateExit(layer, first.clone(), second.clone(), threshold) for layer, (first, second) in enumerate(gates)]
    return Plan(exits, Fingerprint.of(model))


@dataclass(frozen=True)
class Shipped:
    """The questions of a shipped split."""

    asked: list[tuple[Image.Image, str]]
    types: list[str]
    answers: list[str]

    @classmethod
    def load(cls, folder: Path) -> "Shipped":
        """Read what build_assets.py wrote."""
        entries = json.loads((folder / "questions.json").read_text())
        images = {name: Image.open(folder / name).convert("RGB") for name in {entry["image"] for entry in entries}}
        asked = [(images[entry["image"]], entry["question"]) for entry in entries]
        return cls(asked, [entry["type"] for entry in entries], [entry["answer"] for entry in entries])


def measures(right: Sequence[float], same: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Means over some questions, rounded for the record."""
    named = {"mean_cost": costs, "agreement": same, "accuracy": right}
    return {name: round(sum(values) / len(values), 4) for name, values in named.items()}


def evaluate(model: LlavaForConditionalGeneration, processor: Any, test: Shipped, plan: Plan) -> dict[str, Any]:
    """What the plan, each static exit and no exit do to the shipped questions, through generate().

    Returns a row for each: mean cost, agreement with the full model, accuracy, how many samples had each cost, and the
    means by question type.
    """
    layers = model.config.get_text_config().num_hidden_layers
    full, _ = generate(model, processor, test.asked)

    def row(answers: list[list[int]], exits: list[int]) -> dict[str, Any]:
        texts = processor.batch_decode(answers, skip_special_tokens=True)
        right = [text == answer for text, answer in zip(texts, test.answers, strict=True)]
        same = [mine == other for mine, other in zip(answers, full, strict=True)]
        costs = [layer + 1 if layer >= 0 else layers for layer in exits]
        by_type = {}
        for kind in filter(set(test.types).__contains__, TYPES):
            chosen = [n for n, other in enumerate(test.types) if other == kind]
            by_type[kind] = measures(*([values[n] for n in chosen] for values in (right, same, costs)))
        histogram = [costs.count(cost) for cost in range(1, layers + 1)]
        return measures(right, same, costs) | {"cost_histogram": histogram, "by_type": by_type}

    fast = optimize(model, plan)
    rows = {"learned": row(*generate(fast, processor, test.asked))}
    for layer in tqdm(range(layers - 1), "static exits", dynamic_ncols=True):
        static = optimize(fast, Plan([StaticExit(layer)]))
        rows[f"static after layer {layer}"] = row(*generate(static, processor, test.asked))
    return rows | {"full model": row(full, [-1] * len(full))}


def cheapest_static(rows: dict[str, dict[str, Any]]) -> float:
    """The least cost at which an exit at one layer, or none, agrees with the full model as often as the gates do."""
    static = [row for name, row in rows.items() if name != "learned"]
    return min(row["mean_cost"] for row in static if row["agreement"] >= rows["learned"]["agreement"])


def table(header: str, rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of measures."""
    lines = [f"| {header} | mean cost | agreement | accuracy |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['mean_cost']:.2f} | {row['agreement']:.3f} | {row['accuracy']:.3f} |")
    return "\n".join(lines)


CARD = """# Exit gates of the demo model

A plan for the model in `../model`: after each decoder layer but the last, a gate of {parameters:,} parameters decides
whether the visual tokens of a sample leave. Load it with `Plan.from_pretrained`, or let `vte-compile demo` show it.

On the {test} shipped test questions, through `optimize(model, plan).generate()`:

{outcome}

The cost of an exit after layer k is k + 1, the number of layers that the visual tokens go through; without an exit it
is {layers}. Agreement is the share of questions whose whole answer is that of the full model. To agree as often as the
gates, an exit at one layer for all samples would cost {static:.2f}.

Of the gates, by question type:

{by_type}

## How it was made

By `examples/demo_model/train_gates.py`, with seed {seed}, in DyVTE's way (arXiv 2411.19628). The model is frozen. A
question of the training split may exit after a layer if then no answer token's argmax changes, and the answer's
cross-entropy stays below 1.03 times the full model's plus {slack:g} nats. The paper has no such slack; this model's
losses are so small that a ratio alone would call noise a difference. {train} questions, {epochs} epochs, AdamW.

The gates share one threshold, {threshold:.2f} (a confidence of {confidence:.3f}): the lowest that left {target:.1%} of
{calibration} calibration questions unchanged, at mean cost {calibration_cost:.2f}. Training, calibration and test have
no photograph in common. `metrics.json` has all numbers.

The gates know this model, and questions as it was trained on, only: a plan for another model is refused, and for other
pictures the threshold should be chosen anew.
"""


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Write the numbers, and the card with the main ones filled in."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    recipe, training, chosen, rows = (metrics[name] for name in ("recipe", "training", "calibration", "test"))
    card = CARD.format(
        parameters=metrics["gate_parameters"],
        test=metrics["test_questions"],
        outcome=table("exit", rows),
        layers=metrics["layers"],
        static=metrics["static_cost_of_same_agreement"],
        by_type=table("type", rows["learned"]["by_type"]),
        seed=recipe["seed"],
        slack=training["slack"],
        train=training["questions"],
        epochs=recipe["epochs"],
        threshold=chosen["threshold"],
        confidence=torch.tensor(chosen["threshold"]).sigmoid().item(),
        target=chosen["target"],
        calibration=chosen["questions"],
        calibration_cost=chosen["mean_cost"],
    )
    (folder / "README.md").write_text(card)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for cached labels and features")
    parser.add_argument("--model", type=Path, default=ASSETS / "model", help="folder of the model (default: shipped)")
    parser.add_argument("--test", type=Path, default=ASSETS / "test", help="folder of the test split")
    parser.add_argument("--out", type=Path, default=ASSETS / "plan", help="folder for the plan, its card and metrics")
    parser.add_argument("--data", help="folder with Fashion-MNIST (default: $FASHION_MNIST, or where Debian has it)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scenes", type=int, default=2048, help=f"training scenes, in steps of {SHARD}")
    parser.add_argument("--calibration-scenes", type=int, default=512, help=f"in steps of {SHARD}")
    parser.add_argument(
        "--slack",
        type=float,
        default=0.03,
        help="nats by which the loss of an answer may grow beside the paper's factor of 1.03; 0 is the paper's label",
    )
    parser.add_argument("--target", type=float, default=0.99, help="share of calibration answers to leave unchanged")
    parser.add_argument("--width", type=int, default=64, help="the gates' own width M")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Make the plan, save it, and measure it."""
    options, began = parse(), time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()
    model = LlavaForConditionalGeneration.from_pretrained(options.model).eval().to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)

    def questions(split: str, scenes: int, own_answers: bool) -> Examined:
        drawn = load_split(split, scenes, QUESTIONS_PER_SCENE[split], options.data)
        shards = [options.work / f"{sha256[:12]}-{split}-{n}.safetensors" for n in range(scenes // SHARD)]
        return collect(model, processor, drawn, shards, own_answers)

    train = questions("train", options.scenes, own_answers=False)
    calibration = questions("calibration", options.calibration_scenes, own_answers=True)
    labels, recipe = train.may_exit(options.slack), Recipe(options.width, options.epochs, seed=options.seed)
    w1, w2 = train_gates(train.features.to(options.device), labels.to(options.device), recipe)
    scores = scores_of(calibration.features, w1.cpu(), w2.cpu())
    chosen = choose_threshold(scores, calibration.unchanged, options.target)
    plan = build_plan(model, w1, w2, chosen.threshold)
    plan.save_pretrained(options.out)

    test = Shipped.load(options.test)
    rows = evaluate(model, processor, test, plan)
    metrics = {
        "model_sha256": sha256,
        "layers": len(labels) + 1,
        "gate_parameters": w1[0].numel() + w2[0].numel(),
        "recipe": asdict(recipe),
        "training": {
            "questions": labels.shape[1],
            "slack": options.slack,
            "may_exit": [round(share, 4) for share in labels.float().mean(1).tolist()],
        },
        "calibration": {"questions": scores.shape[1], "target": options.target, **asdict(chosen)},
        "test_questions": len(test.asked),
        "static_cost_of_same_agreement": cheapest_static(rows),
        "test": rows,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(time.monotonic() - began),
    }
    write_card(options.out, metrics)
    print(table("exit", rows))


if __name__ == "__main__":
    main()
