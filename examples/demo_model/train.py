"""Trains the demo model: first its vision tower to name what each patch shows, then projector and decoder to answer.

Runs in one process, or data-parallel under torchrun. A run is a function of its seed and the number of processes: what
step n draws depends on (seed, stage, n) alone, so a resumed run ends with the very weights of an uninterrupted one.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from model import (
    EOS,
    PAD,
    PATCH,
    PATCHES,
    PIXEL_MEAN,
    PIXEL_STD,
    PREFIX,
    SUFFIX,
    VISUAL_TOKENS,
    build_model,
    build_tokenizer,
)
from scenes import (
    CELL,
    CLASS_NAMES,
    COLOR_NAMES,
    FILL,
    GRID,
    TYPES,
    Photos,
    Question,
    Scene,
    draw_questions,
    draw_scene,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
IGNORE = -100

# One image with many questions: its visual tokens, the expensive part of a prompt, are computed once for all of them.
QUESTIONS_PER_SCENE = 16


@dataclass(frozen=True)
class Phase:
    """A phase of the language stage: its first step, how full scenes are, and what is asked how often."""

    start: int
    fill: float
    by_class: float
    mix: dict[str, float]


# Naming what is in a given cell comes first. The search for what has a given color builds upon it, and is learned much
# sooner among few things; then the search for what has a given class, which hides behind the former unless asked for by
# itself. Then comes everything, above all what takes longest to learn.
CURRICULUM = [
    Phase(0, FILL, 0.5, dict(text=0.3, loc=0.8, loc_color=0.8, attr=1.5, exist=0.8, where=1.2, list=1.2, count=0.5)),
    Phase(750, 0.25, 0.5, dict(text=0.4, loc=0.2, loc_color=0.2, attr=4.0, exist=1.0, where=1.5, list=0.2, count=0.3)),
    Phase(1500, 0.4, 0.5, dict(text=0.2, loc=0.3, loc_color=0.2, attr=1.5, exist=1.2, where=1.5, list=0.5, count=2.0)),
    Phase(1750, 0.2, 0.9, dict(text=0.3, loc=0.2, loc_color=0.2, attr=4.0, exist=1.0, where=2.0, list=0.3, count=0.5)),
    Phase(2250, 0.45, 0.6, dict(text=0.2, loc=0.4, loc_color=0.3, attr=1.5, exist=1.2, where=1.4, list=0.6, count=2.0)),
    Phase(2750, FILL, 0.5, dict(text=0.2, loc=0.4, loc_color=0.3, attr=1.2, exist=1.2, where=1.4, list=0.8, count=2.0)),
    Phase(3000, FILL, 0.5, dict(text=0.5, loc=0.4, loc_color=0.3, attr=1.0, exist=1.2, where=1.0, list=0.8, count=2.5)),
]


class Muon(torch.optim.Optimizer):
    """Muon for matrices: momentum, orthogonalized, with an update as large as AdamW's.

    Unlike torch.optim.Muon it computes in fp32 (faster on CPU) and shares the matrices out among the processes.
    """

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            updates = [torch.zeros_like(parameter) for parameter in group["params"]]
            for index, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                if index % WORLD == RANK:
                    updates[index] = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
            sum_over_processes(updates)
            for parameter, update in zip(group["params"], updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, with Muon's coefficients."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if WORLD == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def build_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embeddings, output heads, norms and biases."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if p.ndim == 2 and not any(part in name for part in ("embed", "head"))]
    outside = [p for _, p in named if all(p is not q for q in inside)]
    return [Muon(inside), torch.optim.AdamW(outside, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))]


def rate_at(step: int, steps: int, peak: float, flat: float) -> float:
    """Learning rate: a short warm-up, the peak until the share `flat` of the steps, then linearly down to nothing."""
    warm = min(1.0, (step + 1) / min(60, max(1, steps // 10)))
    return peak * warm * min(1.0, (1 - step / steps) / (1 - flat))


def to_pixels(scenes: list[Scene], device: torch.device) -> Tensor:
    """What the processor makes of the scenes' images."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).to(device)
    return (images.permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


class VisionStage(nn.Module):
    """Trains the vision tower: every patch's output must tell the cell's class, color, row and column."""

    name, number, batch, peak_rate, flat = "vision", 0, 32, 3e-3, 0.5

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.sizes = [len(CLASS_NAMES) + 1, len(COLOR_NAMES) + 1, GRID, GRID]
        self.head = nn.Linear(self.tower.config.hidden_size, sum(self.sizes))
        cell = torch.arange(PATCHES) * PATCH // CELL
        self.register_buffer("rows", cell.repeat_interleave(PATCHES), persistent=False)
        self.register_buffer("columns", cell.repeat(PATCHES), persistent=False)

    def predict(self, scenes: list[Scene]) -> list[tuple[Tensor, Tensor]]:
        """Logits and targets for class, color, row and column, over all patches."""
        device = self.head.weight.device
        outputs = self.head(self.tower(to_pixels(scenes, device)).last_hidden_state[:, 1:]).flatten(0, 1)
        targets = []
        for cells in ([scene.classes for scene in scenes], [scene.colors for scene in scenes]):
            cells = torch.from_numpy(np.stack(cells)).to(device) + 1  # EMPTY becomes class 0
            targets.append(cells[:, self.rows.view(PATCHES, PATCHES), self.columns.view(PATCHES, PATCHES)].flatten())
        targets += [self.rows.repeat(len(scenes)), self.columns.repeat(len(scenes))]
        return list(zip(outputs.split(self.sizes, -1), targets, strict=True))

    def draw(self, photos: Photos, number: int, rng: np.random.Generator, step: int) -> list[Scene]:
        """The scenes of a batch."""
        return [draw_scene(photos, rng) for _ in range(number)]

    def loss(self, scenes: list[Scene], rng: np.random.Generator, step: int) -> Tensor:
        """Weighted cross-entropy; position is easy and gets little weight."""
        losses = [F.cross_entropy(logits, target) for logits, target in self.predict(scenes)]
        return sum(weight * loss for weight, loss in zip((1.0, 0.5, 0.1, 0.1), losses, strict=True))

    @torch.no_grad()
    def evaluate(self, photos: Photos) -> dict[str, float]:
        """Share of patches told right, on held-out photographs."""
        rng = np.random.default_rng(0)
        pairs = self.predict([draw_scene(photos, rng) for _ in range(64)])
        hits = [(logits.argmax(-1) == target).float().mean().item() for logits, target in pairs]
        return dict(zip(("class", "color", "row", "column"), hits, strict=True))


@dataclass
class Packed:
    """The questions of a batch of scenes, one row per scene, behind one another.

    `question` numbers the questions within a row from 1, `offset` counts the tokens within a question, and `label` is
    the token to be predicted where an answer is, else IGNORE.
    """

    ids: Tensor
    question: Tensor
    offset: Tensor
    label: Tensor


class LanguageStage(nn.Module):
    """Trains projector and decoder to answer questions, the vision tower being frozen."""

    name, number, batch, peak_rate, flat = "language", 1, 8, 1.5e-3, 0.75

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        model.model.vision_tower.requires_grad_(False)
        self.tokenizer = build_tokenizer()
        self.prefix = self.tokenizer(PREFIX)["input_ids"]

    def pack(self, rows: list[list[Question]]) -> Packed:
        """Lay the questions of each scene out in one row, with the suffix and answer each has in a prompt."""
        prompts = self.tokenizer([f"{q.question} {SUFFIX}" for row in rows for q in row])["input_ids"]
        answers = self.tokenizer([q.answer for row in rows for q in row])["input_ids"]
        pairs: Iterator[tuple[list[int], list[int]]] = iter(zip(prompts, answers, strict=True))
        columns: list[list[Tensor]] = [[], [], [], []]
        for row in rows:
            ids, question, offset, label = [], [], [], []
            for number in range(1, len(row) + 1):
                prompt, answer = next(pairs)
                length = len(prompt) + len(answer)
                ids += prompt + answer
                question += [number] * length
                offset += range(length)
                label += [IGNORE] * (len(prompt) - 1) + answer + [EOS]
            for column, values in zip(columns, (ids, question, offset, label), strict=True):
                column.append(torch.tensor(values))
        fill = (PAD, QUESTIONS_PER_SCENE + 1, 0, IGNORE)  # padding is a question of its own, which nobody looks at
        device = self.model.device
        return Packed(
            *(
                nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=value).to(device)
                for column, value in zip(columns, fill, strict=True)
            )
        )

    def logits(self, scenes: list[Scene], packed: Packed) -> Tensor:
        """The decoder's output wherever there is a label: each question sees the prefix, the image and itself."""
        model, batch = self.model.model, len(scenes)
        with torch.no_grad():
            patches = model.vision_tower(to_pixels(scenes, self.model.device)).last_hidden_state[:, 1:]
        embed = self.model.get_input_embeddings()
        prefix = embed(torch.tensor(self.prefix, device=self.model.device)).expand(batch, -1, -1)
        embeds = torch.cat([prefix, model.multi_modal_projector(patches), embed(packed.ids)], 1)
        shared = len(self.prefix) + VISUAL_TOKENS
        position = torch.arange(shared, device=embeds.device).expand(batch, -1)
        position = torch.cat([position, shared + packed.offset], 1)
        question = F.pad(packed.question, (shared, 0))
        visible = (question[:, None, :] == question[:, :, None]) | (question == 0)[:, None, :]
        mask = visible.tril()[:, None]
        hidden = model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
        ).last_hidden_state[:, shared:]
        return self.model.lm_head(hidden[packed.label != IGNORE])

    def phase(self, step: int) -> Phase:
        """The curriculum's phase that a step belongs to."""
        return next(phase for phase in reversed(CURRICULUM) if phase.start <= step)

    def draw(self, photos: Photos, number: int, rng: np.random.Generator, step: int) -> list[Scene]:
        """The scenes of a batch, as full as the phase has them."""
        return [draw_scene(photos, rng, self.phase(step).fill) for _ in range(number)]

    def loss(self, scenes: list[Scene], rng: np.random.Generator, step: int) -> Tensor:
        """Cross-entropy of the answers."""
        phase = self.phase(step)
        packed = self.pack(
            [draw_questions(scene, QUESTIONS_PER_SCENE, rng, phase.mix, phase.by_class) for scene in scenes]
        )
        return F.cross_entropy(self.logits(scenes, packed), packed.label[packed.label != IGNORE])

    @torch.no_grad()
    def evaluate(self, photos: Photos) -> dict[str, float]:
        """Share of questions answered right (teacher-forced, the whole answer), per type, on held-out photographs."""
        rng = np.random.default_rng(0)
        right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
        for _ in range(4):
            scenes = [draw_scene(photos, rng) for _ in range(16)]
            rows = [draw_questions(scene, QUESTIONS_PER_SCENE, rng) for scene in scenes]
            packed = self.pack(rows)
            labeled = packed.label != IGNORE
            missed = self.logits(scenes, packed).argmax(-1) != packed.label[labeled]
            index = torch.arange(len(rows), device=missed.device)[:, None] * QUESTIONS_PER_SCENE + packed.question - 1
            wrong = set(index[labeled][missed].tolist())
            for number, question in enumerate(question for row in rows for question in row):
                right[question.type].append(number not in wrong)
        scores = {kind: float(np.mean(hits)) for kind, hits in right.items()}
        return scores | {"mean": float(np.mean(list(scores.values())))}


