"""One forward pass of a Qwen-Image transformer that records or reuses groups of image tokens.

What a block computes of a token reaches other tokens by its keys and values alone. A group that is
*recorded* is computed, and its keys and values after RoPE are kept, block by block. A group that is
*reused* is taken out of what the blocks see, and what was recorded is appended to the keys and
values of the rest; attention does not care for their order. Nothing of the model is replaced: the
blocks get fewer tokens by the host's patches for whole blocks, and attention gets more keys by its
slot for overrides, both on a copy of the options of this one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from ..core.reference_store import KVStore
from . import attention_override
from .attention_override import REFERENCE_CACHE, Attend
from .transformer_options import Options

PATCH = 2  # latent pixels along a token
BLOCK = "double_block"  # the host's name for a block of this model
PROBED = 3  # blocks, from the first, in which the drift of keys and values is measured
ALONE = (
    "Tokens of the picture can be left out only where all groups are: the model knows the "
    "picture's tokens from the references' by their number."
)


@dataclass(eq=False)
class Group:
    """Image tokens whose keys and values are recorded or reused in forward passes.

    It is for one call of one condition, and remembers what belongs to its `store`.
    """

    name: str  # "references", "outside"
    tokens: slice | Tensor  # places among the image tokens: picture's first, then the references'
    store: KVStore
    reuse: bool = False  # True: left out, what was recorded is appended. False: recorded
    known: bool = False  # whether the store holds what a pass that succeeded has recorded
    # Compute it in the first blocks nevertheless: if it drifted further than this it stays in, and
    # the pass is a full one that has lost nothing. None: do not look.
    threshold: float | None = None
    # After a pass:
    drift: Tensor | None = None  # relative change of keys and values since they were recorded
    blocks: int = 0  # in how many it was recorded, or used
    noise: dict[int, Tensor] = field(default_factory=dict)  # block -> the store's own error
    last: Tensor | None = None  # of a part of the picture: its tokens behind the last block


def forward(
    executor: WrapperExecutor,
    arguments: Sequence[Any],
    options: Options,
    groups: Sequence[Group],
    more: dict[str, Any] | None = None,
    causal: bool = False,
) -> Tensor:
    """What the model predicts, (batch, channels, frames, height, width).

    `arguments`: what the host's DIFFUSION_MODEL wrappers get before its transformer_options: x,
    timestep, context, attention mask, reference latents, additional timestep condition. `more`:
    the keywords behind. `causal`: each reference attends to itself alone. The groups tell what
    became of them: `reuse` is False of one that was recorded after all. Raises ValueError for
    groups that cannot be left out.
    """
    layers = len(executor.class_obj.transformer_blocks)
    counts = [tokens_of(each) for each in arguments[4] or ()]
    state = _Pass(groups, tokens_of(arguments[0]), counts, layers, causal)
    own = dict(options)
    replaced = own.get("patches_replace", {})
    blocks = {(BLOCK, index): partial(state.block, index) for index in range(layers)}
    own["patches_replace"] = {**replaced, "dit": {**replaced.get("dit", {}), **blocks}}
    attention_override.put(own, REFERENCE_CACHE, state)
    return executor(*arguments, own, **(more or {}))


def tokens_of(latent: Tensor) -> int:
    """How many tokens the model makes of a latent (batch, channels, frames, height, width)."""
    height, width = (-(-side // PATCH) for side in latent.shape[-2:])
    return latent.shape[-3] * height * width


def references_of(arguments: Sequence[Any]) -> slice:
    """The places of all reference pictures among the image tokens of a call; see `forward`."""
    picture = tokens_of(arguments[0])
    return slice(picture, picture + sum(map(tokens_of, arguments[4] or ())))


def is_stock(executor: WrapperExecutor) -> bool:
    """Whether the host's own forward pass of this very class comes behind the wrappers, in slices
    (slicing.py) or whole."""
    original = executor.original
    function = getattr(original, "__func__", None) or getattr(original, "func", None)
    stock = function is QwenImageTransformer2DModel._forward
    return stock and type(executor.class_obj) is QwenImageTransformer2DModel


@dataclass
class _Joint:
    """Keys, values and mask for all queries of one block, and how many of those have come."""

    key: Tensor
    value: Tensor
    mask: Tensor | None
    queries: int = 0


class _Pass:
    """The blocks of one forward pass, and, when called, their attention."""

    sliceable = True

    def __init__(
        self,
        groups: Sequence[Group],
        picture: int,
        references: Sequence[int],
        layers: int,
        causal: bool,
    ) -> None:
        self.groups, self.picture, self.layers = groups, picture, layers
        self.total = total = picture + sum(references)
        self.alone = tuple(references) if causal else ()  # tokens of those that see no others
        self.index, self.text = 0, 0  # the block at hand; tokens of the text
        self.kept: slice | Tensor = slice(0, total)  # image tokens that the blocks see
        self.dropped: list[Group] = []
        self._pe: Tensor | None = None
        self._joint: _Joint | None = None
        self._fresh: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._changes: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        probed = any(group.reuse and group.threshold is not None for group in groups)
        self.begin = min(PROBED, layers - 1) if probed else 0  # the block that drops tokens
        for group in groups:
            group.drift, group.blocks = None, 0
        inside = [group for group in groups if group.reuse and _first(group) < picture]
        if inside and not all(group.reuse for group in groups):
            raise ValueError(ALONE)

    # ------------------------------------------------------------------------------ blocks
    def block(self, index: int, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """What the host calls in the place of a block: the same on the tokens that are kept."""
        self.index, self.text, self._joint = index, args["txt"].shape[1], None
        image = args["img"]
        if index == self.begin:
            image = self._drop(image)
        if self.dropped:
            if self._pe is None:
                self._pe = self._positions(args["pe"])
            args = {**args, "pe": self._pe}
        out = extra["original_block"]({**args, "img": image})
        if index == self.layers - 1:
            self._end(out)
        return out

    def _drop(self, image: Tensor) -> Tensor:
        """Take out the tokens of all groups that are reused, unless one has drifted too far."""
        far = [group for group in self.groups if group.reuse and self._far(group)]
        if far:
            for group in self.groups:
                group.reuse = False
        for (name, index), pair in self._fresh.items():
            group = next(each for each in self.groups if each.name == name)
            if not group.reuse:
                self._record(group, index, *pair)
        self._fresh.clear()
        self.dropped = [group for group in self.groups if group.reuse]
        if not self.dropped:
            return image
        seen = torch.ones(self.total, dtype=torch.bool)
        for group in self.dropped:
            seen[group.tokens if isinstance(group.tokens, slice) else group.tokens.cpu()] = False
        count = int(seen.sum())
        self.kept = slice(0, count)
        if not seen[:count].all():
            self.kept = seen.nonzero()[:, 0].to(image.device)
        return _take(image, self.kept, 1)

    def _far(self, group: Group) -> bool:
        """Whether a group that was probed has drifted beyond its threshold."""
        if group.threshold is None or not self._changes[group.name]:
            return False
        group.drift = torch.stack(self._changes[group.name]).mean()
        return not group.drift.item() <= group.threshold  # NaN is far

    def _positions(self, pe: Tensor) -> Tensor:
        """Of the text, which comes first, and the image tokens that are kept."""
        text, image = pe[:, :, : self.text], pe[:, :, self.text :]
        return torch.cat([text, _take(image, self.kept, 2)], dim=2)

    def _end(self, out: dict[str, Any]) -> None:
        """Behind the last block: every token of the picture in its place again."""
        image = out["img"]
        inside = [group for group in self.groups if _first(group) < self.picture]
        if any(group.reuse for group in inside):
            whole = image.new_zeros(image.shape[0], self.picture, image.shape[2])
            whole[:, self.kept] = image
            for group in inside:
                if group.last is not None:
                    whole[:, group.tokens] = group.last
            out["img"] = whole
        for group in inside:
            if not group.reuse:
                group.last = _take(image, group.tokens, 1).clone()
        for group in self.groups:
            if not group.reuse and group.drift is None and self._changes[group.name]:
                group.drift = torch.stack(self._changes[group.name]).mean()

    # ------------------------------------------------------------------------------ attention
    def __call__(
        self,
        function: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """The override. q, k, v: (batch, heads, tokens, width of a head), text first; the queries
        may come in slices, one after the other, each with all keys and values."""
        own = k.shape[2]
        if self._joint is None:
            self._joint = self._keys_and_values(k, v, mask)
        joint = self._joint
        start, joint.queries = joint.queries, joint.queries + q.shape[2]
        if joint.queries >= own:
            self._joint = None  # not needed while the rest of the block runs
        parts = []
        for begin, end in self._spans(own):
            query = q[:, :, max(0, begin - start) : max(0, end - start)]
            if not query.shape[2]:
                continue
            seen = joint.key, joint.value, joint.mask
            if begin:  # a reference, which sees itself alone; the mask is of the text
                seen = joint.key[:, :, begin:end], joint.value[:, :, begin:end], None
            parts.append(function(query, *seen[:2], heads, seen[2], *rest, **more))
        axis = 2 if more.get("skip_output_reshape") else 1
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _spans(self, own: int) -> list[tuple[int, int]]:
        """Where, of a block's `own` tokens, those begin and end that attend to the same: first the
        text and the picture, to all; then, with causal attention, each reference, to itself."""
        if self.dropped or not self.alone:
            return [(0, own)]
        edges = list(accumulate(self.alone, initial=self.text + self.picture))
        return [(0, edges[0]), *pairwise(edges)]

    def _keys_and_values(self, key: Tensor, value: Tensor, mask: Tensor | None) -> _Joint:
        """Record what is to be recorded, and append what was."""
        own = key.shape[2]
        for group in self.groups:
            group.blocks += 1
            if group in self.dropped:
                key, value = group.store.extend(self.index, key, value)
                continue
            pair = self._own(group, key), self._own(group, value)
            if group.reuse:  # it is being probed
                self._compare(group, *pair)
                self._fresh[group.name, self.index] = pair[0].clone(), pair[1].clone()
            else:
                if group.known:
                    self._compare(group, *pair)
                self._record(group, self.index, *pair)
        if mask is not None and key.shape[2] > own:
            mask = pad(mask, (0, key.shape[2] - own))
        return _Joint(key, value, mask)

    def _own(self, group: Group, joint: Tensor) -> Tensor:
        """A group's part of keys or values, (batch, heads, tokens, width of a head)."""
        return _take(joint[:, :, self.text :], group.tokens, 2)

    def _record(self, group: Group, index: int, key: Tensor, value: Tensor) -> None:
        group.store.put(index, key, value)
        if index < PROBED:
            group.noise[index] = _change((key, value), group.store.get(index))

    def _compare(self, group: Group, key: Tensor, value: Tensor) -> None:
        """How far the store is from what is computed now, without the store's own error."""
        if self.index < PROBED:
            change = _change(group.store.get(self.index), (key, value))
            error = group.noise.get(self.index, torch.zeros_like(change))
            self._changes[group.name].append((change**2 - error**2).clamp_min(0).sqrt())


def _first(group: Group) -> int:
    """The first place of a group."""
    if isinstance(group.tokens, slice):
        return group.tokens.start or 0
    return int(group.tokens[0]) if len(group.tokens) else 0


def _take(tensor: Tensor, places: slice | Tensor, axis: int) -> Tensor:
    """These places along an axis; of a slice a view."""
    if isinstance(places, slice):
        start, stop, _ = places.indices(tensor.shape[axis])
        return tensor.narrow(axis, start, stop - start)
    return tensor.index_select(axis, places.to(tensor.device))


def _change(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
    """The mean of the relative L2 changes of keys and of values."""
    parts = [
        vector_norm(new - old, dtype=torch.float32)
        / vector_norm(old, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
        for old, new in zip(before, now, strict=True)
    ]
    return torch.stack(parts).mean()
