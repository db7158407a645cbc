"""fold_adapters: put a plan's adapters in front of q, k, v and FFNs, folded into those layers' weights.

Four forms, all exact (vte_compile/adapter_costs.py says what they are and chooses). What an adapter knows of a row's
prompt is the mean of its input over the prompt's tokens, and what follows from it: prefill computes that and gives it
out behind the keys and values (``graph.prompt_state``); graphs of later chunks take it as inputs, the last ones.

A PIA also moves the FFN: it reads the attention's normed input instead of its own. The attention itself is still there
behind this pass, and skip_attention deletes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from vte_compile.adapters import PIA
from vte_compile.passes.adapter_sites import AdapterSite, site_before_attention, site_before_ffn
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.runtime.prompt_value import PromptValue

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph
    from vte_compile.folded_weights import FoldedWeights

aten = torch.ops.aten


def fold_adapters(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Insert the adapters of the plan's skips and kept attentions; ``applied`` counts them.

    ``settings.folded`` gets the folded weights, if it has them not yet.
    """
    result = PassResult("fold_adapters")
    planned = [(part, site_before_ffn) for part in settings.plan.skips if part.adapter is not None]
    planned += [(part, site_before_attention) for part in settings.plan.adapters]  # type: ignore[misc]
    for part, find in sorted(planned, key=lambda item: item[0].layer):
        site = find(graph, part.layer)
        if isinstance(site, Refusal):
            result.refusals.append(site)
            continue
        assert part.adapter is not None
        outputs = tuple(int(n.meta["val"].shape[-1]) for n in site.readers)
        settings.folded.prepare(
            part.layer, part.adapter, site.linears, outputs, site.gain, graph.spec.dtype, graph.spec.device
        )
        _Insertion(graph, settings, site, isinstance(part.adapter, PIA)).run()
        graph.adapted.add(part.layer)
        result.applied += 1
    return result


