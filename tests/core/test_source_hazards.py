"""Signs of chance, state and the outside world in a node's source, and no false alarms."""

from __future__ import annotations

import pytest
from pack.core.source_hazards import source_hazard

MODULE = """
import random, time, os
COUNTER = {{"n": 0}}

def pick(items):
    return random.choice(items)

def helper(items):
    return pick(items)

def unused():
    return random.random()

class N:
    def run(self, path, n=0):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "hazard"),
    [
        ("return random.random()", "is random (random.random)"),
        ("return torch.randn(3)", "is random"),
        ("return torch.normal(a, b)", "is random"),
        ("return np.random.normal()", "is random"),
        ("return secrets.token_bytes(1)", "is random"),
        ("return helper([path])", "is random (random.choice)"),
        ("self.n += 1; return self.n", "counts in self.n"),
        ("self.n = self.n + 1; return self.n", "counts in self.n"),
        ("COUNTER['n'] += 1", "counts in COUNTER['n']"),
        ("global n; n = 1", "changes the variable n"),
        ("return datetime.utcnow()", "depends on the moment"),
        ("return time.time()", "depends on the moment"),
        ("return os.environ['HOME']", "depends on something outside ComfyUI (os.environ)"),
        ("return requests.get(path)", "depends on something outside ComfyUI"),
        ("self.loaded = (path, sd); return sd", None),
        ("t = time.perf_counter(); return load(path)", None),
        ("local = dict(path); local['n'] = local['n'] + 1", None),
        ("COUNTER['n'] = COUNTER['n'] + 1", "counts in COUNTER['n']"),
        ("n += 1; total = n + 1; return total", None),
        ("local = {}; local['n'] = 1; return load(path).sample(path)", None),
    ],
)
def test_source_that_is_no_function_of_its_inputs_is_told(body: str, hazard: str | None) -> None:
    found = source_hazard(MODULE.format(body=body), "N")
    assert found is None if hazard is None else found.startswith(hazard), found
