"""Plans: construction, files (round trip, damage, malice, crashes), fingerprints, the DyVTE authors' checkpoints."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vte_compile import GateExit, Plan, StaticExit, atomic_file
from vte_compile.errors import InputError, PlanError, PlanMismatchError, UnsupportedModelError
from vte_compile.fingerprint import Fingerprint, Probe
from vte_compile.plan import files

C, M, LAYERS, VOCAB = 16, 6, 8, 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": C,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}
PLAIN = Fingerprint("llama", LAYERS, C, VOCAB, (Probe("layers.0.w.weight", (2, 3), (0.1, -1e-8, 3.0)),))


def gate(layer: int, threshold: float = 0.0, dtype: torch.dtype = torch.float32, hidden_size: int = C) -> GateExit:
    generator = torch.Generator().manual_seed(layer % 1000)
    w1 = torch.randn(M, 2 * hidden_size, generator=generator)
    return GateExit(layer, w1.to(dtype), torch.randn(2, M, generator=generator).to(dtype), threshold)


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def llava(text: PreTrainedModel) -> LlavaForConditionalGeneration:
    """An MLLM around a copy of `text`'s decoder."""
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text.config)).eval()
    model.get_decoder().load_state_dict(text.get_decoder().state_dict())
    return model


def assert_same(left: Plan, right: Plan) -> None:
    assert left.fingerprint == right.fingerprint
    assert left.describe() == right.describe()
    for mine, theirs in zip(left.exits, right.exits, strict=True):
        if isinstance(mine, GateExit):
            assert isinstance(theirs, GateExit)
            for weight, other in ((mine.w1, theirs.w1), (mine.w2, theirs.w2)):
                assert weight.dtype == other.dtype
                assert torch.equal(weight, other)


# Construction


def test_plan_sorts_describes_and_shows_itself() -> None:
    plan = Plan([StaticExit(5), gate(2, 0.25)])
    assert plan.describe() == [
        {"layer": 2, "kind": "gate", "threshold": 0.25, "width": M},
        {"layer": 5, "kind": "static", "threshold": None, "width": None},
    ]
    assert repr(plan) == "Plan(GateExit(layer=2, width=6, threshold=0.25), StaticExit(layer=5); for any model)"
    assert repr(Plan()) == "Plan(no exits; for any model)"


def test_numpy_scalars_become_python_numbers() -> None:
    exit_ = GateExit(np.int64(3), torch.ones(M, 2 * C), torch.ones(2, M), np.float32(0.5))
    assert (type(exit_.layer), type(exit_.threshold)) == (int, float)
    assert type(StaticExit(np.int64(3)).layer) is int


def test_gate_does_not_hold_on_to_a_graph() -> None:
    assert not GateExit(0, torch.ones(M, 2 * C, requires_grad=True), torch.ones(2, M)).w1.requires_grad


