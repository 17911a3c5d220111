import assert from "node:assert/strict";
import { test } from "node:test";
import { findNode, isToldAgain, lineIn, notRun, oursAmong, toldLater } from "../../js/status_core.js";

const graph = (nodes) => ({ getNodeById: (id) => nodes[id] ?? null });
const inner = graph({ 3: { comfyClass: "QwenVRAMLoadVAE" }, 4: { comfyClass: "KSampler" } });
const root = graph({ 1: { comfyClass: "QwenVRAMCachedTextEncode" }, 2: { subgraph: inner } });

test("nodes are found by their execution ids, inside subgraphs too", () => {
  assert.equal(findNode(root, "1").comfyClass, "QwenVRAMCachedTextEncode");
  assert.equal(findNode(root, "2:3").comfyClass, "QwenVRAMLoadVAE");
  assert.equal(findNode(root, "2:9"), null);
  assert.equal(findNode(root, "1:3"), null);
  assert.equal(findNode(undefined, "1"), null);
});

test("only this pack's nodes are spoken for", () => {
  assert.deepEqual(oursAmong(root, ["1", "2", "2:3", "2:4", "7"]), ["1", "2:3"]);
});

test("the sentence follows the frontend's language", () => {
  assert.match(notRun("en"), /^not run: not needed, or /);
  assert.match(notRun("zh"), /^未运行：不需要，或/);
  assert.equal(notRun("zh-TW"), notRun("zh"));
  assert.equal(notRun("fr"), notRun("en"));
  assert.equal(notRun(undefined), notRun("en"));
});

test("a result that was kept and is told again has its line, and until then another sentence", () => {
  const node = (has_intermediate_output) => ({ constructor: { nodeData: { has_intermediate_output } } });
  assert.deepEqual([node(true), node(false), node(undefined), {}, null].map(isToldAgain), [true, false, false, false, false]);
  assert.equal(lineIn({ qwen_vram: [{ text: "first" }, { text: "a bear" }] }), "a bear");
  for (const other of [null, undefined, {}, { qwen_vram: null }, { qwen_vram: [] }, { qwen_vram: [null] }, { qwen_vram: [{ text: 3 }] }])
    assert.equal(lineIn(other), null);
  assert.match(toldLater("en"), /^ComfyUI still has the result, /);
  assert.match(toldLater("zh-TW"), /^ComfyUI 仍保有结果，/);
});
