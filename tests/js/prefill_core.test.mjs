import assert from "node:assert/strict";
import { test } from "node:test";
import { annotated, clipOf, doneText, isList, prefillPrompt, prefillWords } from "../../js/prefill_core.js";

const node = (class_type, inputs) => ({ class_type, inputs });
const OUTPUT = {
  1: node("CLIPLoader", { clip_name: "a" }),
  2: node("LoraLoader", { clip: ["1", 0], model: ["7", 0], name: ["8", 0] }),
  3: node("CLIPTextEncode", { clip: ["2", 1], text: "x" }),
  "12:4": node("QwenVRAMCachedTextEncode", { clip: ["2", 1], text: "y" }),
  7: node("UNETLoader", {}),
  8: node("PrimitiveString", { value: "z" }),
  9: node("SaveImage", { images: ["3", 0] }),
};

test("the only encoder of all text encodes is taken", () => {
  assert.deepEqual(clipOf(OUTPUT, []), { link: ["2", 1] });
  assert.deepEqual(clipOf(OUTPUT, ["9"]), { link: ["2", 1] });
});

test("with several encoders a selected node decides", () => {
  const two = { ...OUTPUT, 5: node("CLIPTextEncode", { clip: ["1", 0] }) };
  assert.deepEqual(clipOf(two, []), { problem: "several" });
  assert.deepEqual(clipOf(two, ["5"]), { link: ["1", 0] });
  assert.deepEqual(clipOf(two, ["3", "5"]), { problem: "several" });
});

test("without an encoder there is a sentence", () => {
  const { problem } = clipOf({ 9: OUTPUT[9], 3: node("CLIPTextEncode", { text: "x" }) }, ["9"]);
  assert.equal(problem, "noNode");
  for (const language of ["en", "zh"]) assert.ok(prefillWords(language)[problem]);
});

test("the prompt has what the clip needs and nothing beside it", () => {
  const { id, output } = prefillPrompt(OUTPUT, ["2", 1], "qwen_vram/list.csv [temp]");
  assert.ok(Number.isNaN(Number.parseInt(id, 10))); // no node of a graph can have it
  assert.deepEqual(Object.keys(output).sort(), ["1", "2", "7", "8", id]);
  assert.deepEqual(output[id].inputs.clip, ["2", 1]);
  assert.equal(output[id].inputs.file, "qwen_vram/list.csv [temp]");
});

test("a file that the server would refuse is refused before it is sent", () => {
  assert.deepEqual(["a.txt", "b.CSV", "c.tsv"].map(isList), [true, true, true]);
  assert.deepEqual(["a.xlsx", "txt", "a.txt.gz", ""].map(isList), [false, false, false, false]);
});

test("the result of a list is told in both languages", () => {
  const facts = { prompts: 3, known: 1, encoded: 1, seconds: 2, not_stored: 1, reason: "why" };
  assert.equal(doneText(facts, "en"), "3 prompts: 1 known, 1 encoded in 2.0 s, 1 not stored (why)");
  assert.equal(doneText({ ...facts, reason: "" }, "zh"), "共 3 条提示词：1 条已知，1 条编码用时 2.0 s，1 条未保存");
});

test("an uploaded file is named as ComfyUI's nodes do", () => {
  assert.equal(annotated({ name: "a.txt", subfolder: "qwen_vram", type: "temp" }), "qwen_vram/a.txt [temp]");
  assert.equal(annotated({ name: "a.txt", subfolder: "", type: "input" }), "a.txt [input]");
});
