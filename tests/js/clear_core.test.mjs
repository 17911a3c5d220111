import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { bodyOf, CLEAR_SETTING, clearWords, detailOf, failureOf, knownLevel, needsWorkflow, toastOf } from "../../js/clear_core.js";

const CARD = {
  device: "cuda:0", kind: "cuda", freed_bytes: 14.2e9, after: { own_bytes: 5.9e9, reserved_bytes: 1 },
};
const RAM = { device: "cpu", kind: "cpu", freed_bytes: -2e6, after: { own_bytes: 2e9, reserved_bytes: null } };
const DONE = {
  done: true,
  level: "models",
  when: "at once",
  devices: [CARD, RAM],
  unloaded: [{ name: "a.safetensors" }],
  kept: [{ name: "b.safetensors", why: "the workflow needs it" }],
  left: [
    { id: "tensors", device: "cuda:0", bytes: 1e9, text: "Tensors" },
    { id: "weights", device: "cpu", bytes: null, text: "Unloaded models" },
    { id: "other_processes", device: "cuda:0", bytes: 3e9, text: "Others" },
    { id: "new", device: "cpu", bytes: 2e6, text: "Something of a newer version" },
  ],
};

test("the answer is told in lines", () => {
  assert.deepEqual(detailOf(DONE, "en").split("\n"), [
    "cuda:0: 14.20 GB freed, ComfyUI still uses 5.90 GB",
    "RAM: 2.0 MB more in use, ComfyUI still uses 2.00 GB",
    "Unloaded: a.safetensors",
    "Kept, because the workflow needs it: b.safetensors",
    "Still taken: node outputs and other tensors 1.00 GB, unloaded models in RAM (not measurable), " +
      "other programs 3.00 GB, Something of a newer version 2.0 MB",
  ]);
  assert.match(detailOf({ ...DONE, devices: [{ ...RAM, freed_bytes: -4096 }] }, "en"), /^RAM: nothing freed, ComfyUI still uses 2.00 GB/);
  const unknown = { ...DONE, devices: [{ ...CARD, freed_bytes: null }], unloaded: [], kept: [], left: [] };
  assert.equal(detailOf(unknown, "en"), "cuda:0: not measurable\nNo model was loaded in VRAM.");
  assert.match(detailOf(DONE, "zh-TW"), /释放了 14.20 GB，ComfyUI 仍占用 5.90 GB/);
  assert.match(detailOf(DONE, "zh"), /保留（工作流需要）：b\.safetensors/);
});

test("without a card there is nothing that models could leave", () => {
  const ram = { ...DONE, devices: [{ ...RAM, freed_bytes: 0 }], kept: [], left: [] };
  assert.match(detailOf(ram, "en"), /\nNothing to unload: the models are in RAM\. "Unload all models and forget node outputs" frees/);
  assert.match(detailOf(ram, "zh"), /\n没有可卸载的：/);
  const gone = { ...ram, devices: [{ ...RAM, freed_bytes: 5e9 }] };
  for (const told of [{ ...ram, level: "everything" }, { ...ram, kept: DONE.kept }, gone, { ...ram, devices: [CARD, RAM] }])
    assert.match(detailOf(told, "en"), /\nUnloaded: a\.safetensors/);
});

test("what will be done later says when", () => {
  const later = { done: false, level: "everything", when: "at the end of the prompt" };
  const { severity, detail } = toastOf(202, JSON.stringify(later), "en");
  assert.equal(severity, "info");
  assert.match(detail, /as soon as this run ends/);
});

test("every strange reply gets a message", () => {
  const strange = ["", "<html>", "[]", "null", "{}", '"done"', '{"done": "yes"}', '{"done":', "1"];
  for (const text of strange) {
    const { severity, detail } = toastOf(200, text, "en");
    assert.equal(severity, "error");
    assert.match(detail, /makes no sense \(status 200\)/);
  }
  assert.match(toastOf(500, JSON.stringify(DONE), "en").detail, /status 500/);
  assert.match(toastOf(403, '{"error": "Not from here."}', "en").detail, /Not from here\./);
  const hostile = { done: true, devices: [3, {}, null], unloaded: [[], {}], kept: "x", left: [{}, { bytes: {} }] };
  assert.match(toastOf(200, JSON.stringify(hostile), "en").detail, /undefined: not measurable/);
});

test("no answer at all gets a message", () => {
  const abort = Object.assign(new Error("aborted"), { name: "AbortError" });
  assert.match(failureOf(abort, "en").detail, /does not answer/);
  assert.match(failureOf(new TypeError("Failed to fetch"), "en").detail, /Failed to fetch/);
});

test("every reason to keep a model that the server gives is known in Chinese", () => {
  const server = readFileSync(new URL("../../core/clearing.py", import.meta.url), "utf-8");
  const reasons = Object.keys(clearWords("zh").why);
  assert.equal(reasons.length, server.match(/^[A-Z_]+ = "/gm).length);
  for (const reason of reasons) assert.ok(server.includes(`"${reason}"`), reason);
});

test("the body names a level of the server, and the workflow where it counts", () => {
  assert.deepEqual(bodyOf("models", "me"), { level: "models", wait_seconds: 3, client_id: "me" });
  const needed = bodyOf("needed", null, { 1: {} });
  assert.deepEqual(needed, { level: "models", keep_needed: true, wait_seconds: 3, prompt: { 1: {} } });
  assert.ok(needsWorkflow("needed") && !needsWorkflow("models"));
  for (const level of [undefined, "", "toString", "all"]) assert.equal(knownLevel(level), "models");
});

test("both languages have the same words", () => {
  const shape = (value) => {
    if (typeof value !== "object") return typeof value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, shape(inner)]));
  };
  const known = (language) => shape({ ...clearWords(language), why: {} }); // the server's are English
  assert.deepEqual(known("zh"), known("en"));
});

test("the setting offers every level, in both languages", () => {
  const { name, tooltip, options, id } = CLEAR_SETTING;
  for (const { value } of options) assert.equal(knownLevel(value), value);
  const texts = options.map(({ text }) => text);
  for (const language of ["en", "zh"]) {
    const path = new URL(`../../locales/${language}/settings.json`, import.meta.url);
    const told = JSON.parse(readFileSync(path, "utf-8"))[id.replaceAll(".", "_")];
    assert.deepEqual(Object.keys(told.options), texts);
    if (language === "en") assert.deepEqual([told.name, told.tooltip], [name, tooltip]);
    else assert.match(told.name + told.tooltip + Object.values(told.options).join(""), /[\u4e00-\u9fff]/);
  }
});
