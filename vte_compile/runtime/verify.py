"""Does the traced and rewritten decoder compute what the model does? Asked once, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vte_compile.capture.model_state import evaluating
from vte_compile.errors import CaptureError
from vte_compile.families.deepstack import FEATURES, MASK, spread
from vte_compile.families.logits import capped
from vte_compile.families.token_blocks import masks_of, unmasked_block
from vte_compile.plan import Plan
from vte_compile.runtime.program import Program
from vte_compile.runtime.visual_tokens import PackedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vte_compile.families.decoder import DecoderSpec
    from vte_compile.passes.lower_piecewise import Piece, PiecewiseGraph
    from vte_compile.runtime.decoder_runner import DecoderRunner
    from vte_compile.runtime.steps import StepProgram

_TOKENS = 7
_ROWS = (3, _TOKENS)
# Largest difference of logits, relative to the largest logit.
# In float64 models, transformers still normalizes and rotates in float32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def verify_prefill(model: PreTrainedModel, runner: DecoderRunner) -> None:
    """Compare the last logits of a short text prompt, with nothing planned, with the model's own.

    This finds what a model does outside its decoder and lm_head (scaling logits, say), which the graph lacks. Where
    the decoder takes visual features behind layers, or blocks of tokens, a prompt with some is compared, too.

    Raises:
        CaptureError: They differ.
    """
    _compare(model, runner, lambda **inputs: model(**inputs, use_cache=False).logits)
    if runner.spec.token_inputs:
        decoder, head = runner.spec.decoder, runner.spec.lm_head
        softcap = runner.spec.logit_softcap

        def logits(**inputs: Any) -> Tensor:
            return capped(head(decoder(**inputs, use_cache=False).last_hidden_state), softcap)

        _compare(model, runner, logits, True)


def verify_hidden(model: PreTrainedModel, runner: DecoderRunner) -> None:
    """The same for a runner whose decoder has no lm_head: compare the last hidden state.

    Raises:
        CaptureError: They differ.
    """
    decoder: Any = runner.spec.decoder

    def hidden(**inputs: Any) -> Tensor:
        return decoder(**inputs, use_cache=False).last_hidden_state

    _compare(model, runner, hidden)
    if runner.spec.token_inputs:
        _compare(model, runner, hidden, with_images=True)


@torch.no_grad()
def packing_error(spec: DecoderSpec, packed: StepProgram, alone: StepProgram) -> float | None:
    """Whether packed rows give what each gives alone: the largest difference of the last logits, relative to them.

    None if it is as small as rounding makes it.
    """
    rows = _rows(spec)
    expected = torch.cat([alone.run(row).logits[0] for row in rows])
    return excess(_run_packed(spec, packed, rows)[0], expected)


class _Recorder:
    """In the place of a compiler: pieces run as they are, and what they take is noted, by key."""

    def __init__(self) -> None:
        self.taken: dict[str, list[list[Tensor]]] = {}

    def steps(self, lowered: PiecewiseGraph) -> list[Any]:
        """All of them."""
        return lowered.steps

    def compile_piece(self, piece: Piece, lowered: PiecewiseGraph) -> Callable[..., Any]:
        """The piece, uncompiled."""

        def run(*values: Tensor) -> Any:
            self.taken.setdefault(piece.key, []).append([value.clone() for value in values[: len(piece.inputs)]])
            return piece.module(*values)

        return run


@torch.no_grad()
def packed_inputs(spec: DecoderSpec, lowered: PiecewiseGraph) -> dict[str, list[list[Tensor]]]:
    """What the pieces of a packed graph take when two short rows run through it: by key, of each of its uses."""
    recorder: Any = _Recorder()
    _run_packed(spec, Program(lowered, [], recorder), _rows(spec))
    return recorder.taken


@torch.no_grad()
def fusing_error(spec: DecoderSpec, fused: StepProgram, own: StepProgram, inputs: Sequence[Tensor]) -> float | None:
    """Whether fused attentions give what torch's own give: as :func:`packing_error` tells it.

    Args:
        spec: The decoder.
        fused: Packed prefill, or decode, with fused attentions.
        own: The same with torch's.
        inputs: What the graph takes, as fake tensors.
    """
    if fused.makes_caches:
        rows = _rows(spec)
        return excess(*(_run_packed(spec, program, rows) for program in (fused, own)))
    generator = torch.Generator().manual_seed(0)

    def real(fake: Tensor) -> Tensor:
        shape = [_hint(size) for size in fake.shape]
        if fake.is_floating_point():
            return torch.randn(shape, generator=generator).to(spec.device, fake.dtype)
        # Positions, and where rows begin.
        return torch.randint(_TOKENS, shape, generator=generator).to(spec.device, fake.dtype)

    given = [real(fake) for fake in inputs]
    logits = [program.run([x.clone() for x in given]).logits for program in (fused, own)]
    return excess(*logits)


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _rows(spec: DecoderSpec) -> list[tuple[Tensor, ...]]:
    """Embeddings, positions and further inputs of two rows."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens in _ROWS:
        # As large as a norm leaves them, and so not what an embedding gives; the difference is what is asked.
        embeds = torch.randn(1, tokens, spec.hidden_size, generator=generator).to(spec.device, spec.dtype)
        positions = torch.arange(tokens, device=spec.device)
        positions = positions.expand(*([spec.position_rows] if spec.position_rows > 1 else []), 1, -1)
        rows.append((embeds, positions.contiguous(), *_token_inputs(spec, embeds, True)[1]))
    return rows


