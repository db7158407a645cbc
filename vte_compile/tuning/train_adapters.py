"""Training adapters with the model frozen, and the redundancy search (EAS, arXiv 2403.15226), on transformers' Trainer.

Two phases. Search: every attention has a PIA, and a plain adapter if wanted; each step skips a random set of
attentions, and losses of further sets, on samples held out, teach which are redundant
(vte_compile/tuning/redundancy.py). Then the chosen set is fixed and its adapters are trained on.

The Trainer saves checkpoints and goes on from them, with the same result as without interruption. Under torchrun each
process takes its share of every batch, and all end with the same plan: that of one process with the same batch, up to
rounding, which sums of gradients in another order leave.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError
from vte_compile.plan import Plan
from vte_compile.tuning.adapted_model import AdaptedModel, frozen
from vte_compile.tuning.adapter_modules import RouterKind, initial_adapter
from vte_compile.tuning.examine import Examiner, own_answer
from vte_compile.tuning.ranking import check_skips
from vte_compile.tuning.redundancy import Redundancy, SearchSettings
from vte_compile.tuning.samples import Sample, read_samples
from vte_compile.tuning.store import model_identity

SETTINGS_NAME = "vte_training.json"
# Of the samples, for the rewards of the search.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class TrainingSettings:
    """How adapters are trained; the learning rate and widths are those of LLaVA-EAS.

    `steps`: of training the chosen set. `search_steps`: of the search before, half of which are its warm-up. `search`:
    whose published settings it takes. `batch`: samples per step, of all processes together. `learning_rate`: falls to 0
    as a cosine in each phase. `width`: of PIAs. `kept_width`: of plain adapters in front of the attentions that are
    kept; None: there are none. `router`: of both, per prompt or static. `distill`: see :class:`AdaptedModel`.
    `save_steps`: between checkpoints.

    Raises InputError if a number is out of range.
    """

    steps: int = 500
    search_steps: int = 500
    search: Literal["llava", "lavin", "meter"] = "llava"
    batch: int = 8
    learning_rate: float = 4e-4
    width: int = 128
    kept_width: int | None = 128
    router: RouterKind = "prompt"
    distill: float = 0.0
    save_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "search_steps", "batch", "save_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected 1 or more, got {getattr(self, name)}.")
        for name in ("width", "kept_width"):
            width = getattr(self, name)
            if width is not None and (width < 2 or width % 2):
                raise InputError(f"{name}: expected an even number, got {width}.")
        if not 0 <= self.distill <= 1:
            raise InputError(f"distill: expected 0 to 1, got {self.distill}.")
        if self.router not in ("prompt", "static"):
            raise InputError(f"router: expected 'prompt' or 'static', got {self.router!r}.")
        if self.search not in ("llava", "lavin", "meter"):
            raise InputError(f"search: expected llava, lavin or meter, got {self.search!r}.")


def train_adapters(
    model: nn.Module,
    samples: object,
    plan: Plan,
    *,
    settings: TrainingSettings | None = None,
    processor: Any | None = None,
    work: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Train a PIA for each attention that a plan skips, and plain adapters for the others, with the model frozen.

    Args:
        model: As it was loaded, in eval mode; under torchrun, on the device of its process.
        samples: See :func:`vte_compile.tuning.samples.read_samples`; kept in memory. To those without an answer the
            model gives its own.
        plan: Its skips are what is skipped; adapters that it has are trained on, others start as
            :func:`vte_compile.tuning.adapter_modules.initial_adapter` says. It has no exits. A companion token stays
            as it is.
        settings: Of the training.
        processor: The model's processor, for conversations.
        work: A folder for checkpoints, from which a later call with the same arguments goes on. None: nothing is kept.
        max_new_tokens: Length limit of the model's own answers.
        seed: Of initial weights and the order of samples.
        progress: Whether to show progress bars.

    Returns:
        The plan with the trained adapters, in float32 (float64 of such a model).

    Raises:
        InputError: A sample or an argument cannot be used, a loss is not finite, or the folder is of another training;
            or accelerate is missing.
        PlanError: The plan is for another model.
        UnsupportedModelError: An attention of the model cannot be skipped.
    """
    settings = settings or TrainingSettings()
    _require_accelerate()
    if plan.exits or not plan.skips:
        raise InputError("plan: expected one that skips attentions, and has no exits.")
    plan.check(model)
    examiner = Examiner(model)
    answered = _read(examiner, samples, processor, max_new_tokens)
    adapted = _starting_from(examiner, plan, settings, seed)
    with _work_folder(work) as folder, _frozen(model):
        description = _description(model, answered, settings, seed, [skip.layer for skip in plan.skips])
        _claim(folder, description | ({} if plan.companion is None else {"companion": plan.companion.tolist()}))
        _train(adapted, answered, settings, settings.steps, folder / "train", seed, progress)
    return adapted.plan()