W1, W2 = torch.ones(M, 2 * C), torch.ones(2, M)
NAN = torch.full((2, M), float("nan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((True, W1, W2), "layer: expected an integer, got bool"),
        ((1.0, W1, W2), "layer: expected an integer, got float"),
        ((-1, W1, W2), "layer: must be 0 or more, got -1"),
        ((1, W1, W2, "0"), "threshold: expected a number, got str"),
        ((1, W1, W2, True), "threshold: expected a number, got bool"),
        ((1, W1, W2, float("nan")), "threshold: must be finite, got nan"),
        ((1, W1, W2, 10**400), "threshold: must be finite, got inf"),
        ((1, W1.numpy(), W2), "w1: expected a torch.Tensor, got ndarray"),
        ((1, W1.int(), W2), "w1: expected float16, bfloat16, float32 or float64, got torch.int32"),
        ((1, W1[0], W2), r"w1: expected 2 dimensions, got shape \[32\]"),
        ((1, W1.to("meta"), W2), "w1: has no values"),
        ((1, W1[:, 1:], W2), r"w1: expected shape \[M, 2C\], got \[6, 31\]"),
        ((1, W1[:0], W2[:, :0]), r"w1: expected shape \[M, 2C\], got \[0, 32\]"),
        ((1, W1, W2[:, 1:]), r"w2: expected shape \[2, 6\] to go with w1, got \[2, 5\]"),
        ((1, W1, W2[:1]), r"w2: expected shape \[2, 6\] to go with w1, got \[1, 6\]"),
        ((1, W1, W2.half()), "w2: torch.float16 on cpu does not go with w1: torch.float32 on cpu"),
        ((1, W1, NAN), "w2: holds NaN or infinite values"),
        ((1, W1 / 0, W2), "w1: holds NaN or infinite values"),
    ],
)
def test_bad_gate_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        GateExit(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "exits: expected a sequence"),
        (([3],), r"exits\[0\]: expected a GateExit or StaticExit, got int"),
        (([gate(4), StaticExit(4)],), r"exits\[1\]\.layer: layer 4 already has exits\[0\]"),
        (([gate(5), StaticExit(4)],), r"exits\[1\]\.layer: 5 is never reached, because the static exit after layer 4"),
        (([gate(1), gate(2, hidden_size=8)],), r"exits\[1\]\.w1: is for hidden size 8, but exits\[0\]\.w1 for 16"),
        (([StaticExit(8)], PLAIN), r"exits\[0\]\.layer: 8 is out of range: the decoder has 8 layers \(0\.\.7\)"),
        (([gate(1, hidden_size=8)], PLAIN), r"exits\[0\]\.w1: is for hidden size 8, but the decoder's is 16"),
        (([], "llama"), "fingerprint: expected a Fingerprint or None, got str"),
    ],
)
def test_bad_plan_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan(*arguments)


# Files


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan([StaticExit(3)], PLAIN),
        Plan([gate(0, -1e-300), gate(2, 0.1, torch.bfloat16), gate(3, 1e300, torch.float64), StaticExit(7)], PLAIN),
        Plan([gate(10**20)]),
    ],
    ids=["empty", "static", "gates", "huge layer"],
)
def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path / "new" / "folder")
    assert_same(Plan.from_pretrained(str(tmp_path / "new" / "folder")), plan)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "vte_plan.json",
        "vte_plan.safetensors",
    ]


def test_gates_that_share_strided_memory_are_saved(tmp_path: Path) -> None:
    w1 = torch.randn(2 * C, M).T
    plan = Plan([GateExit(1, w1, W2), GateExit(2, w1, torch.ones(1, 1).expand(2, M))])
    plan.save_pretrained(tmp_path)
    assert_same(Plan.from_pretrained(tmp_path), plan)


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("")
    with pytest.raises(PlanError, match="plan: is a file"):
        Plan().save_pretrained(tmp_path / "plan")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Plan([gate(2, 0.5), gate(4), StaticExit(6)], PLAIN).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    data = json.loads((folder / "vte_plan.json").read_text())
    change(data)
    (folder / "vte_plan.json").write_text(json.dumps(data))


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """Replace the tensors' file as its author could, with the right hash."""
    data = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
    (folder / "vte_plan.safetensors").write_bytes(data)
    edit(folder, lambda root: root.update(tensors_sha256=hashlib.sha256(data).hexdigest()))