def _run_packed(spec: DecoderSpec, program: StepProgram, rows: list[tuple[Tensor, ...]]) -> Tensor:
    inputs = [torch.cat(parts, dim=-1 if i == 1 else 1) for i, parts in enumerate(zip(*rows, strict=True))]
    packed = PackedRows(list(_ROWS), [None] * len(rows))
    return program.run([*inputs[:2], packed.cu_seqlens(spec.device), *inputs[2:]], packed).logits


def excess(got: Tensor, expected: Tensor) -> float | None:
    """The largest difference, relative to the largest number; None if it is as small as rounding makes it."""
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return None if error <= _TOLERANCE.get(expected.dtype, 5e-2) else error


def _token_inputs(spec: DecoderSpec, embeds: Tensor, with_images: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """What a decoder is given besides embeddings, of a prompt with images or without; the same as graphs take it."""
    shape, device = embeds.shape[:2], embeds.device
    # The first token is of no image: what is done to the wrong ones should show.
    visual = (torch.arange(shape[1], device=device) % 3 > 0).expand(shape) & with_images
    given: dict[str, Any] = {}
    token_inputs = [torch.zeros_like(embeds) for _ in range(spec.deepstack)]
    if spec.deepstack and with_images:
        features = [embeds[visual] * (layer + 1) for layer in range(spec.deepstack)]
        given, token_inputs = {MASK: visual, FEATURES: features}, spread(visual, features, embeds)
    if spec.has_blocks:
        blocks = torch.full(shape, unmasked_block(spec.decoder), device=device)
        if with_images:
            blocks = torch.where(visual, torch.arange(shape[1], device=device) // 3, -1)
            given["attention_mask"] = masks_of(blocks, spec.config)
        token_inputs.append(blocks)
    return given, token_inputs


def _compare(
    model: PreTrainedModel, runner: DecoderRunner, forward: Callable[..., Tensor], with_images: bool = False
) -> None:
    # Skipped attentions and adapters change the numbers on purpose; exits do not, on text.
    reference = runner.with_plan(Plan()) if runner.plan.skips or runner.plan.adapters else runner
    embeddings: Any = model.get_input_embeddings()
    device = runner.spec.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.num_embeddings, (1, _TOKENS), generator=generator).to(device)
    with torch.no_grad(), evaluating(model):
        embeds = embeddings(ids)
        positions = torch.arange(_TOKENS, device=device)[None]
        if (rows := runner.spec.position_rows) > 1:
            # As of an image: each row counts in its own way.
            positions = positions // torch.arange(1, rows + 1, device=device)[:, None, None]
        given, token_inputs = _token_inputs(runner.spec, embeds, with_images)
        expected = forward(inputs_embeds=embeds, position_ids=positions, **given)[:, -1]
        got = reference.uncompiled_prefill().run([embeds, positions, *token_inputs]).logits[:, -1]
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    tolerance = _TOLERANCE.get(expected.dtype, 5e-2)
    if not error <= tolerance:
        raise CaptureError(
            f"the traced decoder of {type(model).__name__} does not give the model's logits (relative error "
            f"{error:.1e}, allowed {tolerance:.0e})"
            + (
                f": what it makes of {', '.join(runner.spec.token_inputs)} is something else."
                if with_images
                else ": the model computes something outside its decoder and lm_head."
            )
        )
