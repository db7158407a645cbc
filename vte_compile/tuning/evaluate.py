"""evaluate(): how often plans leave a model's answers as they are, against baselines with the same FLOPs.

The baselines need no training: one static exit for all samples (VTW, arXiv 2405.05803), random dropping of visual
tokens, pruning them by attention (FastV, arXiv 2403.06764), and as an upper limit an oracle, which lets each sample
leave behind the earliest layer from which on no static exit changes its answer. Static exits behind all layers are
judged by one pass per sample: an answer is decoded as before iff in each of its positions the same token wins.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.live import find_splice
from vte_compile.optimizer import optimize
from vte_compile.plan import Plan, StaticExit
from vte_compile.tuning.answered import embed_answered, placed
from vte_compile.tuning.answers import Answer, Answers
from vte_compile.tuning.baselines import AttentionPruning, RandomDropping, ReducingOracle, TokenReduction
from vte_compile.tuning.evaluation import Evaluation, Kind, StaticPoint
from vte_compile.tuning.examine import GREEDY, Examiner
from vte_compile.tuning.matching import Prompt, exit_within, mean_flops, removed, share_within
from vte_compile.tuning.measures import CONFIDENCE, RESAMPLES, Asked, Case, Measurer, all_stay, earliest_exit, exited
from vte_compile.tuning.samples import Sample, read_samples
from vte_compile.tuning.store import ExaminedStore, plan_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FULL, STATIC, RANDOM, ATTENTION, ORACLE = "full model", "static exit", "random dropping", "FastV", "oracle exit"
_REDUCTIONS: tuple[Kind, ...] = ("random", "attention")
# Of random dropping and FastV: its K = 2 layers see all tokens. Fewer do where the budget asks for it.
_PRUNED_BEHIND = 1


def evaluate(
    model: PreTrainedModel,
    samples: object,
    plans: Mapping[str, Plan],
    *,
    processor: Any = None,
    baselines: bool = True,
    match: str | None = None,
    max_new_tokens: int = 64,
    folder: str | os.PathLike[str] | None = None,
    compile: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """Let a model answer samples under plans and baselines, and compare with its own answers.

    Answers are greedy, of one prompt at a time. Plans and the static exit run through optimize() and generate(), token
    reductions in eager PyTorch.

    Args:
        model: An MLLM of transformers in eval mode, not optimized.
        samples: As :func:`vte_compile.tuning.samples.read_samples` takes them. With baselines they are read twice; a
            stream is kept in memory for that.
        plans: By name.
        processor: The model's, where the samples are not its outputs already. With it an answer is right if its text is
            the sample's, without if its tokens are, end tokens aside.
        baselines: Whether to compare with them.
        match: The plan whose mean FLOPs, for prefill and the full model's answers, are the baselines' budget, and with
            which all is compared; None: the first.
        max_new_tokens: Length limit of answers.
        folder: Where to keep answers, so that an interrupted run goes on; None: nothing is kept.
        compile: As for optimize().
        seed: Of random dropping and of the bootstrap.

    Raises:
        InputError: Arguments out of range, samples that cannot be used, or a folder of another model, damaged or full.
        PlanError: A plan is for another model (PlanMismatchError).
        UnsupportedModelError: A model that cannot be optimized or examined, or whose FLOPs are not known.
    """
    if not plans:
        raise InputError("plans: there are none.")
    if taken := sorted({FULL, STATIC, RANDOM, ATTENTION, ORACLE} & set(plans)):
        raise InputError(f"plans: {taken[0]!r} is what a baseline is called: choose another name.")
    if match is not None and match not in plans:
        raise InputError(f"match={match!r}: is none of the plans ({', '.join(plans)}).")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}.")
    if baselines and isinstance(samples, Iterator):
        samples = list(samples)
    evaluator = _Evaluator(model, samples, processor, max_new_tokens, folder, compile, seed)
    return evaluator.run(plans, match or next(iter(plans)), baselines)


@dataclass
class _Run:
    """A configuration that answers samples."""

    answers: Answers
    answer: Callable[[Sample], Answer]


class _Evaluator:
    """A model and samples; nothing of them changes."""

    def __init__(
        self,
        model: Any,
        samples: object,
        processor: Any,
        max_new_tokens: int,
        folder: str | os.PathLike[str] | None,
        compile: bool | None,
        seed: int,
    ) -> None:
        self.model, self.samples, self.processor = model, samples, processor
        self.max_new_tokens, self.folder, self.seed = max_new_tokens, folder, seed
        if find_splice(type(model)) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: generate() of its own code takes prompts in its own way, unknown to "
                "evaluate(): compare answers of optimize(model, plan).generate(...) instead (calibrate() takes it)."
            )
        self.examiner = Examiner(model)
        self.spec = self.examiner.spec
        ExaminedStore(folder, model)  # refuses a folder of another model
        self.fast = optimize(model, Plan(), compile=compile)
        self.layers = self.spec.num_layers

    def run(self, plans: Mapping[str, Plan], matched: str, baselines: bool) -> Evaluation:
        """See :func:`evaluate`."""
        full = _Run(self._answers(kind="full"), lambda sample: self._generate(self.model, sample))
        runs = {name: self._plan_run(plan) for name, plan in plans.items()}
        changing = _Run(self._answers(kind="changing exits"), lambda sample: self._changing(full.answers, sample))
        asked = self._answer_all([full, *runs.values(), *([changing] if baselines else [])], full, "full model, plans")
        measurer = Measurer(self.model.config, self.spec.dtype, asked, full.answers, self._said)
        cases = [Case(FULL, "full", full.answers, all_stay)]
        cases += [Case(name, "plan", run.answers, exited, plans[name]) for name, run in runs.items()]
        static: tuple[StaticPoint, ...] = ()
        if baselines:
            reference = next(case for case in cases if case.name == matched)
            cases += self._baselines(asked, full, measurer.flops(reference)[:, 1].mean().item())
            cases.append(self._oracle(asked, full.answers, changing.answers))
            static = self._static_exits(asked, changing.answers)
        return Evaluation(
            samples=len(asked),
            answered=sum(each.answer is not None for each in asked),
            matched=matched,
            settings={
                "max_new_tokens": self.max_new_tokens,
                "seed": self.seed,
                "resamples": RESAMPLES,
                "confidence": CONFIDENCE,
            },
            configurations=measurer.configurations(cases, matched, self.seed),
            static_exits=static,
        )

    # ------------------------------------------------------------ answers

    def _read(self, what: str) -> Iterator[Sample]:
        samples = read_samples(self.samples, self.model.config if self.processor is None else self.processor)
        total = operator.length_hint(samples) or None
        return iter(tqdm(samples, what, total, unit="sample", dynamic_ncols=True))

    def _answer_all(self, runs: Sequence[_Run], full: _Run, what: str) -> list[Asked]:
        """Let all runs answer the samples, but for what they have answered before; what is answered is saved."""
        asked = []
        try:
            for sample in self._read(what):
                is_visual = self._visual(sample)[0]
                visual = int(is_visual.sum())
                if not visual:
                    raise InputError(f"{sample.name}: has no visual token, so there is nothing to leave.")
                for run in runs:
                    if sample.key not in run.answers:
                        run.answers.add(sample.key, run.answer(sample))
                if sample.key not in full.answers:
                    raise InputError("samples: are not the same when they are read again: pass a list of them.")
                prompt = Prompt(len(is_visual), visual, len(full.answers[sample.key].tokens))
                asked.append(Asked(sample.key, prompt, sample.answer))
        except InputError as error:
            if self.folder is None:
                raise
            raise InputError(f"{error} (What was answered is saved in {self.folder}.)") from error
        finally:
            for run in runs:
                run.answers.flush()
        return asked

    def _answers(self, **configuration: Any) -> Answers:
        return Answers(self.folder, configuration | {"max_new_tokens": self.max_new_tokens})

    def _plan_run(self, plan: Plan) -> _Run:
        fast = optimize(self.fast, plan)
        return _Run(self._answers(kind="plan", plan=plan_digest(plan)), lambda sample: self._generate(fast, sample))

    @torch.no_grad()
    def _generate(self, model: Any, sample: Sample) -> Answer:
        inputs = placed(self.examiner.spec, sample)
        output: Tensor = model.generate(**inputs, **GREEDY, max_new_tokens=self.max_new_tokens)
        exits = getattr(output, "exit_layer", None)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        return Answer(tuple(tokens), -1 if exits is None else int(exits[0]))

    def _changing(self, full: Mapping[str, Answer], sample: Sample) -> Answer:
        """The layers behind which an exit changes the full model's answer, in the place of tokens."""
        answered = Sample.of(sample.inputs, full[sample.key].tokens, sample.name)
        return Answer(tuple((~self.examiner.examine(answered).unchanged[0]).nonzero().flatten().tolist()))

    @torch.no_grad()
    def _reduced(self, oracle: ReducingOracle, sample: Sample) -> Answer:
        # An answer of one token adds none to the prompt: nothing follows its last.
        prompt = embed_answered(self.model, self.examiner.spec, replace(sample, answer=(0,)))
        found = oracle.generate(
            **prompt.oracle_inputs(self.spec),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.model.generation_config.eos_token_id,
        )
        return Answer(tuple(found.tokens[0]))

    def _visual(self, sample: Sample) -> Tensor:
        """Where the prompt's visual tokens are, [1, n]."""
        ids = sample.inputs["input_ids"]
        return torch.isin(ids, ids.new_tensor(self.spec.visual_token_ids))

    # ------------------------------------------------------------ baselines

    def _baselines(self, asked: Sequence[Asked], full: _Run, budget: float) -> list[Case]:
        """What the budget allows, in mean FLOPs of prefill and decode."""
        config, prompts = self.model.config, [each.prompt for each in asked]
        cases, runs = [], []
        layer = exit_within(config, prompts, budget)
        if layer is not None:
            plan = Plan([StaticExit(layer)])
            runs.append(self._plan_run(plan))
            cases.append(Case(STATIC, "static", runs[-1].answers, exited, plan, layer, 0.0))
        layers = reversed(range(min(_PRUNED_BEHIND, self.layers - 2) + 1))
        shares = ((layer, share_within(config, prompts, layer, budget)) for layer in layers)
        layer, share = next((found for found in shares if found[1] is not None), (0, None))
        if share is not None:
            reduction = TokenReduction(layer, share)
            runs += self._reduction_runs(layer, share)
            for name, kind, run in zip((RANDOM, ATTENTION), _REDUCTIONS, runs[-2:], strict=True):
                cases.append(Case(name, kind, run.answers, lambda p, _: removed(p, reduction), None, layer, share))
        if not cases:
            logger.warning("no baseline has as few FLOPs as the plan: those matched to it are left out")
        if runs and {each.key for each in self._answer_all(runs, full, "baselines")} != {each.key for each in asked}:
            raise InputError("samples: are not the same when they are read again: pass a list of them.")
        return cases

    def _reduction_runs(self, layer: int, share: float) -> tuple[_Run, _Run]:
        """Random dropping, and FastV."""
        oracle = ReducingOracle(self.model, AttentionPruning(layer, share))

        def drop(sample: Sample) -> Answer:
            # Prompts of one layout are to lose different tokens.
            drawn = hashlib.sha256(f"{self.seed} {sample.key}".encode()).digest()
            seed = int.from_bytes(drawn[:7], "big")
            return self._reduced(oracle.with_reduction(RandomDropping(layer, share, seed)), sample)

        where = {"layer": layer, "share": share}
        return (
            _Run(self._answers(kind="random", seed=self.seed, **where), drop),
            _Run(self._answers(kind="attention", **where), lambda sample: self._reduced(oracle, sample)),
        )

    def _oracle(self, asked: Sequence[Asked], full: Mapping[str, Answer], changing: Mapping[str, Answer]) -> Case:
        """Each sample leaves behind the earliest layer from which on no exit changes its answer."""
        answers = {}
        for each in asked:
            exit_layer = earliest_exit(changing[each.key].tokens, self.layers)
            answers[each.key] = Answer(full[each.key].tokens, exit_layer)
        return Case(ORACLE, "oracle", answers, exited)

    def _static_exits(self, asked: Sequence[Asked], changing: Mapping[str, Answer]) -> tuple[StaticPoint, ...]:
        prompts = [each.prompt for each in asked]
        points = []
        for layer in range(self.layers):
            agreeing = sum(layer not in changing[each.key].tokens for each in asked) / len(asked)
            share = float(layer == self.layers - 1)  # behind the last one all stay: there is nothing to leave
            work = mean_flops(self.model.config, prompts, TokenReduction(layer, share))
            points.append(StaticPoint(layer, agreeing, work))
        return tuple(points)

    def _said(self, tokens: Sequence[int]) -> object:
        """What is compared with a sample's answer."""
        if self.processor is not None:
            return self.processor.decode(list(tokens), skip_special_tokens=True).strip()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return [token for token in tokens if token not in ends]