def setter(path: str, value: object) -> Callable[[Any], object]:
    """A change that puts `value` at `path`, such as "exits/0/layer"."""

    def change(root: Any) -> None:
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
        for parent in parents:
            root = root[parent]
        root[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 5, "schema_version: 5 is newer than 4, .* upgrade vte-compile"),
        ("schema_version", 10**4000, "schema_version: 1000.* is newer than 4"),
        ("schema_version", 0, "schema_version: there is no schema 0; expected 1 to 4"),
        ("schema_version", True, "schema_version: expected an integer, got a boolean"),
        ("schema_version", "1", "schema_version: expected an integer, got a string"),
        ("more", [], "'more': unknown field; schema version 4 does not have it here"),
        ("schema_version", 1, "'adapters': unknown field; schema version 1 does not have it here"),
        ("tensors_sha256", "12", "tensors_sha256: expected 64 hexadecimal digits, got '12'"),
        ("tensors_sha256", None, "tensors_sha256: expected a string, got null"),
        ("fingerprint", [], "fingerprint: expected an object or null, got a list"),
        ("fingerprint/extra", 1, "fingerprint.'extra': unknown field"),
        ("fingerprint/model_type", 1, "fingerprint.model_type: expected a string, got an integer"),
        ("fingerprint/num_layers", 0, "fingerprint.num_layers: must be positive, got 0"),
        ("fingerprint/hidden_size", 16.0, "fingerprint.hidden_size: expected an integer, got a number"),
        ("fingerprint/vocab_size", None, "fingerprint.vocab_size: expected an integer, got null"),
        ("fingerprint/probe", {}, "fingerprint.probe: expected a list, got an object"),
        ("fingerprint/probe", [1], r"fingerprint.probe\[0\]: expected an object, got an integer"),
        ("fingerprint/probe/0/extra", 1, r"fingerprint.probe\[0\].'extra': unknown field"),
        ("fingerprint/probe/0/shape/1", "3", r"fingerprint.probe\[0\].shape\[1\]: expected an integer, got a string"),
        ("fingerprint/probe/0/values", [], r"fingerprint.probe\[0\].values: expected at least one value"),
        ("fingerprint/probe/0/values/2", float("nan"), r"fingerprint.probe\[0\].values\[2\]: must be a finite number"),
        ("exits", None, "exits: expected a list, got null"),
        ("exits/1", [], r"exits\[1\]: expected an object, got a list"),
        ("exits/0/extra", 1, r"exits\[0\].'extra': unknown field"),
        ("exits/0/kind", "eval", r"exits\[0\].kind: unknown kind 'eval'; expected 'gate' or 'static'"),
        ("exits/0/layer", True, r"exits\[0\].layer: expected an integer, got a boolean"),
        ("exits/0/layer", -1, r"exits\[0\].layer: must be 0 or more, got -1"),
        ("exits/0/layer", 4, r"exits\[1\].layer: 4 is not above 4, the layer of exits\[0\]"),
        ("exits/0/layer", 10**30, r"exits\[1\].layer: 4 is not above 10+, the layer of exits\[0\]"),
        ("exits/2/layer", 10**30, r"exits\[2\].layer: 10+ is out of range: the decoder has 8 layers"),
        ("exits/2/threshold", 0.0, r"exits\[2\].'threshold': unknown field"),
        ("exits/0/threshold", "0", r"exits\[0\].threshold: expected a number, got a string"),
        ("exits/0/threshold", False, r"exits\[0\].threshold: expected a number, got a boolean"),
        ("exits/0/threshold", float("inf"), r"exits\[0\].threshold: must be a finite number"),
        ("exits/0/threshold", 10**400, r"exits\[0\].threshold: must be a finite number"),
        ("exits/0/width", 7, r"exits\[0\].width: 7, but w1 has 6 rows"),
        ("exits/0/tensors", [], r"exits\[0\].tensors: expected an object, got a list"),
        ("exits/0/tensors/w3", "x", r"exits\[0\].tensors.'w3': unknown field"),
        ("exits/0/tensors/w1", 1, r"exits\[0\].tensors.w1: expected a string, got an integer"),
        ("exits/0/tensors/w1", "../x", r"exits\[0\].tensors.w1: vte_plan.safetensors has no tensor '../x'"),
        ("exits/1/tensors/w1", "exits.2.w1", r"exits\[1\].tensors.w1: .* 'exits.2.w1', or another field names it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_field_is_named(saved: Path, path: str, value: object, message: str) -> None:
    edit(saved, setter(path, value))
    with pytest.raises(PlanError, match=f"^vte_plan.json: {message}"):
        Plan.from_pretrained(saved)


def test_unreachable_exit_is_named(tmp_path: Path) -> None:
    Plan([StaticExit(3)]).save_pretrained(tmp_path)
    edit(tmp_path, lambda root: root["exits"].append({"kind": "static", "layer": 4}))
    with pytest.raises(PlanError, match=r"^vte_plan.json: exits\[1\].layer: 4 is never reached"):
        Plan.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "schema_version",
        "tensors_sha256",
        "fingerprint",
        "exits",
        *(f"fingerprint/{name}" for name in ("model_type", "num_layers", "hidden_size", "vocab_size", "probe")),
        *(f"fingerprint/probe/0/{name}" for name in ("name", "shape", "values")),
        *(f"exits/0/{name}" for name in ("kind", "layer", "threshold", "width", "tensors")),
        *(f"exits/0/tensors/{name}" for name in ("w1", "w2")),
        "exits/2/layer",
    ],
)
def test_missing_field_is_named(saved: Path, path: str) -> None:
    def delete(root: Any) -> None:
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
        for parent in parents:
            root = root[parent]
        del root[last]

    edit(saved, delete)
    with pytest.raises(PlanError, match=rf"^vte_plan\.json: .*{path.split('/')[-1]}: is missing"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged or is not JSON"),
        ("[1]", "expected an object, got a list"),
        ("[" * 100_000, "is damaged or is not JSON"),
        ('{"schema_version": ' + "1" * 5000 + "}", "is damaged or is not JSON"),
        ('{"schema_version": 1e999}', "schema_version: expected an integer, got a number"),
        ('{"schema_version": 1, "schema_version": 1}', "is damaged .*'schema_version' stands twice"),
        (b"\xff\xfe{", "is damaged or is not JSON"),
        (b"\x80\x04\x95\x10", "is damaged or is not JSON"),
    ],
)
def test_bad_json_is_refused(saved: Path, text: str | bytes, message: str) -> None:
    (saved / "vte_plan.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=f"^vte_plan.json: {message}"):
        Plan.from_pretrained(saved)


def test_number_too_large_for_json_is_refused(saved: Path) -> None:
    file = saved / "vte_plan.json"
    file.write_text(file.read_text().replace('"threshold": 0.5', '"threshold": 1e999'))
    with pytest.raises(PlanError, match=r"^vte_plan.json: exits\[0\].threshold: must be a finite number"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exits.2.w1", torch.ones(M), r"vte_plan.json: exits\[0\].w1: expected 2 dimensions, got shape \[6\]"),
        ("exits.4.w1", torch.ones(M, 2), r"vte_plan.json: exits\[1\].w1: is for hidden size 1, but exits\[0\].w1 for"),
        ("exits.4.w2", torch.ones(3, M), r"vte_plan.json: exits\[1\].w2: expected shape \[2, 6\]"),
        ("exits.2.w2", NAN, r"vte_plan.json: exits\[0\].w2: holds NaN or infinite values"),
        ("exits.2.w1", W1.long(), r"vte_plan.json: exits\[0\].w1: expected float16, .* got torch.int64"),
        ("exits.9.w1", W1, "vte_plan.safetensors: vte_plan.json names no tensor 'exits.9.w1'"),
        ("exits.2.w1", None, r"vte_plan.json: exits\[0\].tensors.w1: vte_plan.safetensors has no tensor 'exits.2.w1'"),
    ],
)
def test_bad_tensors_are_named(saved: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = safetensors.torch.load_file(saved / "vte_plan.safetensors")
    tensors.pop(name, None)
    put_tensors(saved, tensors if value is None else {**tensors, name: value})
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"{]",
        (80).to_bytes(8, "little") + b'{"exits.2.w1":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'.ljust(80),
        (80).to_bytes(8, "little")
        + b'{"exits.2.w1":{"dtype":"F77","shape":[1],"data_offsets":[0,4]}}'.ljust(80)
        + b"0000",
    ],
    ids=["empty", "pickle", "ones", "header", "past the end", "dtype"],
)
def test_broken_tensor_file_is_refused_even_with_its_hash(saved: Path, data: bytes) -> None:
    put_tensors(saved, data)
    with pytest.raises(PlanError, match=r"^vte_plan.safetensors: is not a valid safetensors file"):
        Plan.from_pretrained(saved)


