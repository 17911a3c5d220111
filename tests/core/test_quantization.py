"""Which layer gets which format, how large that is, and what is said of a broken list of presets."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.core import quantization as q
from pack.core.quantized_layers import encode
from pack.core.qwen_layers import TIME_TABLE, TOKEN_TABLE, VISION_MLP, published
from pack.tests.examples import examples

OURS = q.presets()
ALL = [(kind, name) for kind in q.KINDS for name in OURS[kind]]

names = st.text("abm01.*?_", min_size=1, max_size=8)
layers = st.dictionaries(names, st.tuples(st.integers(1, 600), st.integers(1, 600)), max_size=12)
rules = st.lists(
    st.builds(q.Rule, names, st.sampled_from([q.KEEP, q.MAIN, q.EIGHT_BIT, *q.FORMATS])),
    max_size=5,
).map(tuple)
formats = st.sampled_from(sorted(q.FORMATS))


@given(layers, rules, formats)
def test_each_layer_gets_what_its_first_rule_says_if_that_fits(layers, rules, main) -> None:
    preset = q.Preset("p", "", rules)
    planned = q.plan(layers, main, preset)
    assert planned.keys() <= layers.keys()
    for layer, shape in layers.items():
        wanted = preset.format_of(layer, main)
        if wanted != q.KEEP and not q.fits(wanted, shape):
            wanted = q.FORMATS[wanted].eight_bit
        assert planned.get(layer, q.KEEP) == wanted
        assert wanted == q.KEEP or q.fits(wanted, shape)


@given(st.permutations(["a.*", "*.b", "*"]))
def test_the_first_rule_that_matches_decides(patterns) -> None:
    said = dict(zip(patterns, ("keep", "8 bit", "w4a4"), strict=True))
    preset = q.Preset("p", "", tuple(q.Rule(*rule) for rule in said.items()))
    first = next(p for p in patterns if p in ("a.*", "*.b", "*"))
    expected = {"keep": "keep", "8 bit": "bnb_int8", "w4a4": "w4a4"}[said[first]]
    assert preset.format_of("a.b", "bnb_nf4") == expected
    assert q.Preset("p", "", ()).format_of("a.b", "bnb_nf4") == "bnb_nf4"


@given(formats, st.integers(1, 4096), st.integers(1, 4096))
def test_more_weights_are_never_smaller_and_scales_are_a_small_part(
    format, outputs, inputs
) -> None:
    size = q.bytes_of(format, (outputs, inputs))
    assert size <= q.bytes_of(format, (outputs + 1, inputs))
    plain = outputs * inputs * q.FORMATS[format].bits // 8
    assert plain <= size <= plain * 1.13 + 4 * outputs + q.MAPS + 8


@given(st.sampled_from(list(q.ROTATIONS)), st.integers(1, 10**5))
def test_a_rotation_divides_the_inputs_and_is_the_largest_that_does(format, inputs) -> None:
    size = q.rotation_of(format, inputs)
    dividing = [s for s in q.ROTATIONS[format] if inputs % s == 0]
    assert size == (max(dividing) if dividing else None)
    assert size is None or math.log(size, 4).is_integer()
    assert size or format == "int8" or not q.fits(format, (1, inputs))


def test_the_layers_of_the_published_models_are_rotated_as_they_were() -> None:
    """With 256 wherever that divides, so that a narrower kernel's limits do not change them."""
    for kind, layers in published().items():
        for preset, format in itertools.product(OURS[kind].values(), q.ROTATIONS):
            for layer, chosen in q.plan(layers, format, preset).items():
                inputs = layers[layer][1]
                assert q.rotation_of(chosen, inputs) == (None if inputs == VISION_MLP else 256)
                wanted = preset.format_of(layer, format)
                assert chosen == ("int8" if layer == TOKEN_TABLE else wanted)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_our_presets_keep_what_must_stay_and_name_real_layers(kind, name) -> None:
    planned = q.plan(published()[kind], "bnb_nf4", OURS[kind][name])
    kept = published()[kind].keys() - planned.keys()
    whole = {"img_in", "txt_in", "proj_out", "norm_out.linear"} if kind == q.KINDS[0] else set()
    assert whole <= kept and not any("time_text_embed" in layer for layer in planned)
    assert not any("merger" in layer for layer in planned)
    assert len(planned) > 190 and OURS[kind][name].title


def size(kind: str, format: str, name: str) -> float:
    """Of a published model, in GB."""
    layers = published()[kind]
    planned = q.plan(layers, format, OURS[kind][name])
    return (
        sum(
            q.bytes_of(planned[x], s) if x in planned else 2 * s[0] * s[1]
            for x, s in layers.items()
        )
        / 1e9
    )


