import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { answerIn, KIND_WORDS_SETTINGS, titleOf } from "../../js/kind_words_core.js";

const read = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf-8");
const locale = (language) => JSON.parse(read(`locales/${language}/settings.json`));

test("both settings are ones that the server reads, in both languages", () => {
  const server = read("nodes/settings.py");
  assert.equal(KIND_WORDS_SETTINGS.length, 2);
  for (const { id, name, tooltip, defaultValue } of KIND_WORDS_SETTINGS) {
    assert.ok(server.includes(`"${id}"`), `${id} is not read`);
    assert.equal(defaultValue, "");
    const key = id.replaceAll(".", "_");
    assert.deepEqual(locale("en")[key], { name, tooltip });
    for (const text of Object.values(locale("zh")[key])) assert.match(text, /[\u4e00-\u9fff]/);
  }
});

test("an answer is found in what the node shows, and in nothing else", () => {
  assert.equal(answerIn({ qwen_vram: [{ text: "x", answer: "Let us draw a bear." }] }), "Let us draw a bear.");
  assert.equal(answerIn({ qwen_vram: [{ answer: "" }, { answer: "Two." }] }), "Two.");
  assert.equal(answerIn({ qwen_vram: [{ answer: "" }] }), "");
  for (const other of [null, undefined, {}, { qwen_vram: null }, { qwen_vram: [null, { text: "hit" }] }, { qwen_vram: [{ answer: 3 }] }])
    assert.equal(answerIn(other), null);
});

test("the message has a title in the language of the page", () => {
  assert.deepEqual(["en", "zh", "zh-TW", "fr"].map(titleOf), ["Kind Words", "友善词语", "友善词语", "Kind Words"]);
});
