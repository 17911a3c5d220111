import assert from "node:assert/strict";
import { test } from "node:test";
import { definitionsIn, optionLabel } from "../../js/options_core.js";

const NODE = { inputs: { policy: { name: "策略", options: { "exact only": "只允许精确" } } } };
const ANSWER = { zh: { nodeDefs: { QwenVRAMFit: NODE } }, en: { nodeDefs: { QwenVRAMFit: {} } } };

test("a choice is shown in the user's language with its own name, the rest as it is", () => {
  const chinese = definitionsIn(ANSWER, "zh");
  assert.equal(optionLabel(chinese, "QwenVRAMFit", "policy", "exact only"), "只允许精确（exact only）");
  assert.equal(optionLabel(chinese, "QwenVRAMFit", "policy", "toString"), "toString");
  assert.equal(optionLabel(chinese, "QwenVRAMFit", "other", "exact only"), "exact only");
  assert.equal(optionLabel(chinese, "KSampler", "policy", "exact only"), "exact only");
  assert.deepEqual(definitionsIn(ANSWER, "zh-TW"), chinese);
});

test("where there is no translation, nothing changes", () => {
  for (const [answer, locale] of [[ANSWER, "en"], [ANSWER, "fr"], [{}, "zh"], [null, "zh"], [{ zh: {} }, "zh"]])
    assert.deepEqual(definitionsIn(answer, locale), {});
});