def test_the_published_transformer_becomes_as_small_as_promised() -> None:
    assert sum(a * b for a, b in published()[q.KINDS[0]].values()) == pytest.approx(
        20.42e9, rel=1e-3
    )
    assert 10.4 < size(q.KINDS[0], "bnb_nf4", "smallest") < 10.7
    assert size(q.KINDS[0], "bnb_nf4", q.DEFAULT_PRESET) < 14.0
    assert size(q.KINDS[0], "int8", q.DEFAULT_PRESET) < 20.6


@given(rules, formats)
def test_the_token_table_is_kept_or_in_the_hosts_int8(rules, main) -> None:
    shape = published()["text_encoders"][TOKEN_TABLE]
    planned = q.plan({TOKEN_TABLE: shape}, main, q.Preset("p", "", rules))
    assert planned in ({}, {TOKEN_TABLE: "int8"})
    everything = q.Preset("p", "", (q.Rule("*", q.EIGHT_BIT),))
    assert q.plan({TOKEN_TABLE: shape}, main, everything) == {TOKEN_TABLE: "int8"}


@given(rules, formats)
def test_a_table_that_is_no_linear_layer_is_never_quantised(rules, main) -> None:
    shape = (2, 3072)  # of Qwen-Image-Layered; ComfyUI looks its rows up
    assert q.plan({TIME_TABLE: shape}, main, q.Preset("p", "", rules)) == {}


# ------------------------------------------------------------------------------- lists of presets
def text(rules: object, kind: str = "diffusion_models", **more: object) -> str:
    """A list with one preset called mine."""
    return json.dumps({kind: {"mine": {"rules": rules, **more}}})


def test_a_list_may_have_one_kind_alone_and_no_titles() -> None:
    read = q.parse_presets(text([["proj_out", "keep"], ["*.to_[qk]", "int8"]]), "f.json")
    assert read["text_encoders"] == {}
    mine = read["diffusion_models"]["mine"]
    assert (mine.name, mine.title) == ("mine", "")
    assert mine.format_of("transformer_blocks.0.attn.to_k", "w4a8") == "int8"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("", "it is empty; write presets into it, or delete it"),
        ("{", "Expecting property name"),
        ('{"text_encoders": {}, "text_encoders": {}}', "text_encoders stands twice"),
        ('{"text_encoders": {"mine": {}, "mine": {}}}', "mine stands twice in it; keep one"),
        ('{"text_encoders": {" ": {"rules": []}}}', "text_encoders: a preset has an empty name"),
        ("[" * 100000, "recursion"),
        ("[]", "must be an object"),
        ('{"loras": {}}', "loras is no kind of model; write diffusion_models or text_encoders"),
        ('{"text_encoders": 3}', "text_encoders must be an object"),
        ('{"text_encoders": {"mine": []}}', "text_encoders, mine must be an object"),
        (text([]), "at least one"),
        (text({"*": "keep"}), "at least one"),
        (text([["*", "keep"]], title=7), "a title"),
        (text([["*", "keep"]], rule=[]), "nothing else"),
        (text([["*"]]), "is not a rule"),
        (text(["**"]), "is not a rule"),
        (text([["*", 8]]), "is not a rule"),
        (text([["*", "nf4"]]), "nf4 is no format; write keep, main, 8 bit, bnb_int8"),
        (text([["blocks.*", "main"]]), "the pattern blocks.* matches no layer"),
        (text([["img_in", "keep"]], "text_encoders"), "a layer is called visual.merger.mlp.2"),
    ],
)
def test_a_broken_list_is_named_with_the_place_and_the_remedy(broken, said) -> None:
    with pytest.raises(ValueError, match=r"^f\.json is not a list of presets: .*\.$") as caught:
        q.parse_presets(broken, "f.json")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([*q.KINDS, "rules", "title", "a"]), x, max_size=3)))  # fmt: skip
def test_any_json_is_a_list_of_presets_or_refused_in_a_sentence(value) -> None:
    try:
        read = q.parse_presets(json.dumps(value), "f.json")
    except ValueError as error:
        assert str(error).startswith("f.json is not a list of presets: ")
    else:
        assert read.keys() == set(q.KINDS)


# ------------------------------------------------------------------------------------- what is made
@pytest.mark.parametrize("format", sorted(q.FORMATS))
@settings(max_examples=examples(4))
@given(outputs=st.integers(2, 40), inputs=st.sampled_from([64, 192, 320, 512]))
def test_the_bytes_are_those_that_the_codec_makes(format, outputs, inputs) -> None:
    inputs *= 1 if q.fits(format, (2 * outputs, inputs)) else 4
    entries = encode(torch.randn(2 * outputs, inputs), format)
    described = ("comfy_quant", "weight_format", "quant_state")
    made = sum(t.nbytes for n, t in entries.items() if not any(d in n for d in described))
    assert made == q.bytes_of(format, (2 * outputs, inputs))
