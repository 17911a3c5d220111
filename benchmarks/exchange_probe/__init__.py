"""A custom node for cute_animal_exchange.py: what lies where around each node, and who was called.

It wraps functions of ComfyUI, which only a benchmark may do. GET /exchange_probe gives the rows
since the last call: one for each node that ran, then one ("end") for the moment of the call. The
wrappers cost the same whoever owns a node. "counts" are calls, bytes and seconds.
"""

import functools
import gc
import time

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.pinned_memory
import comfy_aimdo.model_vbar as vbars
import execution
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}
PATH = "/exchange_probe"
ARGUMENTS = ("memory_required", "minimum_memory_required", "for_dynamic", "force_full_load")
rows = []
row = {}


def fresh(node):
    """A row before its node runs."""
    return {"node": node, "calls": [], "counts": {}, "streamed": {}, "collected": [0, 0.0]}


def where():
    """Bytes of each loaded model on its device, of pinned RAM, and of torch's; None: no card."""
    models = {}
    for entry in list(mm.current_loaded_models):
        if (patcher := entry.model) is None:
            continue
        facts = {"device": patcher.loaded_size(), "dynamic": patcher.is_dynamic()}
        if patcher.is_dynamic():
            vbar = patcher._vbar_get()
            facts["pages"] = 0 if vbar is None else vbar.loaded_size()
            facts["watermark"] = 0 if vbar is None else vbar.get_watermark()
            facts["RAM pinned"] = patcher.pinned_memory_size()
        models.setdefault(type(patcher.model).__name__, []).append(facts)
    found = {"models": models, "pinned": mm.TOTAL_PINNED_MEMORY}
    if torch.cuda.is_available():
        found["reserved"] = torch.cuda.memory_reserved()
        found["allocated"] = torch.cuda.memory_allocated()
        found["free"] = torch.cuda.mem_get_info()[0]
    return found


def count(name, number=1, size=0, seconds=0.0):
    """Add to one of the counts of the node that runs: calls, bytes, seconds."""
    kept = row.setdefault("counts", {}).setdefault(name, [0, 0, 0.0])
    for place, value in enumerate((number, size, seconds)):
        kept[place] += value


def told(arguments, more):
    """What a call was about: models by the names of their classes, and numbers by theirs."""
    models = arguments[0] if arguments and isinstance(arguments[0], list) else []
    about = {"models": [type(m.model).__name__ for m in models]} if models else {}
    if arguments and isinstance(arguments[0], (int, float)):
        about["memory_required"] = float(arguments[0])
    return about | {n: float(more[n]) for n in ARGUMENTS if more.get(n) is not None}


def listed(owner, name):
    """Keep each call of a function, in their order."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def call(*arguments, **more):
        own = {"call": name, **told(arguments, more)}
        row.setdefault("calls", []).append(own)
        begin = time.perf_counter()
        try:
            return real(*arguments, **more)
        finally:
            own["seconds"] = time.perf_counter() - begin

    setattr(owner, name, call)


def counted(owner, name, size=lambda result, more: 0):
    """Only count the calls of a function that runs often, with seconds and bytes: `size` of what
    it gave and of its arguments by name."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def call(*arguments, **more):
        begin = time.perf_counter()
        result = real(*arguments, **more)
        count(name, 1, size(result, more), time.perf_counter() - begin)
        return result

    setattr(owner, name, call)


def follow_pages():
    """Of each weight that dynamic VRAM asks for: is it there, or does it come from the RAM again?

    ComfyUI compares the signature of a weight's pages at once after asking for them.
    """
    fault, compare = vbars.vbar_fault, vbars.vbar_signature_compare
    last = [(None, 0, 0)]

    def vbar_fault(alloc):
        last[0] = alloc
        return fault(alloc)

    def vbar_signature_compare(a, b):
        there = compare(a, b)
        vbar, _, size = last[0]
        kind = "resident" if there else "brought in" if a is not None else "streamed past"
        kept = row.setdefault("streamed", {}).setdefault(str(id(vbar)), {}).setdefault(kind, [0, 0])
        kept[0] += 1
        kept[1] += size
        return there

    vbars.vbar_fault, vbars.vbar_signature_compare = vbar_fault, vbar_signature_compare


def names_of_vbars():
    """Whose pages they are."""
    found = {}
    for entry in list(mm.current_loaded_models):
        if (patcher := entry.model) is not None and patcher.is_dynamic():
            found[str(id(patcher._vbar_get()))] = type(patcher.model).__name__
    return found


began = [0.0]


def collecting(phase, info):
    """Seconds of Python's garbage collection while a node runs."""
    if phase == "start":
        began[0] = time.perf_counter()
    elif row:
        kept = row.setdefault("collected", [0, 0.0])
        kept[0] += info["generation"] == 2
        kept[1] += time.perf_counter() - began[0]


real_output = execution.get_output_data


async def get_output_data(prompt_id, unique_id, *arguments, **more):
    """Around each node that really runs; not around the look at its lazy inputs."""
    global row
    row = fresh(unique_id) | {"before": where()}
    rows.append(row)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin, thread = time.perf_counter(), time.thread_time()
    try:
        return await real_output(prompt_id, unique_id, *arguments, **more)
    finally:
        row["seconds"] = time.perf_counter() - begin
        row["worker seconds"] = time.thread_time() - thread
        if torch.cuda.is_available():
            row["peak"] = torch.cuda.max_memory_allocated()
        names = names_of_vbars()
        row["streamed"] = {names.get(k, k): v for k, v in row["streamed"].items()}
        row["after"] = where()


async def get_rows(request):
    """Everything since the last call."""
    taken, rows[:] = list(rows), []
    return web.json_response([*taken, {"node": "end", "before": where()}])


execution.get_output_data = get_output_data
for function in ("free_memory", "load_models_gpu", "reset_cast_buffers", "free_pins"):
    listed(mm, function)
for function in ("soft_empty_cache", "synchronize", "free_registrations", "get_free_memory"):
    counted(mm, function)
counted(
    comfy.pinned_memory,
    "pin_memory",
    size=lambda pinned, more: (more.get("size") or 0) if pinned else 0,
)
patcher = comfy.model_patcher.ModelPatcherDynamic
for method in ("partially_unload", "partially_unload_ram", "unregister_inactive_pins"):
    counted(patcher, method, size=lambda freed, more: int(freed or 0))
for method in ("load", "detach", "unpatch_model"):
    counted(patcher, method)
follow_pages()
gc.callbacks.append(collecting)
PromptServer.instance.routes.get(PATH)(get_rows)
