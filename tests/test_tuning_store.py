"""Examined samples on disk: a run that was interrupted ends as one that was not; damage and other models are told."""

import json
import logging
from dataclasses import fields

import pytest
import torch
from test_tuning_examine import sample
from tiny_models import one_thread, shared_model, tiny_llava  # noqa: F401

from vte_compile.errors import InputError
from vte_compile.tuning import store as module
from vte_compile.tuning.examine import Examined, Examiner, answer_of, examine
from vte_compile.tuning.samples import Sample
from vte_compile.tuning.store import INDEX_NAME, ExaminedStore, collect


@pytest.fixture
def model():
    return shared_model("llava")


def some(count=7):
    return [sample(answer=(n, n + 1), seed=n, name=f"samples[{n}]") for n in range(count)]


def assert_same(actual, expected):
    for field in fields(Examined):
        assert torch.equal(getattr(actual, field.name), getattr(expected, field.name)), field.name


@pytest.fixture
def counted(monkeypatch):
    """The names of the samples that were really examined."""
    seen = []
    real = Examiner.examine

    def examine_counted(self, given):
        seen.append(given.name)
        return real(self, given)

    monkeypatch.setattr(Examiner, "examine", examine_counted)
    return seen


def shards(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_rows_are_the_samples_in_order(model, tmp_path):
    examined = collect(model, some(), tmp_path / "new" / "folder", shard=3, progress=False)
    assert_same(examined, Examined.concatenate([examine(model, each) for each in some()]))
    assert_same(collect(model, some(), progress=False), examined)
    assert shards(tmp_path / "new" / "folder") == [f"examined-0000{n}.safetensors" for n in range(3)]
    assert {path.suffix for path in (tmp_path / "new" / "folder").iterdir()} == {".json", ".safetensors"}


def test_a_second_run_only_reads(model, tmp_path, counted):
    first = collect(model, some(), tmp_path, shard=3, progress=False)
    del counted[:]
    assert_same(collect(model, some(), tmp_path, progress=False), first)
    assert counted == []
    # In another order, some twice, one new.
    more = [*some()[::-1], some()[2], some(8)[7]]
    again = collect(model, more, tmp_path, progress=False)
    assert counted == ["samples[7]"]
    assert_same(again, Examined.concatenate([examine(model, each) for each in more]))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, InputError])
def test_interrupted_and_resumed_equals_uninterrupted(model, tmp_path, counted, stop):
    def interrupted():
        yield from some()[:4]
        raise stop("stop")

    with pytest.raises(stop, match="stop"):
        collect(model, interrupted(), tmp_path, shard=3, progress=False)
    assert len(ExaminedStore(tmp_path, model)) == 4
    del counted[:]
    resumed = collect(model, some(), tmp_path, shard=3, progress=False)
    assert counted == [f"samples[{n}]" for n in (4, 5, 6)]
    assert_same(resumed, collect(model, some(), progress=False))