def search_and_train(
    model: nn.Module,
    samples: object,
    *,
    skips: int,
    settings: TrainingSettings | None = None,
    processor: Any | None = None,
    work: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Learn which attentions are redundant, and train adapters for those; see :func:`train_adapters`.

    A fifth of the samples, drawn by `seed`, is held out for the rewards. The second phase goes on with the adapters
    of the first, and takes all samples.

    Args:
        skips: How many attentions are to go.
    """
    settings = settings or TrainingSettings()
    _require_accelerate()
    examiner = Examiner(model)
    layers = len(examiner.layers)
    check_skips(skips, layers)
    answered = _read(examiner, samples, processor, max_new_tokens)
    if len(answered) < 2:
        raise InputError("samples: a search needs 2 or more, since some are held out for its rewards.")
    order = np.random.default_rng(seed).permutation(len(answered))
    held_out = max(1, round(_HELD_OUT * len(answered)))
    rewarding, training = ([answered[i] for i in part] for part in (order[:held_out], order[held_out:]))
    preset = getattr(SearchSettings, settings.search)
    redundancy = Redundancy(layers, preset(skips, settings.search_steps // 2), seed)
    pias, plain = _initial(examiner, settings, seed)
    adapted = AdaptedModel(examiner, pias, plain, (), settings.distill)
    with _work_folder(work) as folder, _frozen(model):
        _claim(folder, _description(model, answered, settings, seed, skips))
        search = SearchCallback(redundancy, adapted, rewarding, settings.batch, seed)
        _train(adapted, training, settings, settings.search_steps, folder / "search", seed, progress, search)
        adapted.skipped = search.redundancy.chosen
        # A new one, so that the optimizer has no parameter that is not used.
        adapted = _starting_from(examiner, adapted.plan(), settings, seed)
        _train(adapted, answered, settings, settings.steps, folder / "train", seed, progress)
    return adapted.plan()


class SearchCallback(TrainerCallback, ExportableState):
    """Skips a random set in each step, and updates the preferences when they are due.

    Its state is part of the Trainer's checkpoints. Draws are the same in all processes, since their seeds are, and so
    are the losses, which are summed up over all of them.
    """

    def __init__(
        self, redundancy: Redundancy, adapted: AdaptedModel, samples: Sequence[Sample], batch: int, seed: int
    ) -> None:
        self.redundancy, self._adapted, self._samples = redundancy, adapted, samples
        self._batch, self._seed = min(batch, len(samples)), seed

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"args": {}, "attributes": {"redundancy": self.redundancy.state()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the checkpoint's preferences."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved is not None:
            self.redundancy = Redundancy.from_state(saved["attributes"]["redundancy"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose what this step skips."""
        self._adapted.skipped = self.redundancy.next_set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate further sets, if it is time."""
        if self.redundancy.is_due:
            sets = self.redundancy.sets_to_evaluate()
            self.redundancy.update(sets, self._losses(sets, args.process_index, args.world_size))

    @torch.no_grad()
    def _losses(self, sets: Sequence[tuple[int, ...]], rank: int, world: int) -> list[float]:
        """Mean loss of some samples for each set; the samples are other ones at each update."""
        from accelerate.utils import reduce

        drawn = np.random.default_rng([self._seed, self.redundancy.steps]).choice(
            len(self._samples), self._batch, replace=False
        )
        own = [self._samples[index] for index in drawn[rank::world]]
        batch = self._adapted.collate(own) if own else None
        sums = []
        for skipped in sets:
            self._adapted.skipped = skipped
            sums.append(0.0 if batch is None else float(self._adapted(**batch)["loss"]) * len(own))
        device = next(self._adapted.parameters()).device
        total = torch.tensor(sums, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        return [float(value) / self._batch for value in reduce(total, "sum")]


def _train(
    adapted: AdaptedModel,
    samples: Sequence[Sample],
    settings: TrainingSettings,
    steps: int,
    folder: Path,
    seed: int,
    progress: bool,
    search: SearchCallback | None = None,
) -> None:
    """Train for so many steps, or from the last checkpoint in `folder` on."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch % world or len(samples) < settings.batch:
        raise InputError(
            f"batch: {settings.batch} has to be a multiple of the number of processes, {world}, and at most that of "
            f"the samples to train with, {len(samples)}."
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch // world,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        dataloader_drop_last=True,  # every step has the same number of samples, in any number of processes
        dataloader_pin_memory=False,  # batches are embedded where the model is
        remove_unused_columns=False,
        ddp_find_unused_parameters=search is not None,
        use_cpu=next(adapted.parameters()).device.type == "cpu",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=not progress,
    )
    device = next(adapted.parameters()).device
    if (arguments.device.type, arguments.device.index or 0) != (device.type, device.index or 0):
        raise InputError(f"model: is on {device}, but the training of this process runs on {arguments.device}.")
    # One process drives one GPU: torch's DataParallel would copy the adapters, but not the model.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=cast(Any, list(samples)),
        data_collator=adapted.collate,
        callbacks=[search] if search is not None else [],
    )
    trainer.remove_callback(PrinterCallback)  # what stands in for the progress bars, and prints
    last = _last_checkpoint(folder)
    try:
        trainer.train(resume_from_checkpoint=last)
    except InputError as error:
        raise InputError(f"{error} Checkpoints are in {folder}.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: a checkpoint cannot be written or read: {error}; call again with the same folder to go on with "
            "the last whole one."
        ) from error


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole: the Trainer writes its state last, so a killed process leaves none there."""
    steps = [int(found[1]) for path in folder.glob("*") if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    for step in sorted(steps, reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def _read(examiner: Examiner, samples: object, processor: Any | None, max_new_tokens: int) -> list[Sample]:
    return [
        sample if sample.answer is not None else own_answer(examiner, sample, max_new_tokens)
        for sample in read_samples(samples, processor)
    ]


def _initial(
    examiner: Examiner, settings: TrainingSettings, seed: int
) -> tuple[dict[int, PIA], dict[int, PlainAdapter]]:
    """Adapters to start from, for all layers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(examiner.spec.dtype, torch.float32)
    hidden_size, layers = examiner.spec.hidden_size, range(len(examiner.layers))
    pias = {i: initial_adapter(PIA, hidden_size, settings.width, settings.router, generator, dtype) for i in layers}
    width = settings.kept_width
    if width is None:
        return pias, {}
    return pias, {
        i: initial_adapter(PlainAdapter, hidden_size, width, settings.router, generator, dtype) for i in layers
    }


