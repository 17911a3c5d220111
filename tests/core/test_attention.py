"""The self-test finds backends that do not compute attention, and lets pass those that do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.core import attention
from pack.core.attention import BIAS, HIDDEN_KEYS, NO_MASK, examine, mask_aware, visible_keys
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CPU = torch.device("cpu")
KINDS = (NO_MASK, HIDDEN_KEYS, BIAS)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """PyTorch's own."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def weights(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Of each key for each query, the largest 1, in float32: as kernels have them."""
    scores = q.float() @ k.float().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    return (scores - scores.amax(-1, keepdim=True)).exp()


def int8(x: Tensor) -> Tensor:
    """Rounded to 255 steps, a scale for each head."""
    step = x.float().abs().amax((-1, -2), keepdim=True) / 127
    return (x / step).round() * step


def quantised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """As SageAttention 2 on newer cards: int8 scores, fp8 weights and values."""
    p = weights(int8(q), int8(k.float() - k.float().mean(2, keepdim=True)), scale)
    size = v.float().abs().amax(2, keepdim=True) / 448
    rounded = (v / size).to(torch.float8_e4m3fn).float() * size
    out = (p * 448).to(torch.float8_e4m3fn).float() / 448 @ rounded
    return (out / p.sum(-1, keepdim=True)).to(q.dtype)


