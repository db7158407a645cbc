"""A second process compiles nothing: from Inductor's cache on disk, or from artifacts that the first one saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import thorough

from vte_compile.runtime.inductor import find_backend

ROOT = Path(__file__).parents[1]
SERVE = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from tiny_models import IMAGE, gate, plan, tiny
from vte_compile import optimize

how, load, save = sys.argv[1:]
torch.set_num_threads(1)
if load:
    torch.compiler.load_cache_artifacts(Path(load).read_bytes())
ids = torch.tensor([[1, 2, IMAGE, IMAGE, 5, 6]])
model, exits = tiny(num_hidden_layers=2), plan(gate(0, -1e9))
if how == "optimize":
    compiled, given = optimize(model, exits, compile=True), {"visual_mask": ids == IMAGE}
else:
    options = {"plan": exits, "compile": True, "visual_token_ids": [IMAGE]}
    compiled, given = torch.compile(model, backend="vte", options=options), {}
with torch.no_grad():
    prompt = compiled(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    for _ in range(2):
        step = compiled(input_ids=ids[:, :1], past_key_values=prompt.past_key_values, use_cache=True)
if save:
    Path(save).write_bytes(torch.compiler.save_cache_artifacts()[0])
inductor = counters["inductor"]
print(json.dumps([inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"], step.logits.sum().item()]))
"""


def serve(how: str, cache: Path, load: Path | None = None, save: Path | None = None) -> tuple[int, int, float]:
    """A prompt and two decode steps in a process of their own: hits and misses of Inductor's cache, and a number."""
    command = [sys.executable, "-c", SERVE, how, str(load or ""), str(save or "")]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("how", "saved"), [("optimize", True), thorough("backend", False)])
def test_second_process_compiles_nothing(how, saved, tmp_path):
    if not find_backend(torch.device("cpu"), None):
        pytest.skip("needs a C++ compiler")
    artifacts = tmp_path / "artifacts" if saved else None
    _, compiled, expected = serve(how, tmp_path / "first", save=artifacts)
    assert compiled > 0
    hits, misses, got = serve(how, tmp_path / ("second" if saved else "first"), load=artifacts)
    assert (hits >= compiled, misses, got) == (True, 0, expected)