def test_killed_between_shard_and_index(model, tmp_path, counted):
    def killed(self, folder, entries):
        raise KeyboardInterrupt

    ExaminedStore(tmp_path, model)
    patch = pytest.MonkeyPatch()
    patch.setattr(ExaminedStore, "_write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(model, some(), tmp_path, shard=3, progress=False)
    patch.undo()
    assert shards(tmp_path) == ["examined-00000.safetensors"]
    del counted[:]
    assert_same(collect(model, some(), tmp_path, shard=3, progress=False), collect(model, some(), progress=False))
    assert counted[:7] == [f"samples[{n}]" for n in range(7)]


def test_own_answers_are_kept_by_their_length_limit(model, tmp_path, counted):
    asked = [sample(answer=None, seed=n) for n in range(2)]
    examined = collect(model, asked, tmp_path, max_new_tokens=3, progress=False)
    assert_same(examined, Examined.concatenate([examine(model, answer_of(model, each, 3)) for each in asked]))
    del counted[:]
    collect(model, asked, tmp_path, max_new_tokens=3, progress=False)
    assert counted == []
    collect(model, asked, tmp_path, max_new_tokens=4, progress=False)
    assert len(counted) == 2


@pytest.mark.parametrize("damage", ["truncated", "missing", "swapped"])
def test_a_damaged_shard_is_examined_again_aloud(model, tmp_path, counted, damage, caplog):
    first = collect(model, some(), tmp_path, shard=3, progress=False)
    file = tmp_path / "examined-00001.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes((tmp_path / "examined-00000.safetensors").read_bytes())
    del counted[:]
    with caplog.at_level(logging.WARNING):
        assert_same(collect(model, some(), tmp_path, progress=False), first)
    assert counted == ["samples[3]", "samples[4]", "samples[5]"]
    assert "examined-00001.safetensors" in caplog.text
    assert "3 samples are examined again" in caplog.text
    caplog.clear()
    collect(model, some(), tmp_path, progress=False)
    assert caplog.text == ""


def test_a_shard_of_other_shapes_is_examined_again_though_its_hash_is_right(model, tmp_path, counted, caplog):
    collect(model, some(2), tmp_path, progress=False)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["shards"]["examined-00000.safetensors"]["keys"].append("0" * 32)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    del counted[:]
    collect(model, some(2), tmp_path, progress=False)
    assert len(counted) == 2
    assert "does not hold 3 samples" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index[:-9], "is damaged"),
        (lambda index: "[]", "is damaged"),
        (lambda index: index.replace('"schema_version": 1', '"schema_version": 2'), "schema_version is 2"),
        (lambda index: index.replace("examined-00000", "../examined-00000"), "is damaged"),
        (lambda index: index.replace('"keys": [', '"keys": [7, '), "is damaged"),
        (lambda index: index.replace('"dtype": "float32"', '"dtype": "bfloat16"'), r"another model \(dtype differ"),
    ],
)
def test_a_damaged_index_is_an_error(model, tmp_path, change, message):
    collect(model, some(1), tmp_path, progress=False)
    text = (tmp_path / INDEX_NAME).read_text()
    assert change(text) != text
    (tmp_path / INDEX_NAME).write_text(change(text))
    with pytest.raises(InputError, match=message):
        collect(model, some(1), tmp_path, progress=False)


@pytest.mark.parametrize("part", ["language_model", "multi_modal_projector"])
def test_a_folder_of_another_model_is_an_error(model, tmp_path, part):
    collect(model, some(1), tmp_path, progress=False)
    other = tiny_llava()
    with torch.no_grad():
        for parameter in other.model.get_submodule(part).parameters():
            parameter.mul_(1.5)
    with pytest.raises(InputError, match=r"another model \(.*weights differ"):
        collect(other, some(1), tmp_path, progress=False)


def test_disk_full_says_what_was_saved(model, tmp_path, monkeypatch, counted):
    real = module.write_atomically

    def full(path, data):
        if path.name == "examined-00001.safetensors":
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", full)
        with pytest.raises(InputError, match=r"No space left.*last 3 .* lost.*\(3 examined samples are saved in"):
            collect(model, some(), tmp_path, shard=3, progress=False)
    del counted[:]
    collect(model, some(), tmp_path, shard=3, progress=False)
    assert counted == [f"samples[{n}]" for n in (3, 4, 5, 6)]


def test_a_bad_sample_is_named_and_the_others_are_saved(model, tmp_path):
    bad = Sample.of({**sample().inputs, "pixel_values": torch.full((1, 3, 8, 8), torch.nan)}, (1,), "samples[4]")
    with pytest.raises(InputError, match=r"samples\[4\]: NaN.*\(4 examined samples are saved in"):
        collect(model, [*some(4), bad], tmp_path, progress=False)


def test_an_unwritable_folder_is_found_at_once(model, tmp_path, monkeypatch, counted):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "write_atomically", refuse)
    with pytest.raises(InputError, match=r"cannot be written: .*Permission denied"):
        collect(model, some(), tmp_path / "new", progress=False)
    assert counted == []


def test_wrong_arguments(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read"):
        collect(model, some(), tmp_path / "file", progress=False)
    with pytest.raises(InputError, match="there are none"):
        collect(model, [], progress=False)
    with pytest.raises(InputError, match="max_new_tokens"):
        collect(model, some(), max_new_tokens=0)
    with pytest.raises(InputError, match="shard"):
        collect(model, some(), shard=0)


def test_progress_is_shown_unless_unwanted(model, capsys):
    collect(model, some(2))
    assert "examine" in capsys.readouterr().err
    collect(model, some(2), progress=False)
    assert capsys.readouterr().err == ""