# ------------------------------------------------------------------------- what is healthy
@pytest.mark.parametrize("width", [32, 64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_is_healthy_with_room_to_spare(width: int, dtype: torch.dtype, kind: str) -> None:
    found = examine(mask_aware(sdpa, takes_masks=True), CPU, dtype, width, kind)
    assert found.healthy and found.reason == ""
    allowed = attention.tolerance(dtype, CPU)
    assert found.error <= allowed / 3 and found.worst <= allowed


def test_tolerances_follow_from_the_type() -> None:
    gpu = torch.device("cuda")
    assert attention.tolerance(torch.bfloat16, gpu) == 2 * 2**-7
    assert attention.tolerance(torch.float16, gpu) == 2 * 2**-10
    assert attention.tolerance(torch.float32, gpu) == 2 * 2**-10  # TF32
    assert attention.tolerance(torch.float32, CPU) == 1e-5
    assert attention.tolerance(torch.bfloat16, gpu, quantised=0.12) == 0.12


def test_a_quantised_backend_needs_its_own_tolerance() -> None:
    """The error is that of its formats: about 4 % for fp8."""
    found = examine(quantised, CPU, torch.bfloat16, 128, quantised=0.12)
    assert found.healthy and 0.03 < found.error < 0.05
    strict = examine(quantised, CPU, torch.bfloat16, 128)
    assert not strict.healthy and "wrong numbers: error 0.0" in strict.reason


# ------------------------------------------------------------------------- what is broken
def nan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    out = sdpa(q, k, v, mask, scale)
    out[-1, -1, -1, -1] = float("nan")
    return out


def ignores_the_mask(*given: Tensor | float | None) -> Tensor:
    return sdpa(*given[:3], None, given[4])


def wrong_scale(*given: Tensor | float | None) -> Tensor:
    return sdpa(*given[:4], (given[4] or given[0].shape[-1] ** -0.5) * 1.3)


def ignores_the_scale(*given: Tensor | float | None) -> Tensor:
    return sdpa(*given[:4], None)


def wrong_layout(*given: Tensor | float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2).reshape(x.shape) for x in given[:3])
    return sdpa(q, k, v, *given[3:])


def heads_last(*given: Tensor | float | None) -> Tensor:
    return sdpa(*given).transpose(1, 2)


def one_query_wrong(*given: Tensor | float | None) -> Tensor:
    out = sdpa(*given)
    out[1, 2, 199] = out[1, 2, 198]  # 4 % of the whole, and all of this one
    return out


def ignores_the_last_keys(*given: Tensor | float | None) -> Tensor:
    q, k, v, _, scale = given
    whole = k.shape[2] // 128 * 128
    return sdpa(q, k[:, :, :whole], v[:, :, :whole], None, scale)


def keys_that_are_not_there(*given: Tensor | float | None) -> Tensor:
    """As SageAttention 1.0.6: the last block of 64 keys is filled up with scores of 0."""
    q, k, v, _, scale = given
    missing = [0, 0, 0, -k.shape[2] % 64]
    return sdpa(q, *(torch.nn.functional.pad(x, missing) for x in (k, v)), None, scale)


def sums_in_half_precision(*given: Tensor | float | None) -> Tensor:
    q, k, v, _, scale = given
    p = weights(q, k, scale)
    return ((p @ v.float()).half().float() / p.sum(-1, keepdim=True)).to(q.dtype)


def overflows_scores(*given: Tensor | float | None) -> Tensor:
    q, k, v, _, scale = given
    scores = (q.float() @ k.float().transpose(-1, -2)).half().float()
    return ((scores * (scale or q.shape[-1] ** -0.5)).softmax(-1) @ v.float()).to(q.dtype)


def writes_over_its_input(*given: Tensor | float | None) -> Tensor:
    """As SageAttention 1.0.6 with smooth_k."""
    given[1].sub_(given[1].mean(dim=2, keepdim=True))
    return sdpa(*given)


def wrong_type(*given: Tensor | float | None) -> Tensor:
    return sdpa(*given).float()


BROKEN = [
    (nan, NO_MASK, "gives NaN (one key in the last block)"),
    (ignores_the_mask, HIDDEN_KEYS, "ignores the mask"),
    (ignores_the_mask, BIAS, "ignores the mask"),
    (wrong_scale, NO_MASK, "wrong numbers"),
    (ignores_the_scale, NO_MASK, "ignores the scale"),
    (wrong_layout, NO_MASK, "wrong numbers"),
    (heads_last, NO_MASK, "gives (2, 200, 3, 64)"),
    (one_query_wrong, NO_MASK, "wrong numbers"),
    (ignores_the_last_keys, NO_MASK, "wrong numbers"),
    (keys_that_are_not_there, NO_MASK, "wrong numbers: error 0.1"),
    (sums_in_half_precision, NO_MASK, "overflows (large values)"),
    (overflows_scores, NO_MASK, "gives NaN (large scores)"),
    (writes_over_its_input, NO_MASK, "writes over its input"),
    (wrong_type, NO_MASK, "gives (2, 3, 200, 64) torch.float32"),
]


@pytest.mark.parametrize(
    ("backend", "kind", "reason"), BROKEN, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
@pytest.mark.parametrize("allowed", [0.0, 0.12], ids=["exact", "quantised"])
def test_a_broken_backend_is_found(backend, kind: str, reason: str, allowed: float) -> None:
    found = examine(backend, CPU, torch.bfloat16, 64, kind, allowed)
    assert not found.healthy and found.reason.startswith(reason), found


def test_what_a_backend_raises_is_raised() -> None:
    def out_of_memory(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("injected by a test")

    with pytest.raises(torch.OutOfMemoryError):
        examine(out_of_memory, CPU, torch.bfloat16, 64)


# ------------------------------------------------------------------------- masks
def hiding(rows: list[list[bool]], dtype: torch.dtype) -> Tensor:
    """(batch, 1, 1, keys), with the smallest number where a key is hidden."""
    seen = torch.tensor(rows)[:, None, None]
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


rows_of_keys = st.integers(1, 12).flatmap(
    lambda keys: st.lists(
        st.lists(st.booleans(), min_size=keys, max_size=keys).filter(any), min_size=1, max_size=3
    )
)


@given(rows=rows_of_keys, dtype=st.sampled_from([torch.float32, torch.bool]), batch=st.booleans())
def test_keys_that_are_left_out_are_as_good_as_hidden(
    rows: list[list[bool]], dtype: torch.dtype, batch: bool
) -> None:
    items = 2 if len(rows) == 1 and batch else len(rows)  # one row for a whole batch
    generator = torch.Generator().manual_seed(len(rows[0]))
    q, k, v = (torch.randn(items, 2, n, 8, generator=generator) for n in (3, *[len(rows[0])] * 2))
    mask = hiding(rows, dtype)
    unable = mask_aware(lambda q, k, v, mask, scale: sdpa(q, k, v, None, scale), takes_masks=False)
    torch.testing.assert_close(unable(q, k, v, mask, None), sdpa(q, k, v, mask, None))


def test_what_is_no_list_of_visible_keys() -> None:
    hidden = hiding([[True, False, True]], torch.bfloat16)
    assert [row.tolist() for row in visible_keys(hidden)] == [[0, 2]]
    infinite = torch.tensor([0.0, float("-inf"), 0.0])[None, None, None]
    assert [row.tolist() for row in visible_keys(infinite)] == [[0, 2]]
    assert visible_keys(hidden + torch.tensor([1.0, 0, 0])) is None  # adds something
    assert visible_keys(torch.full((1, 1, 1, 3), -1e4)) is None  # less weight, but some
    assert visible_keys(hidden.expand(1, 1, 5, 3)) is None  # one row for each query
    assert visible_keys(hidden.expand(1, 4, 1, 3)) is None  # ... or each head
    assert visible_keys(hiding([[True] * 3, [False] * 3], torch.float32)) is None  # nothing seen


def test_a_backend_without_masks_refuses_what_it_cannot_honour() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="takes no mask"):
        mask_aware(sdpa, takes_masks=False)(q, q, q, torch.randn(1, 1, 4, 4), None)


# ------------------------------------------------------------------------- time
def test_the_time_is_that_of_calls_after_the_first(monkeypatch) -> None:
    now = iter([0.0, 8.0, 9.0, 9.001, 10.0, 10.004, 12.0, 12.002])
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(now))
    calls = []
    seconds = attention.best_seconds(lambda: calls.append(1) or torch.zeros(1, 1))
    assert seconds == pytest.approx(1e-3) and len(calls) == 4


def test_slow_calls_are_not_repeated_for_long(monkeypatch) -> None:
    now = iter([0.0, 9.0, 10.0, 19.0])
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(now))
    calls = []
    assert attention.best_seconds(lambda: calls.append(1) or torch.zeros(1)) == 9.0
    assert len(calls) == 2


@pytest.mark.parametrize(("compiles", "calls"), [(True, 2), (False, 1)])
def test_a_call_that_is_far_slower_than_another_is_not_repeated(
    monkeypatch, compiles: bool, calls: int
) -> None:
    now = iter([0.0, 0.3, 1.0, 1.3])
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(now))
    made = []
    more = {"enough": 0.2, "compiles": compiles}
    seconds = attention.best_seconds(lambda: made.append(1) or torch.zeros(1), **more)
    assert seconds == pytest.approx(0.3) and len(made) == calls
