import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { ALLOCATOR_SETTINGS, splitProblem } from "../../js/allocator_core.js";

const read = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");
const words = (language) => JSON.parse(read(`locales/${language}/settings.json`));

test("every option that the start reads has a setting, and nothing else has", () => {
  const table = read("core/allocator.py").split("OPTIONS = {")[1].split("\n}\n")[0];
  const read_ = [...table.matchAll(/Option\(\s*"(\w+)"/g)].map((m) => `QwenVRAM.Allocator.${m[1]}`);
  assert.deepEqual(ALLOCATOR_SETTINGS.map((s) => s.id), read_);
});

test("everything is off at first", () => {
  const defaults = ALLOCATOR_SETTINGS.map((s) => s.defaultValue);
  assert.deepEqual(defaults, ["leave as it is", 0, "leave as it is", 0, ""]);
});

test("both languages have every text, the English one as it is in the code", () => {
  for (const { id, name, tooltip, options } of ALLOCATOR_SETTINGS) {
    const key = id.replaceAll(".", "_");
    const [english, chinese] = [words("en")[key], words("zh")[key]];
    assert.deepEqual([english.name, english.tooltip], [name, tooltip]);
    assert.match(chinese.tooltip, /[\u4e00-\u9fff]/);
    for (const entry of [english, chinese]) {
      assert.deepEqual(Object.keys(entry.options ?? {}), (options ?? []).map((o) => o.text));
    }
    assert.doesNotMatch(JSON.stringify([english, chinese]).replace(/[{}]/g, ""), /[@|]/);
  }
});

test("a size that the start refuses is marked in the dialog", () => {
  const least = Number(read("core/allocator.py").match(/whole number of MB from (\d+)/)[1]);
  assert.deepEqual([0, least, 128, null].map((value) => splitProblem(value, "en")), [null, null, null, null]);
  for (const value of [1, least - 1]) assert.match(splitProblem(value, "en"), new RegExp(`at least ${least}`));
  assert.match(splitProblem(5, "zh"), /至少 21/);
});
