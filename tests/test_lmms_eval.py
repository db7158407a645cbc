"""The model for lmms-eval, with a stub of what it uses of lmms-eval 0.7.3: the base class, messages and manifest.

lmms-eval itself is not installed for tests: this shows that the adapter answers, not that lmms-eval still calls it so.
"""

import importlib
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from test_cli import ROOT, llava, picture, plan  # noqa: F401
from tiny_models import one_thread  # noqa: F401
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vte_compile.errors import InputError
from vte_compile.loading import prompt


class Base(ABC):
    """lmms_eval.api.model.lmms, as far as models see it."""

    def __init__(self) -> None:
        self.task_dict: dict = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda kind, request, answer: None)

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


class Messages:
    """lmms_eval.protocol.ChatMessages."""

    def __init__(self, messages) -> None:
        self.messages = messages

    def extract_media(self):
        parts = [part for message in self.messages for part in message["content"]]
        return [[part["url"] for part in parts if part["type"] == kind] for kind in ("image", "video", "audio")]

    def to_hf_messages(self):
        def part(given):
            return given if given["type"] == "text" else {"type": "image", "image": given["url"]}

        return [{"role": m["role"], "content": [part(given) for given in m["content"]]} for m in self.messages]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture
def model_class(monkeypatch):
    """The class that lmms-eval would find, by the entry point in setup.py."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.protocol": {"ChatMessages": Messages},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vte_compile.tuning.lmms_eval_model", raising=False)
    found = re.search(r'"lmms_eval.models": \["vte_compile = ([\w.]+):(\w+)"\]', (ROOT / "setup.py").read_text())
    manifest = getattr(importlib.import_module(found[1]), found[2])()
    assert manifest.model_id == "vte_compile"
    module, _, name = manifest.chat_class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def request(kind="image", url=None, **options):
    content = [{"type": kind, "url": url}, {"type": "text", "text": "what is this"}]
    messages = [{"role": "user", "content": content}]
    return SimpleNamespace(args=("what is this", lambda doc: messages, options, 0, "t", "s"))


def test_answers_as_the_model(model_class, llava: Path, plan: Path, picture: Path) -> None:  # noqa: F811
    assert not model_class.is_simple
    adapter = model_class(str(llava), str(plan), compile=False, device="cpu", exit=False)
    adapter.task_dict = {"t": {"s": [{}]}}
    image, processor = Image.open(picture), AutoProcessor.from_pretrained(llava)
    inputs = processor(images=image, text=prompt(processor, "what is this", images=1), return_tensors="pt")
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    full = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    words = processor.decode(full[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    greedy = request(url=image, max_new_tokens=6, temperature=0, top_p=None, image_sizes=[(1, 1)])
    stopped = request(url=image, max_new_tokens=6, until=[words.split()[2], ""])
    assert adapter.generate_until([greedy, stopped]) == [words, " ".join(words.split()[:2])]
    assert adapter.exit_layers == [-1, -1]

    leaving = model_class(str(llava), str(plan), compile=False, device="cpu", batch_size="1")
    leaving.task_dict = adapter.task_dict
    leaving.generate_until([request(url=image, max_new_tokens=2)])
    assert leaving.exit_layers == [2]
    sampled = request(url=image, max_new_tokens=2, temperature=0.5, top_p=0.9)
    assert len(leaving.generate_until([sampled])) == 1

    with pytest.raises(InputError, match="videos or sound"):
        leaving.generate_until([request("video", url="clip.mp4")])
    for unsupported in (leaving.loglikelihood, leaving.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            unsupported([])


def test_other_batch_sizes_are_refused(model_class, llava: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="batch_size=4"):
        model_class(str(llava), batch_size=4)