Stage = VisionStage | LanguageStage


@dataclass
class Settings:
    """What a run depends on, besides the code and the photographs."""

    seed: int
    steps: dict[str, int]
    layers: int
    batch: dict[str, int]


def train_step(
    stage: Stage, optimizers: list[torch.optim.Optimizer], photos: Photos, step: int, settings: Settings
) -> float:
    """One optimizer step; returns this process's loss."""
    steps = settings.steps[stage.name]
    rng = np.random.default_rng([settings.seed, stage.number, step, RANK])
    scenes = stage.draw(photos, settings.batch[stage.name] // WORLD, rng, step)
    loss = stage.loss(scenes, rng, step)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    (loss / WORLD).backward()
    # The tower's last norm serves the pooled output only, which nothing here uses.
    parameters = [p for p in parameters if p.grad is not None]
    sum_over_processes([p.grad for p in parameters])
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, stage.peak_rate, stage.flat)
        optimizer.step()
    return loss.item()


def save_checkpoint(path: Path, stage: Stage, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write all that a resumed run needs; through a temporary file, so that an interrupted write harms nothing."""
    state = {"stage": stage.name, "step": step, "weights": stage.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def fit(
    stage: Stage, photos: Photos, held_out: Photos, settings: Settings, out: Path, saved: dict | None, every: int
) -> None:
    """Run a stage from its first step, or from where the checkpoint `saved` left it."""
    optimizers, start, steps = build_optimizers(stage), 0, settings.steps[stage.name]
    if saved:
        stage.load_state_dict(saved["weights"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start = saved["step"]
    progress = tqdm(
        range(start, steps), stage.name, steps, initial=start, disable=RANK != 0, mininterval=5, dynamic_ncols=True
    )
    began, mean = time.monotonic(), None
    for step in progress:
        loss = train_step(stage, optimizers, photos, step, settings)
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if RANK == 0 and ((step + 1) % every == 0 or step + 1 == steps):
            record = {"stage": stage.name, "step": step + 1, "loss": round(mean, 4)}
            record["seconds"] = round(time.monotonic() - began)
            record |= {kind: round(score, 3) for kind, score in stage.evaluate(held_out).items()}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            save_checkpoint(out / "checkpoint.pt", stage, optimizers, step + 1)


def train(settings: Settings, out: Path, data: str | None, device: str, resume: bool, every: int) -> None:
    """Run both stages and save the model."""
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(out / "checkpoint.pt", map_location=device) if resume else None
    photos, held_out = Photos.load("train", data), Photos.load("calibration", data)
    torch.manual_seed(settings.seed)
    model = build_model(settings.layers).to(device)
    vision = VisionStage(model).to(device)
    if not saved or saved["stage"] == "vision":
        fit(vision, photos, held_out, settings, out, saved, every)
        saved = None
    fit(LanguageStage(model), photos, held_out, settings, out, saved, every)
    if RANK == 0:
        model.save_pretrained(out / "model")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    parser.add_argument("--data", help="folder with Fashion-MNIST (default: $FASHION_MNIST, or where Debian has it)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the language stage")
    parser.add_argument("--vision-steps", type=int, default=1000, help="steps of the vision stage")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = parser.parse_args()

    if WORLD > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    settings = Settings(
        seed=options.seed,
        steps={"vision": options.vision_steps, "language": options.steps},
        layers=options.layers,
        batch={"vision": VisionStage.batch, "language": LanguageStage.batch},
    )
    train(settings, options.out, options.data, options.device, options.resume, options.every)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
