"""Signs in a node's source that its result is no function of its inputs.

A list of signs, not a proof: what a class does through other modules is not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

_CHANCE_ROOTS = ("random.", "secrets.", "np.random.", "numpy.random.", "uuid.uuid")
_CHANCE = {
    "randint",
    "randrange",
    "getrandbits",
    "shuffle",
    "randn",
    "rand",
    "randperm",
    "uniform_",
}
_CHANCE |= {"randn_like", "rand_like", "randint_like", "multinomial", "bernoulli", "normal_"}
_CHANCE |= {"urandom", "uuid1", "uuid4", "token_hex", "token_bytes", "torch.normal"}
_MOMENT = {"time.time", "time.time_ns", "time_ns", "now", "utcnow", "today"}
_OUTSIDE_ROOTS = (
    "requests.",
    "urllib.",
    "ImageGrab.",
    "httpx.",
    "aiohttp.",
    "socket.",
    "os.environ",
    "os.getenv",
)


_OUTSIDE = {"listdir", "scandir", "glob", "iglob", "rglob", "urlopen", "imread", "VideoCapture"}
_READING = {"open", "read_text", "read_bytes", "load", "fromfile"}


def source_hazard(module_source: str, class_name: str, reading: bool = False) -> str | None:
    """Why the class is unpredictable, in words that follow its name, or None.

    With `reading`, opening a file counts, too.
    """
    module = ast.parse(module_source)
    functions = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef)}
    names = {t.id for n in module.body for t in _targets(n) if isinstance(t, ast.Name)}
    start = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    for node in _reachable(start, functions):
        hazard = _hazard_of(node, names, _OUTSIDE | (_READING if reading else set()))
        if hazard:
            return hazard
    return None


def _reachable(
    start: list[ast.ClassDef], functions: dict[str, ast.FunctionDef]
) -> Iterator[ast.AST]:
    """Every node of the class and of the module's functions that it calls, directly or not."""
    waiting: list[ast.AST] = list(start)
    seen: set[str] = set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            yield node
            if isinstance(node, ast.Name) and node.id in functions and node.id not in seen:
                seen.add(node.id)
                waiting.append(functions[node.id])


def _targets(node: ast.AST) -> Iterable[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []


def _hazard_of(node: ast.AST, module_names: set[str], outside: set[str]) -> str | None:
    if isinstance(node, ast.Global):
        return f"changes the variable {node.names[0]} outside itself"
    if isinstance(node, ast.AugAssign) and _outlives(node.target, module_names):
        return f"counts in {ast.unparse(node.target)}"
    if isinstance(node, ast.Assign):
        lasting = [t for t in node.targets if _outlives(t, module_names)]
        if any(_from_itself(t, node.value) for t in lasting):
            return f"counts in {ast.unparse(lasting[0])}"
    if isinstance(node, (ast.Attribute, ast.Call)):
        return _unpredictable(node, outside)
    return None


def _outlives(target: ast.expr, module_names: set[str]) -> bool:
    if isinstance(target, ast.Subscript):
        base = target.value
        return isinstance(base, ast.Attribute) or getattr(base, "id", None) in module_names
    return isinstance(target, ast.Attribute)


def _from_itself(target: ast.expr, value: ast.expr) -> bool:
    """`self.n = self.n + 1`: an attribute made from its own last value."""
    own = ast.unparse(target)
    return isinstance(value, ast.BinOp) and any(
        ast.unparse(n) == own for n in ast.walk(value) if isinstance(n, ast.expr)
    )


def _unpredictable(node: ast.Attribute | ast.Call, outside: set[str]) -> str | None:
    text = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    if text.startswith(_OUTSIDE_ROOTS):
        return f"depends on something outside ComfyUI ({text})"
    if isinstance(node, ast.Call):
        last = text.rpartition(".")[2]
        if last in outside:
            return f"depends on something outside ComfyUI ({text})"
        if text.startswith(_CHANCE_ROOTS) or {text, last} & _CHANCE:
            return f"is random ({text})"
        if {text, last} & _MOMENT:
            return f"depends on the moment ({text})"
    return None
