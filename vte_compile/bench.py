"""Time one model in several ways, in turns: with its plan, without exit, with forced exits, and as it came."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import vte_compile
from vte_compile.environment import environment
from vte_compile.errors import InputError
from vte_compile.flops import kv_bytes, prefill_flops
from vte_compile.plan import Plan, StaticExit
from vte_compile.timing import phases, time_phases

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEFAULT_VISUAL, _DEFAULT_TEXT = 576, 64
_TEXT_BEFORE_IMAGE = 16
_BASELINE = "no exit"


def bench(
    model: PreTrainedModel,
    plan: Plan | None,
    *,
    seq: int | None = None,
    visual: int | None = None,
    runs: int = 7,
    decode_tokens: int = 16,
    every_layer: bool = False,
    compile: bool | None = None,
) -> dict[str, Any]:
    """Time prefill and decode on a random prompt of one image.

    Args:
        model: The model, not optimized yet.
        plan: Its plan; None: the one beside the checkpoint, if any. On a random prompt its gates decide at random.
        seq: Tokens of the prompt; None: the visual ones and 64 more.
        visual: How many are visual; None: those of one image of this model.
        runs: Timed rounds.
        decode_tokens: Decode steps in each round.
        every_layer: Force an exit after each layer, instead of a quarter, half and three quarters of them.
        compile: As for optimize().

    Returns:
        Plain data: ``machine``, ``versions``, ``settings`` and ``cases``, times in seconds, ratios to "no exit".

    Raises:
        InputError: ``seq`` and ``visual`` leave no text behind the image.
    """
    visual = getattr(model.config, "image_seq_length", None) or _DEFAULT_VISUAL if visual is None else visual
    seq = visual + _DEFAULT_TEXT if seq is None else seq
    if not 0 < visual < seq:
        raise InputError(
            f"seq={seq}, visual={visual}: expected at least one visual token, and text behind the last one."
        )
    # First, since it has the weights of all others: a plan that skips or folds leaves none for other plans.
    without: Any = vte_compile.optimize(model, Plan(), compile=compile)
    planned: Any = vte_compile.optimize(without, plan)
    layers = without._vte_spec.num_layers
    forced = range(layers) if every_layer else sorted({max(layers * part // 4 - 1, 0) for part in (1, 2, 3)})
    models: dict[str, Any] = {"original": model, _BASELINE: without}
    models |= {f"exit {k}": vte_compile.optimize(without, Plan([StaticExit(k)])) for k in forced}
    if planned.plan.exits or planned.plan.skips or planned.plan.adapters:
        models["plan"] = planned

    generator = torch.Generator().manual_seed(0)
    embeddings: Any = model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (1, seq), generator=generator).to(model.device)
    with torch.no_grad():
        embeds = embeddings(ids)
    start = min(_TEXT_BEFORE_IMAGE, (seq - visual) // 2)
    visual_mask = torch.zeros(1, seq, dtype=torch.bool, device=model.device)
    visual_mask[:, start : start + visual] = True

    cases = {name: phases(candidate, embeds, visual_mask, decode_tokens) for name, candidate in models.items()}
    with tqdm(total=2 * (runs + 1) * len(cases), desc="timing", unit="run") as bar:
        prefill, decode = time_phases(cases, runs, runs, device=model.device, after_each=bar.update)
    rows = []
    base_flops = prefill_flops(model.config, seq, visual, -1)
    for name, case in cases.items():
        applied = getattr(models[name], "plan", None)
        flops = prefill_flops(model.config, seq, visual, case.exit_layer, applied)
        time_ratio, flop_ratio = prefill[name].ratio_to(prefill[_BASELINE]), flops / base_flops
        rows.append(
            {
                "case": name,
                "exit_layer": case.exit_layer,
                "prefill": asdict(prefill[name]),
                "decode": asdict(decode[name].scaled(1 / decode_tokens)),
                "prefill_flops": flops,
                "kv_bytes": kv_bytes(model.config, seq, visual, case.exit_layer, model.dtype, applied),
                "time_ratio": time_ratio,
                "flop_ratio": flop_ratio,
                "quotient": time_ratio / flop_ratio,
            }
        )
    found = environment()
    settings = {
        "model": type(model).__name__,
        "seq": seq,
        "visual": visual,
        "runs": runs,
        "decode_tokens": decode_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "compiled": without._vte_runner.compiler is not None,
    }
    return {"machine": found, "versions": found["versions"], "settings": settings, "cases": rows}
