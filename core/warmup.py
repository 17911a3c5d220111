"""The warm-up form of a prompt: all that a real run needs, at one step, and nothing that is kept.

Models are loaded, prompts encoded, sampling done at the size and batch of the real run, the result
decoded; what would save or show something is left out. What stays as it was keeps its id and its
inputs, so that ComfyUI's cache gives the result to the real run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .graph_identity import is_link

SINK = "QwenVRAMWarmupSink"
# Of ours: they would undo the warm-up or only look on; what they are given passes through.
BYPASSED = frozenset({"QwenVRAMClear", "QwenVRAMReport"})
STEPS = frozenset({"steps", "num_steps", "num_inference_steps"})
FIRST_STEPS = frozenset({"start_at_step", "start_step"})
LAST_STEP = "end_at_step"
NEED_TWO_STEPS = frozenset({"kl_optimal"})  # ComfyUI's formula divides by the steps less one
# Whoever has none of them has nothing to load, encode, sample or decode.
WARMED = frozenset(
    {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "SIGMAS", "GUIDER", "CONTROL_NET"}
    | {"CLIP_VISION", "UPSCALE_MODEL", "STYLE_MODEL", "AUDIO_ENCODER", "MODEL_PATCH"}
)
_MADE = WARMED | {"IMAGE"}
# In the name of an input of a node that writes files where the user finds them.
_SAVING = ("save", "filename", "prefix", "folder", "path")
_PREFIX = "qwen_vram_warm_up_"

Node = dict[str, Any]
Link = list[Any]


class EmptyPrompt(ValueError):
    """There is no node at all; the message is for the user."""

    code = "empty_prompt"


class NothingToWarm(ValueError):
    """The prompt has no part that a warm-up could run; the message is for the user."""

    code = "nothing_to_warm"


class Input(NamedTuple):
    """An input of a node as its class declares it; `minimum` of a number, if it has one."""

    type: str
    lazy: bool = False
    minimum: float | None = None


class NodeFacts(NamedTuple):
    """What the host knows of a node: inputs, output types, whether it saves, whether it pays."""

    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    output_node: bool = False
    api_node: bool = False


class Form(NamedTuple):
    """The prompt to queue, and ids of its nodes whose result the real run takes over.

    `left_out`: ids of nodes that would have been warmed up but do not run, for the user.
    """

    prompt: dict[str, Node]
    kept: frozenset[str]
    left_out: tuple[str, ...] = ()


def check(prompt: Any) -> None:
    """Raise ValueError with a sentence where a prompt has not the API format."""
    if not isinstance(prompt, dict) or not prompt:
        raise EmptyPrompt("The prompt is empty: open a workflow that has nodes.")
    for node_id, node in prompt.items():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if not isinstance(inputs, dict) or not isinstance(node.get("class_type"), str):
            raise ValueError(
                f"Node {node_id} of the prompt has no class_type or no inputs. "
                "Send the API format, as Export (API) writes it."
            )
        for name, value in inputs.items():
            if is_link(value) and value[0] not in prompt:
                raise ValueError(
                    f"{title(prompt, node_id)}: its input {name} comes from node {value[0]}, "
                    "which the prompt does not have."
                )


def title(prompt: Mapping[str, Node], node_id: str) -> str:
    """How to call a node in a sentence: its title, or else its class, and its id."""
    node = prompt.get(node_id, {})
    meta = node.get("_meta")
    named = meta.get("title") if isinstance(meta, dict) else None
    return f'"{named or node.get("class_type", "a node")}" ({node_id})'


def warm_up_form(prompt: Mapping[str, Node], facts: Mapping[str, NodeFacts]) -> Form:
    """The warm-up form of a prompt that `check` has passed; `facts` of every node, by its id.

    Raises NothingToWarm. The prompt itself is left as it is.
    """
    graph = _Graph(prompt, facts)
    links = graph.ends()
    nodes: dict[str, Node] = {}
    for node_id in _upstream([link[0] for link in links], graph.sources):
        nodes[node_id] = _one_step(prompt[node_id], facts[node_id], graph.resolve)
    if not any(_is_warmed(facts[node_id]) for node_id in nodes):
        raise NothingToWarm(
            "This workflow has nothing to warm up: no output node needs a model, an encoder, "
            "a sampler or a VAE."
        )
    _cut_sigmas(nodes, facts)
    links = _distinct(nodes, links)
    needed = _upstream([x[0] for x in links], lambda name: [x[0] for _, x in _links(nodes[name])])
    nodes = {name: nodes[name] for name in needed}
    kept = _kept(prompt, nodes)
    for number, link in enumerate(links):
        nodes[f"{_PREFIX}{number}"] = {"class_type": SINK, "inputs": {"value": link}}
    return Form(nodes, kept, graph.left_out())


class _Graph:
    """A prompt without what saves, shows or pays (`out`), and what needs what only they give.

    An output node that samples or encodes itself, and shows a picture of it, is no mere output: it
    runs like others (`active`), unless it can save files.
    """

    def __init__(self, prompt: Mapping[str, Node], facts: Mapping[str, NodeFacts]) -> None:
        self.prompt, self.facts = prompt, facts
        self.working = {node_id for node_id in prompt if self._works(node_id)}
        self.active = {name for name in self.working if not _can_save(facts[name])}
        self.out = {node_id for node_id in prompt if self._is_out(node_id)}
        self.blocked: set[str] = set()
        self._block()

    def _is_out(self, node_id: str) -> bool:
        facts = self.facts[node_id]
        bypassed = self.prompt[node_id]["class_type"] in BYPASSED
        return facts.api_node or bypassed or (facts.output_node and node_id not in self.active)

    def _works(self, node_id: str) -> bool:
        """Whether an output node loads, encodes, samples or decodes."""
        facts, node = self.facts[node_id], self.prompt[node_id]
        if not facts.output_node or facts.api_node or node["class_type"] in BYPASSED:
            return False
        # What it can be given, too, it may only hand on.
        makes = (_MADE & set(facts.outputs)) - {given.type for given in facts.inputs.values()}
        return bool(makes and _is_warmed(facts)) or _is_sampler(facts)

    def left_out(self) -> tuple[str, ...]:
        """What an output node needs, or is, and would be warm if it had run."""
        warm = {name for name in self.blocked if _is_warmed(self.facts[name])}
        warm |= self.working - self.active
        return tuple(sorted(warm & set(self._needed())))

    def _needed(self) -> list[str]:
        outputs = [node_id for node_id in self.prompt if self.facts[node_id].output_node]
        return _upstream(outputs, self._sources_as_sent)

    def _block(self) -> None:
        users = _users(self.prompt)
        waiting = [node_id for node_id in self.prompt if node_id not in self.out]
        while waiting:
            node_id = waiting.pop()
            links = _links(self.prompt[node_id])
            if node_id in self.blocked or all(self.resolve(link) for _, link in links):
                continue
            self.blocked.add(node_id)
            through = lambda user: users.get(user, []) if user in self.out else []  # noqa: E731
            waiting += set(_upstream(users.get(node_id, []), through)) - self.out

    def resolve(self, link: Link) -> Link | None:
        """The link that feeds another one past the nodes that are out, or None."""
        seen = set()
        while link[0] in self.out and link[0] not in seen:
            seen.add(link[0])
            passed = self._passed(link)
            if passed is None:
                return None
            link = passed
        return None if link[0] in self.out or link[0] in self.blocked else link

    def _passed(self, link: Link) -> Link | None:
        """What a node hands on at an output: the first of its inputs that carries that type.

        Not past a sampler: what it gives need not have the form of what it was given.
        """
        if link[0] in self.working:
            return None
        node = self.prompt[link[0]]
        wanted = _type(self.facts, link)
        anything = node["class_type"] in BYPASSED or wanted == "*"
        for _, given in _links(node):
            if anything or _type(self.facts, given) == wanted:
                return given
        return None

    def ends(self) -> list[Link]:
        """Links that nodes which do not run would have read, for what an output node needs."""
        found: list[Link] = []
        for node_id in self._needed():
            if node_id in self.out or node_id in self.blocked:
                found += self._read(node_id)
            elif node_id in self.active:
                found.append([node_id, 0])
        return found

    def _read(self, node_id: str) -> Iterator[Link]:
        """What feeds a node. A lazy input may not be asked for in the real run, either: a text
        encoder behind a list of known prompts."""
        for name, link in _links(self.prompt[node_id]):
            declared, fed = self.facts[node_id].inputs.get(name), self.resolve(link)
            if fed is not None and not (declared and declared.lazy):
                yield fed

    def sources(self, node_id: str) -> list[str]:
        """The nodes that feed a node which runs."""
        fed = (self.resolve(link) for _, link in _links(self.prompt[node_id]))
        return [link[0] for link in fed if link]

    def _sources_as_sent(self, node_id: str) -> list[str]:
        return [link[0] for _, link in _links(self.prompt[node_id])]


def _type(facts: Mapping[str, NodeFacts], link: Link) -> str:
    outputs = facts[link[0]].outputs if link[0] in facts else ()  # a node of the warm-up's own
    return outputs[int(link[1])] if 0 <= link[1] < len(outputs) else ""


def _upstream(starts: Iterable[str], sources: Callable[[str], Iterable[str]]) -> list[str]:
    """The nodes and all that they need, each once; cycles end."""
    found: dict[str, None] = {}
    waiting = list(reversed(list(starts)))
    while waiting:
        node_id = waiting.pop()
        if node_id not in found:
            found[node_id] = None
            waiting += sources(node_id)
    return list(found)


def _one_step(node: Node, facts: NodeFacts, resolve: Callable[[Link], Link | None]) -> Node:
    """The node with its links past what is left out, sampling one step."""
    inputs = {
        name: resolve(value) if is_link(value) else value for name, value in node["inputs"].items()
    }
    if "SIGMAS" not in facts.outputs and not _does_nothing(inputs):  # see _cut_sigmas
        numbers = [name for name in inputs if facts.inputs.get(name, Input("")).type == "INT"]
        steps = [name for name in numbers if _last(name) in STEPS]
        for name in steps:
            least = 2 if inputs.get("scheduler") in NEED_TWO_STEPS else 1
            inputs[name] = int(max(least, facts.inputs[name].minimum or least))
        for name in numbers if steps else ():
            if _last(name) in FIRST_STEPS:
                inputs[name] = 0
            elif _last(name) == LAST_STEP:
                inputs[name] = 1
    return {**node, "inputs": inputs}


def _does_nothing(inputs: Mapping[str, Any]) -> bool:
    """Whether a sampler with a first and a last step has none to do in the real run, either."""
    first, last = inputs.get("start_at_step"), inputs.get(LAST_STEP)
    total = inputs.get("steps")
    numbers = all(isinstance(value, int) for value in (first, last, total))
    return numbers and first >= min(last, total)


def _last(name: str) -> str:
    """The name proper of an input; those that depend on a choice are called "choice.name"."""
    return name.rpartition(".")[2]


def _cut_sigmas(nodes: dict[str, Node], facts: Mapping[str, NodeFacts]) -> None:
    """Let samplers that take a schedule do its first step.

    The node that makes the schedule stays as it is: its result serves the real run, it may be
    split for two samplers, and denoise below 1 keeps its first noise level.
    """
    cuts: dict[str, str] = {}
    for node_id, node in list(nodes.items()):
        if "SIGMAS" in facts[node_id].outputs and "LATENT" not in facts[node_id].outputs:
            continue
        for name, link in _links(node):
            if _type(facts, link) == "SIGMAS":
                asked = json.dumps(link)
                if asked not in cuts:
                    cuts[asked] = f"{_PREFIX}step_{len(cuts)}"
                    inputs = {"sigmas": link, "step": 1}
                    nodes[cuts[asked]] = {"class_type": "SplitSigmas", "inputs": inputs}
                node["inputs"][name] = [cuts[asked], 0]


def _is_warmed(facts: NodeFacts) -> bool:
    declared = {declared.type for declared in facts.inputs.values()}
    return bool(WARMED & (declared | set(facts.outputs)))


def _is_sampler(facts: NodeFacts) -> bool:
    declared = {(_last(name) in STEPS, given.type) for name, given in facts.inputs.items()}
    asked = (True, "INT") in declared or any(kind == "SIGMAS" for _, kind in declared)
    return asked and bool({"LATENT", "IMAGE"} & set(facts.outputs))


def _can_save(facts: NodeFacts) -> bool:
    return any(word in name.lower() for name in facts.inputs for word in _SAVING)


def _kept(prompt: Mapping[str, Node], nodes: Mapping[str, Node]) -> frozenset[str]:
    """Nodes that are in the prompt with all before them as in the warm-up."""
    changed = [
        node_id
        for node_id, node in nodes.items()
        if node_id not in prompt or node["inputs"] != prompt[node_id]["inputs"]
    ]
    users = _users(nodes)
    return frozenset(nodes) - set(_upstream(changed, lambda node_id: users.get(node_id, [])))


def _users(nodes: Mapping[str, Node]) -> dict[str, list[str]]:
    """The nodes that read from a node, by its id."""
    users: dict[str, list[str]] = {}
    for node_id, node in nodes.items():
        for _, link in _links(node):
            users.setdefault(link[0], []).append(node_id)
    return users


def _distinct(nodes: Mapping[str, Node], links: list[Link]) -> list[Link]:
    """Each link once; of several nodes that do the same, as two decodes of one latent, one."""
    found: dict[str, Link] = {}
    for link in links:
        node = nodes[link[0]]
        same = json.dumps([node["class_type"], node["inputs"]], sort_keys=True, default=str)
        # Nodes without inputs may each give something else: a capture, a random number.
        name = same if _links(node) else json.dumps(link[0])
        found.setdefault(f"{name} {link[1]}", link)
    return list(found.values())


def _links(node: Node) -> list[tuple[str, Link]]:
    return [(name, value) for name, value in node["inputs"].items() if is_link(value)]