class _Insertion:
    """Puts one adapter into a graph."""

    def __init__(self, graph: DecoderGraph, settings: PassSettings, site: AdapterSite, pooled: bool) -> None:
        self.graph, self.site, self.pooled = graph, site, pooled
        self.folded: FoldedWeights = settings.folded
        self.forms = self.folded.forms(site.layer, settings.one_prompt)
        self.routed = self.folded.has(site.layer, "router_weight")
        self.accompanied = settings.plan.companion is not None
        self.dtype = site.source.meta["val"].dtype
        self.anchor = site.readers[0]
        self.values: dict[str, fx.Node] = {}
        """What is known of the prompt."""
        self.weights: dict[str, fx.Node] = {}

    def run(self) -> None:
        prefill = self.graph.phase == "prefill"
        form = self.forms.prompt if prefill else self.forms.step
        if self.graph.phase == "chunk":
            self._ask_prompt(self._names(form))
            computed = {name: self.values[name] for name in self._names(form)}
            self._take_in(self._names(form))
            for name, node in computed.items():
                self.values[name] = self._of_first_chunk(node, self.values[name])
            self._give_out(self._names(form))
        elif prefill:
            self._ask_prompt(self._names(self.forms.prompt) | self._names(self.forms.step))
            names = self._names(self.forms.step)
            self._give_out(names)
            self.graph.prompt_state += [PromptValue(self._state_name(n), per_row) for n, per_row in names.items()]
        else:
            self._take_in(self._names(form))
        if form == "unfolded":
            self._unfolded()
        else:
            outputs = [self._linear(form, index) for index in range(len(self.site.readers))]
            for reader, output in zip(self.site.readers, outputs, strict=True):
                reader.replace_all_uses_with(output)
                self.graph.graph.erase_node(reader)

    # ------------------------------------------------------------ what is known of the prompt

    def _names(self, form: str) -> dict[str, bool]:
        """The prompt's values that a form uses -> whether they are per row."""
        if form == "unfolded":
            names = {"share": True} if self.routed else {}
            return names | ({"shift": True} if self.routed or self.pooled else {})
        indices = range(len(self.site.readers))
        names = {f"bias_{i}": True for i in indices} if self.routed or self.pooled else {}
        if form == "blended":
            names |= {f"weight_{i}": False for i in indices}
        if form == "low_rank":
            names["share"] = True
        return names

    def _ask_prompt(self, names: dict[str, bool]) -> None:
        """Compute the values from the mean of the prompt."""
        if not names:
            return
        source = self._cast(self.site.source, torch.promote_types(self.dtype, torch.float32))
        # A companion token counts in what is pooled, and not in what routers read. In prefill it is the first of its
        # row, in a chunk it stands behind the last.
        in_front = self.accompanied and self.graph.phase == "prefill"
        own = self._call(aten.slice.Tensor, source, 1, 1, sys.maxsize) if in_front else source
        mean = self._mean(own)  # [1, C], or of all rows of a chunk
        share = knowledge = None
        if self.routed:
            share = self._call(aten.sigmoid.default, self._linear_of(mean, "router"))
            share = self.values["share"] = self._cast(share, self.dtype)  # w1 [1, 1]
        if self.pooled:
            pooled = self._mean(source, behind=1) if self.accompanied else mean
            knowledge = self._cast(self._linear_of(pooled, "pool"), self.dtype)  # m [1, D]
        for name in names:
            kind, _, index = name.partition("_")
            if kind == "bias":
                self.values[name] = self._mix(f"factor_{index}", f"const_{index}", knowledge, share)
            elif kind == "shift":
                self.values[name] = self._mix("up", "offset", knowledge, share)
            elif kind == "weight":
                base, expert = self._weight(f"base_{index}"), self._weight(f"expert_{index}")
                self.values[name] = self._call(aten.lerp.Tensor, base, expert, share)

    def _mix(self, matrix: str, vector: str, knowledge: fx.Node | None, share: fx.Node | None) -> fx.Node:
        """matrix m + vector, of the first expert and, weighed by w1, of the difference to the second; [1, N]."""

        def expert(suffix: str) -> fx.Node:
            if knowledge is None:
                return self._call(aten.unsqueeze.default, self._weight(vector + suffix), 0)
            arguments = (self._weight(matrix + suffix), self._weight(vector + suffix))
            return self._call(aten.linear.default, knowledge, *arguments)

        first = expert("")
        if share is None:
            return first
        return self._call(aten.add.Tensor, first, self._call(aten.mul.Tensor, share, expert("_delta")))

    def _of_first_chunk(self, computed: fx.Node, given: fx.Node) -> fx.Node:
        """What this chunk tells, in rows that have no past; in others what was known before."""
        first = self._call(aten.eq.Scalar, self.graph.placeholder("past_lengths"), 0)  # [B]
        for _ in range(computed.meta["val"].ndim - 1):
            first = self._call(aten.unsqueeze.default, first, -1)
        return self._call(aten.where.self, first, computed, given)

    def _mean(self, source: fx.Node, behind: int = 0) -> fx.Node:
        """Over a row's tokens, [B, T, C] -> [B, C]; where rows have padding, without that, but for so much of it."""
        if self.graph.phase != "chunk":
            return self._call(aten.mean.dim, source, [1])
        lengths = self._call(aten.unsqueeze.default, self.graph.placeholder("new_lengths"), 1)
        if behind:
            lengths = self._call(aten.add.Tensor, lengths, behind)
        tokens = self._call(aten.sym_size.int, source, 1)
        index = self._call(aten.arange.default, tokens)
        padding = self._call(aten.unsqueeze.default, self._call(aten.ge.Tensor, index, lengths), 2)
        summed = self._call(aten.sum.dim_IntList, self._call(aten.masked_fill.Scalar, source, padding, 0.0), [1])
        return self._call(aten.div.Tensor, summed, self._cast(lengths, source.meta["val"].dtype))

    def _give_out(self, names: Iterable[str]) -> None:
        output = next(n for n in self.graph.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], *(self.values[name] for name in names)),)

    def _take_in(self, names: dict[str, bool]) -> None:
        embeds = self.graph.placeholder("inputs_embeds").meta["val"]
        for name, per_row in names.items():
            last = [n for n in self.graph.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.graph.inserting_after(last):
                node = self.graph.graph.placeholder(self._state_name(name))
            shape = [embeds.shape[0]] if per_row else []
            with self._fake_mode:
                node.meta["val"] = embeds.new_empty(shape + self._shape(name))
            self.values[name] = node
            self.graph.prompt_state.append(PromptValue(node.name, per_row))

    def _shape(self, name: str) -> list[int]:
        """Of a value of the prompt, without the batch."""
        hidden = int(self.site.source.meta["val"].shape[-1])
        kind, _, index = name.partition("_")
        if kind == "share":
            return [1]
        if kind == "shift":
            return [hidden]
        outputs = int(self.site.readers[int(index)].meta["val"].shape[-1])
        return [outputs, hidden] if kind == "weight" else [outputs]

    def _state_name(self, name: str) -> str:
        return f"prompt_{self.site.layer}_{name}"

    # ------------------------------------------------------------ the adapter

    def _unfolded(self) -> None:
        """g (x + U_0 M1 x + w1 (U_1 - U_0) M1 x + shift), for the layers as they are."""
        source = self.site.source
        down = self._call(aten.linear.default, source, self._weight("down"))
        adapted = self._call(aten.add.Tensor, source, self._call(aten.linear.default, down, self._weight("up")))
        if self.routed:
            delta = self._call(aten.linear.default, self._weigh(down), self._weight("up_delta"))
            adapted = self._call(aten.add.Tensor, adapted, delta)
        shift = self._per_token("shift") if "shift" in self.values else self._weight("offset")
        adapted = self._call(aten.add.Tensor, adapted, shift)
        if self.site.gain is not None:
            adapted = self._call(aten.mul.Tensor, adapted, self._weight("gain"))
        for reader in self.site.readers:
            reader.update_arg(0, adapted)

    def _linear(self, form: str, index: int) -> fx.Node:
        """A folded linear layer's output."""
        source = self.site.source
        if form == "constant" and f"bias_{index}" not in self.values:
            return self._call(
                aten.linear.default, source, self._weight(f"base_{index}"), self._weight(f"const_{index}")
            )
        weight = self.values[f"weight_{index}"] if form == "blended" else self._weight(f"base_{index}")
        output = self._call(aten.linear.default, source, weight)
        if form == "low_rank":
            if "low_rank" not in self.values:
                down = self._call(aten.linear.default, source, self._weight("down"))
                self.values["low_rank"] = self._weigh(down)
            side = self._call(aten.linear.default, self.values["low_rank"], self._weight(f"factor_{index}_delta"))
            output = self._call(aten.add.Tensor, output, side)
        return self._call(aten.add.Tensor, output, self._per_token(f"bias_{index}"))

    def _weigh(self, x: fx.Node) -> fx.Node:
        return self._call(aten.mul.Tensor, x, self._per_token("share"))

    def _per_token(self, name: str) -> fx.Node:
        """[B, N] -> [B, 1, N]."""
        return self._call(aten.unsqueeze.default, self.values[name], 1)

    # ------------------------------------------------------------ nodes

    def _linear_of(self, x: fx.Node, name: str) -> fx.Node:
        wide = x.meta["val"].dtype
        weight, bias = (self._cast(self._weight(f"{name}_{part}"), wide) for part in ("weight", "bias"))
        return self._call(aten.linear.default, x, weight, bias)

    def _cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if x.meta["val"].dtype == dtype else self._call(aten.to.dtype, x, dtype)

    def _weight(self, name: str) -> fx.Node:
        """A folded weight; in the model's dtype now, whatever it was when it was folded."""
        if name in self.weights:
            return self.weights[name]
        target = f"folded_{self.site.layer}_{name}"
        read = self.folded.reader(self.site.layer, name)
        self.graph.module.register_buffer(target, read().detach(), persistent=False)
        self.graph.parameters[target] = read
        with self.graph.graph.inserting_before(self.anchor):
            node = self.weights[name] = self.graph.graph.get_attr(target)
        node.meta["val"] = self._fake_mode.from_tensor(read().detach(), static_shapes=True)
        return node

    def _call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.graph.inserting_before(self.anchor):
            node = self.graph.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        # With the dispatcher in Python, composite operations take symbolic sizes (torch 2.11 needs it).
        with torch.no_grad(), self._fake_mode, enable_python_dispatcher():
            node.meta["val"] = target(*values)
        self.graph.layer_of[node] = self.site.layer
        return node

    @property
    def _fake_mode(self) -> Any:
        return self.site.source.meta["val"].fake_mode