def test_changed_tensors_are_noticed(saved: Path) -> None:
    data = bytearray((saved / "vte_plan.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "vte_plan.safetensors").write_bytes(data)
    with pytest.raises(
        PlanError, match=r"^vte_plan.safetensors: its SHA-256 is .* damaged, or belongs to another save"
    ):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize("name", ["vte_plan.json", "vte_plan.safetensors"])
def test_missing_and_unreadable_files_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(PlanError, match=f"^{name}: there is none in .*; is it the folder of a plan?"):
        Plan.from_pretrained(saved)
    (saved / name).mkdir()
    with pytest.raises(PlanError, match=f"^{name}: cannot be read"):
        Plan.from_pretrained(saved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_or_altered_files_never_raise_anything_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Plan([gate(2, 0.5), StaticExit(6)], PLAIN).save_pretrained(folder)
        file = folder / data.draw(st.sampled_from(["vte_plan.json", "vte_plan.safetensors"]))
        whole = file.read_bytes().rstrip(b"\n")
        if data.draw(st.booleans(), label="truncate, rather than alter"):
            file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            with pytest.raises(PlanError):
                Plan.from_pretrained(folder)
        else:
            position = data.draw(st.integers(0, len(whole) - 1))
            altered = bytearray(whole)
            altered[position] = data.draw(st.integers(0, 255))
            file.write_bytes(altered)
            with suppress(PlanError):  # a digit changed into another is no damage that a reader could see
                Plan.from_pretrained(folder)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=200), header=st.binary(max_size=100))
def test_random_tensor_files_never_raise_anything_else(body: bytes, header: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Plan([gate(2)]).save_pretrained(folder)
        put_tensors(folder, len(header).to_bytes(8, "little") + header + body)
        with pytest.raises(PlanError):
            Plan.from_pretrained(folder)


@pytest.mark.parametrize("crash_at", ["first write", "first replace", "second write", "second replace"])
def test_crash_while_saving(saved: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str) -> None:
    old = Plan.from_pretrained(saved)
    which, step = crash_at.split()
    calls = 0

    def crash(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == ["first", "second"].index(which) + 1:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    with monkeypatch.context() as patched:
        owner, name = (atomic_file.os, "fsync") if step == "write" else (Path, "replace")
        patched.setattr(owner, name, crash(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            Plan([gate(1, 0.75)]).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["vte_plan.json", "vte_plan.safetensors"]
    if which == "first":
        assert_same(Plan.from_pretrained(saved), old)
    else:  # the new tensors are there, the JSON still describes the old ones
        with pytest.raises(PlanError, match="belongs to another save of the plan"):
            Plan.from_pretrained(saved)
    Plan([gate(1, 0.75)]).save_pretrained(saved)
    assert_same(Plan.from_pretrained(saved), Plan([gate(1, 0.75)]))


def test_crash_in_a_new_folder_leaves_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.write_atomically

    def crash_at_json(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(files, "write_atomically", crash_at_json)
    with pytest.raises(KeyboardInterrupt):
        Plan([gate(1)]).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"^vte_plan.json: there is none in"):
        Plan.from_pretrained(tmp_path)


# The Hub


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/no-such-plan", "not in the local cache, and the Hub was not reached"),
        ("no/such/folder", "not a valid Hub id"),
        ("../nowhere", "not a valid Hub id"),
    ],
)
def test_what_is_neither_folder_nor_cached(name: str, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PlanError, match=f"^{name}: no such folder, and the Hugging Face Hub .*{message}"):
        Plan.from_pretrained(name)


def test_plan_from_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(Plan.from_pretrained("someone/plan", revision="v1"), Plan.from_pretrained(saved))
    assert asked == [("someone/plan", "v1", ["vte_plan.json", "vte_plan.safetensors"])]


def test_folders_have_no_revisions(saved: Path) -> None:
    with pytest.raises(InputError, match=r"^revision: 'main' was given, but .* is a local folder"):
        Plan.from_pretrained(saved, revision="main")


# Fingerprints and models


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def fingerprint(model: LlamaForCausalLM) -> Fingerprint:
    return Fingerprint.of(model)


def test_fingerprint_holds_sizes_and_weights_of_spread_layers(fingerprint: Fingerprint) -> None:
    assert (fingerprint.model_type, fingerprint.num_layers, fingerprint.hidden_size) == ("llama", LAYERS, C)
    assert fingerprint.vocab_size == VOCAB
    assert [probe.name for probe in fingerprint.probe] == [
        f"layers.{layer}.{name}.weight" for layer in (0, 2, 5, 7) for name in ("input_layernorm", "self_attn.q_proj")
    ]


def test_fingerprint_survives_a_round_trip(model: LlamaForCausalLM, fingerprint: Fingerprint, tmp_path: Path) -> None:
    Plan([gate(1), StaticExit(LAYERS - 1)], fingerprint).save_pretrained(tmp_path)
    plan = Plan.from_pretrained(tmp_path)
    assert plan.fingerprint == fingerprint
    plan.check(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fingerprint_survives_casts_both_ways(model: LlamaForCausalLM, fingerprint: Fingerprint, dtype: Any) -> None:
    cast = copy.deepcopy(model).to(dtype)
    fingerprint.check(cast)
    Fingerprint.of(cast).check(model)


def test_fingerprint_sees_outliers_after_a_cast() -> None:
    # A value far above the others is rounded by more than 1% of their RMS.
    model = llama(1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[:, ::3] *= 999.7
    Fingerprint.of(model).check(copy.deepcopy(model).bfloat16())


def test_fingerprint_is_of_the_decoder_wherever_it_stands(model: LlamaForCausalLM, fingerprint: Fingerprint) -> None:
    mllm = llava(model)
    assert Fingerprint.of(mllm) == Fingerprint.of(model.model) == fingerprint
    Plan([gate(1)], fingerprint).check(mllm)


def test_other_weights_are_refused(fingerprint: Fingerprint) -> None:
    with pytest.raises(PlanMismatchError, match=r"^fingerprint: .*\(weights: layers.0.self_attn.q_proj.weight starts"):
        fingerprint.check(llama(1))


def test_one_other_layer_is_refused(model: LlamaForCausalLM, fingerprint: Fingerprint) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[5].self_attn.q_proj.weight.mul_(1.05)
    with pytest.raises(PlanMismatchError, match=r"layers.5.self_attn.q_proj.weight starts .*; load the checkpoint"):
        fingerprint.check(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, "num_layers: plan 8, model 6"),
        ({"hidden_size": 32}, "hidden_size: plan 16, model 32"),
        ({"vocab_size": 51, "num_hidden_layers": 6}, "num_layers: plan 8, model 6; vocab_size: plan 50, model 51"),
        (
            {"num_attention_heads": 1, "head_dim": 4},
            r"q_proj.weight has shape \[16, 16\] in the plan, \[4, 16\] in the",
        ),
    ],
)
def test_other_sizes_are_refused(fingerprint: Fingerprint, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanMismatchError, match=rf"^fingerprint: this plan is for another model \(.*{message}"):
        fingerprint.check(llama(**changes))


def test_other_architecture_is_refused(fingerprint: Fingerprint) -> None:
    with pytest.raises(PlanMismatchError, match="model_type: plan 'llama', model 'qwen2'"):
        fingerprint.check(Qwen2ForCausalLM(Qwen2Config(**SIZES)))


def test_weight_without_counterpart_is_refused(model: LlamaForCausalLM) -> None:
    probe = Probe("layers.0.nothing.weight", (1,), (1.0,))
    with pytest.raises(PlanMismatchError, match=r"the model has no layers.0.nothing.weight, which the plan probes"):
        Fingerprint("llama", LAYERS, C, VOCAB, (probe,)).check(model)


def test_nan_weights_are_refused(model: LlamaForCausalLM, fingerprint: Fingerprint) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[7].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(PlanMismatchError, match=r"layers.7.input_layernorm.weight"):
        fingerprint.check(broken)


def test_weights_that_cannot_be_read_are_not_compared(model: LlamaForCausalLM, fingerprint: Fingerprint) -> None:
    offloaded = copy.deepcopy(model)
    offloaded.model.layers[2].to("meta")
    layer = offloaded.model.layers[0].self_attn
    layer.q_proj.weight = torch.nn.Parameter(layer.q_proj.weight.to(torch.int8), requires_grad=False)
    fingerprint.check(offloaded)
    assert len(Fingerprint.of(offloaded).probe) == len(fingerprint.probe) - 3
    assert Fingerprint.of(offloaded.to("meta")).probe == ()


def test_plan_without_fingerprint_checks_layers_and_widths(model: LlamaForCausalLM) -> None:
    Plan([gate(1), StaticExit(7)]).check(model)
    with pytest.raises(
        PlanMismatchError, match=r"^exits\[1\].layer: 12 is out of range: the decoder has 8 layers \(0..7\)"
    ):
        Plan([gate(1), StaticExit(12)]).check(model)
    with pytest.raises(PlanMismatchError, match=r"^exits\[0\].w1: is for hidden size 8, but the decoder's is 16"):
        Plan([gate(1, hidden_size=8)]).check(model)


def test_module_without_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear: no decoder found: it has no get_decoder\(\)"):
        Fingerprint.of(torch.nn.Linear(2, 2))


# The DyVTE authors' checkpoints


def dyvte_checkpoint(prefix: str = "") -> dict[str, torch.Tensor]:
    keys: dict[str, torch.Tensor] = {f"{prefix}model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    for layer in (0, 3, 11):
        keys[f"{prefix}model.visual_gates_router.{layer}.w1.weight"] = gate(layer).w1
        keys[f"{prefix}model.visual_gates_router.{layer}.w2.weight"] = gate(layer).w2
    return keys


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_dyvte_checkpoint(prefix: str) -> None:
    plan = Plan.from_dyvte_checkpoint(dyvte_checkpoint(prefix), thresholds={3: 0.5})
    assert_same(plan, Plan([gate(0), gate(3, 0.5), gate(11)]))


def test_dyvte_checkpoint_layers() -> None:
    assert_same(Plan.from_dyvte_checkpoint(dyvte_checkpoint(), layers=[11, 3]), Plan([gate(3), gate(11)]))


ROUTER = "model.visual_gates_router"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({f"{ROUTER}.3.w2.weight": None}, {}, rf"{ROUTER}.3.w1.weight: the checkpoint lacks its w2.weight"),
        ({f"{ROUTER}.3.w1.weight": None}, {}, rf"{ROUTER}.3.w2.weight: the checkpoint lacks its w1.weight"),
        ({f"{ROUTER}.3.w1.bias": W1}, {}, rf"{ROUTER}.3.w1.bias: not a gate of two bias-free linears"),
        ({f"x.{ROUTER}.3.w1.weight": W1}, {}, rf"x.{ROUTER}.3.w1.weight: the checkpoint has this weight twice"),
        ({f"{ROUTER}.3.w2.weight": NAN}, {}, "visual_gates_router.3: w2: holds NaN"),
        ({}, {"layers": [3, 4]}, r"layers: no gate for \[4\]; the checkpoint has gates for \[0, 3, 11\]"),
        ({}, {"thresholds": {4: 0.0}}, r"thresholds: no gate for \[4\]"),
    ],
)
def test_bad_dyvte_checkpoint(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    checkpoint = {key: value for key, value in {**dyvte_checkpoint(), **changes}.items() if value is not None}
    with pytest.raises(PlanError, match=f"^{message}"):
        Plan.from_dyvte_checkpoint(checkpoint, **arguments)


def test_checkpoint_without_gates() -> None:
    with pytest.raises(PlanError, match=r"^state_dict: no DyVTE gates \(keys like"):
        Plan.from_dyvte_checkpoint({"model.embed_tokens.weight": torch.ones(2, 2)})
