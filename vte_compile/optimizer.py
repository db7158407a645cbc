"""optimize(): the same model, with its decoder traced, rewritten and compiled."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from vte_compile.co_attention_optimizer import optimize_co_attention
from vte_compile.errors import InputError, PlanError, UnsupportedModelError
from vte_compile.families.co_attention import find_co_attention
from vte_compile.families.decoder import describe
from vte_compile.families.independence import check_independence
from vte_compile.families.live import find_live
from vte_compile.families.logits import softcap_of
from vte_compile.folded_weights import FoldedWeights
from vte_compile.live_model import mixins_of, refuse_replaced, wrap_live
from vte_compile.module_tree import own_submodule, shallow_copy, without_parameters
from vte_compile.optimized_model import OptimizedModel, wrap
from vte_compile.plan import Plan
from vte_compile.plan.json_fields import JSON_NAME
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.inductor import PieceCompiler, find_backend
from vte_compile.runtime.verify import verify_prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vte_compile.runtime.program import Compiler

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound="PreTrainedModel")


BACKENDS = ("inductor", "tensorrt")


def optimize(
    model: ModelT,
    plan: Plan | None = None,
    *,
    compile: bool | None = None,
    fold: bool | None = None,
    backend: str | None = None,
    backend_options: Mapping[str, Any] | None = None,
    cuda_graphs: bool | None = None,
) -> ModelT:
    """Let a model's visual tokens leave its decoder, and skip attentions, where a plan says so.

    The result is a new object of the model's class that shares its weights: forward(), generate(), .to() and so on work
    as before. The model itself is not modified. Outputs also carry ``exit_layer``.

    Weights that the rewritten decoder does not read, those of skipped attentions and of layers into which adapters were
    folded, are no parameters of the result: they are freed when the model itself goes (``model = optimize(model,
    plan)``). Folded weights are parameters of it; ``fold_reports`` says what was folded, and how exactly.

    Args:
        model: A causal language model or LLaVA-type MLLM of transformers, on one device. An optimized model gives
            another for the new plan, which shares what was traced and compiled (``compile`` and ``fold`` stay).
            Or a BridgeTower, whose co-attention layers are rewritten (vte_compile/co_attention_optimizer.py).
            Or a live object of the authors' own code with such a language model (docs/models.md): the language model in
            the result is an optimized one, the other methods are its own, and visual tokens are found.
        plan: What to do. None: the plan saved beside the model's checkpoint if there is one, else only what is
            lossless (a log message says which).
        compile: Whether the graphs run through Inductor. None: if its compiler is there (a warning says if it is not).
        backend: What compiles the graphs: ``inductor`` (None: this), or ``tensorrt``, through torch_tensorrt on an
            NVIDIA GPU (docs/tensorrt.md; it has never been run). An optimized model keeps its own.
        backend_options: Of ``tensorrt``: ``profiles``, the sizes engines take, and some of torch_tensorrt's settings
            (``min_block_size``, ``torch_executed_ops`` ...).
        cuda_graphs: Whether decode steps on a GPU are recorded and replayed as CUDA graphs, once that gave what the
            steps themselves give (docs/kernels.md). None: yes, with ``inductor``. An optimized model keeps its own.
        fold: Fold adapters into the weights behind them (None: yes). False: apply them unfolded, which costs time at
            every token, but no second copy of weights and no rounding of folded ones.

    Returns:
        The optimized model. For a language model alone, pass ``visual_mask`` ([batch, tokens] bool) to its forward() or
        generate(), beside ``inputs_embeds`` or ``input_ids``.

    Raises:
        PlanError: The plan is invalid, or (PlanMismatchError) made for another model.
        UnsupportedModelError: No decoder was found in the model, or one that cannot be rewritten soundly.
        CaptureError: The decoder could not be traced, the traced graph does not compute what the model does, or
            ``compile=True`` without a working compiler, or ``backend="tensorrt"`` without torch_tensorrt or a GPU.
        InputError: An unknown backend, or options it does not have.
    """
    _check_backend(compile, backend, backend_options, cuda_graphs)
    plan = _find_plan(model) if plan is None else plan
    if find_co_attention(model) is not None:
        _check_placement(model)
        if backend == "tensorrt":
            raise InputError(
                f"backend: 'tensorrt' is for decoders, and {type(model).__name__} has co-attention layers."
            )
        if cuda_graphs:
            raise InputError(f"cuda_graphs=True: {type(model).__name__} has no decode steps: leave it out.")
        return optimize_co_attention(model, plan, compile, fold)
    if issubclass(type(model), OptimizedModel):
        if backend is not None:
            raise InputError("backend: a new plan cannot change that: optimize the original model.")
        if cuda_graphs is not None:
            raise InputError("cuda_graphs: a new plan cannot change that: optimize the original model.")
        return _replan(model, plan, compile, fold)
    if (live := find_live(model)) is not None:
        refuse_replaced(model)
        language_model: Any = optimize(
            getattr(model, live.path),
            plan,
            compile=compile,
            fold=fold,
            backend=backend,
            backend_options=backend_options,
            cuda_graphs=cuda_graphs,
        )
        return wrap_live(model, live, language_model)
    mixins = mixins_of(model)
    spec = describe(model)
    _check_placement(model)
    plan.check(model)
    spec = replace(spec, logit_softcap=softcap_of(model, spec.config))
    compiler: Compiler | None
    if backend == "tensorrt":
        from vte_compile.runtime.tensorrt_pieces import TensorRTCompiler, find_torch_tensorrt  # and with it an export's

        compiler = TensorRTCompiler(find_torch_tensorrt(spec.device), backend_options)
    else:
        compiler = PieceCompiler() if find_backend(spec.device, compile) else None
    check_independence(model, spec)
    if backend == "tensorrt":
        cuda_graphs = False
    runner = DecoderRunner(spec, plan, compiler, FoldedWeights(fold is not False), cuda_graphs=cuda_graphs)
    verify_prefill(model, runner)
    return _free(wrap(model, spec, runner, *mixins))


def _check_backend(
    compile: bool | None, backend: str | None, options: Mapping[str, Any] | None, cuda_graphs: bool | None
) -> None:
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend: {backend!r} is unknown; there are {', '.join(map(repr, BACKENDS))}.")
    if options is not None and backend != "tensorrt":
        raise InputError("backend_options: are of backend='tensorrt' alone: leave them out.")
    if backend == "tensorrt" and compile is False:
        raise InputError("compile=False: backend='tensorrt' compiles: leave one of them out.")
    if backend == "tensorrt" and cuda_graphs:
        raise InputError("cuda_graphs=True: its engines are not known to be recordable, leave it out.")


def _replan(model: Any, plan: Plan, compile: bool | None, fold: bool | None) -> Any:
    """An optimized model for another plan, with what the first one traced and compiled."""
    runner: DecoderRunner = model._vte_runner
    if compile not in (None, runner.compiler is not None):
        raise InputError(f"compile={compile}: a new plan cannot change that: optimize the original model.")
    fold = runner.folded.fold if fold is None else fold
    plan.check(model)
    again = shallow_copy(model)
    again.generation_config = copy.deepcopy(model.generation_config)
    if runner.spec.freed or runner.folded.reports:
        if (*plan.skips, *plan.adapters) != (*runner.plan.skips, *runner.plan.adapters) or fold != runner.folded.fold:
            raise PlanError(
                "skips, adapters: this optimized model has no weights left for other ones than its own plan's (reuse "
                "those objects to change only exits): optimize the original model."
            )
        again._vte_runner = runner.with_plan(plan, runner.folded)
        return again
    again._vte_runner = runner.with_plan(plan, FoldedWeights(fold))
    return _free(again)


def _free(fast: Any) -> Any:
    """Take away the weights that the rewritten decoder does not read, and add those it has instead."""
    runner: DecoderRunner = fast._vte_runner
    if not (runner.plan.skips or runner.plan.adapters):
        return fast
    names = runner.unused_weights()
    spec = fast._vte_spec
    freed = {name: _tensor(spec.decoder, name).shape for name in names}
    fast = without_parameters(fast, [f"{spec.path}.{name}" for name in names])
    decoder = fast.get_submodule(spec.path)
    if runner.folded.reports:
        decoder = own_submodule(fast, spec.path)
        decoder.add_module("folded_adapters", runner.folded)
    fast._vte_spec = replace(spec, decoder=decoder, freed=freed)
    fast._vte_runner = runner.rebound(fast._vte_spec)
    for report in runner.folded.reports.values():
        logger.info("optimize: %s", report)
    return fast


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)


def _find_plan(model: PreTrainedModel) -> Plan:
    checkpoint = Path(getattr(model.config, "_name_or_path", "") or "")
    if checkpoint.is_dir() and (checkpoint / JSON_NAME).is_file():
        logger.info("optimize: using the plan beside the checkpoint, %s", checkpoint / JSON_NAME)
        return Plan.from_pretrained(checkpoint)
    logger.info("optimize: no plan given, none beside the checkpoint: only lossless passes apply, no token leaves")
    return Plan()


def _check_placement(model: nn.Module) -> None:
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        names = ", ".join(sorted(str(d) for d in devices))
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over {names}: load it on one device (device_map with one entry, no "
            "offloading)."
        )
    if model.training:
        logger.warning(
            "optimize: the model is in training mode, but an optimized one is for inference: call model.eval()"
        )