def _starting_from(examiner: Examiner, plan: Plan, settings: TrainingSettings, seed: int) -> AdaptedModel:
    """The plan's adapters, and initial ones where it has none."""
    pias, plain = _initial(examiner, settings, seed)
    skipped = [skip.layer for skip in plan.skips]
    given = {kept.layer: kept.adapter for kept in plan.adapters}
    return AdaptedModel(
        examiner,
        {skip.layer: skip.adapter or pias[skip.layer] for skip in plan.skips},
        {layer: each for layer, each in (plain | given).items() if layer not in skipped},
        skipped,
        settings.distill,
        plan.companion,
    )


def _description(
    model: nn.Module, samples: Sequence[Sample], settings: TrainingSettings, seed: int, skips: int | list[int]
) -> dict[str, Any]:
    """What tells a training from others."""
    keys = hashlib.sha256("\n".join(sample.key for sample in samples).encode()).hexdigest()
    return {
        "model": model_identity(model),
        "samples": keys,
        "settings": asdict(settings),
        "seed": seed,
        "skips": skips,
    }


def _claim(folder: Path, description: dict[str, Any]) -> None:
    """Make sure that the folder is of this training, or of none.

    Raises:
        InputError: It is of another, or cannot be written.
    """
    file = folder / SETTINGS_NAME
    try:
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if different := [name for name, value in description.items() if found.get(name) != value]:
                raise InputError(
                    f"{folder}: is of another training ({', '.join(different)} differ): use another folder."
                )
        elif int(os.environ.get("RANK", "0")) == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, (json.dumps(description) + "\n").encode())
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from error
    except (AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: is damaged: {error}; delete the folder to start anew.") from error


@contextmanager
def _work_folder(work: str | os.PathLike[str] | None) -> Iterator[Path]:
    if work is not None:
        yield Path(work)
        return
    with tempfile.TemporaryDirectory(prefix="vte-training-") as folder:
        yield Path(folder)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = frozen(model)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise InputError("training needs accelerate: pip install 'vte-compile[train]'.") from error
