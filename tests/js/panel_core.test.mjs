import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { ALLOCATOR_SETTINGS } from "../../js/allocator_core.js";
import { CLEAR_SETTING } from "../../js/clear_core.js";
import { KIND_WORDS_SETTINGS } from "../../js/kind_words_core.js";
import {
  daysOf, panelWords, pinRows, placeRows, question, removedText, savedRows,
} from "../../js/panel_core.js";
import { panelSetting, SETTINGS } from "../../js/settings_core.js";
import { SETTING as WARM_UP } from "../../js/warmup_core.js";

const read = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf-8");
const locale = (language, name) => JSON.parse(read(`locales/${language}/${name}.json`));
const tier = (entries, bytes, bound) => ({ entries, bytes, bound_bytes: bound });
const REPORT = {
  memory: tier(3, 1_500_000, 3_000_000),
  disk: tier(1200, 2_000_000_000, 2_000_000_000),
  redis: { ...tier(null, null, 1e9), state: "off" },
  now: { hits: 2, misses: 1, seconds_saved: 3.21 },
  total: { hits: 1234, misses: 5, seconds_saved: 7200 },
};

test("every setting is one that the server reads, in both languages", () => {
  const server = read("nodes/settings.py");
  for (const { id, name, tooltip, options } of [...SETTINGS, WARM_UP]) {
    const last = id.replace("QwenVRAM.Conditioning.", "");
    assert.ok(server.includes(`"${last}"`) || server.includes(id), `${id} is not read`);
    const key = id.replaceAll(".", "_");
    const labels = options && { options: Object.fromEntries(options.map(({ text }) => [text, text])) };
    assert.deepEqual(locale("en", "settings")[key], { name, tooltip, ...labels });
    const chinese = locale("zh", "settings")[key];
    assert.match(chinese.name + chinese.tooltip, /[\u4e00-\u9fff]/);
    assert.deepEqual(Object.keys(chinese.options ?? {}), (options ?? []).map((o) => o.text));
    for (const option of options ?? []) assert.ok(server.includes(`"${option.value}"`), option.value);
  }
  const categories = [...SETTINGS, WARM_UP, ...ALLOCATOR_SETTINGS, ...KIND_WORDS_SETTINGS, CLEAR_SETTING, panelSetting(() => null)].flatMap((s) => s.category.slice(0, 2));
  for (const language of ["en", "zh"]) {
    const known = Object.keys(locale(language, "main").settingsCategories);
    assert.deepEqual(known.sort(), [...new Set(categories)].sort());
  }
});

test("the defaults are the server's", () => {
  const byId = Object.fromEntries(SETTINGS.map((s) => [s.id.split(".").at(-1), s.defaultValue]));
  const server = read("nodes/settings.py");
  assert.ok(server.includes(`keep: str = KEEP_ALL`) && byId.Keep === "all encode nodes");
  assert.ok(server.includes("memory_bytes: int = 256_000_000"));
  assert.equal(byId.MemoryMB, 256);
  assert.ok(server.includes(`disk_bytes: int = ${byId.DiskGB}_000_000_000`));
  assert.ok(server.includes(`redis_seconds: int = ${byId.RedisDays} * 86400`));
  assert.ok(server.includes(`redis_bytes: int = ${byId.RedisGB}_000_000_000`));
});

test("every command has its label in both languages, in the menu too", () => {
  const files = readdirSync(new URL("../../js", import.meta.url)).filter((name) => name.endsWith(".js"));
  const labels = files.flatMap((name) => [...read(`js/${name}`).matchAll(/ label: "(.* \(Qwen VRAM\))",/g)].map(([, label]) => label));
  const [english, chinese] = ["en", "zh"].map((language) => locale(language, "commands"));
  const known = Object.values(english).map(({ label }) => label);
  assert.ok(labels.length >= 5);
  assert.deepEqual(labels.filter((label) => !known.includes(label)), []);
  assert.deepEqual(Object.keys(chinese), Object.keys(english));
  // The menu translates the English label, and the palette the id. In the pack's own submenu the
  // labels go without its name.
  const inMenu = (text, key) => (key.startsWith("QwenVRAM_") ? text.replace(/ ?[(（]Qwen VRAM[)）]$/, "") : text);
  const menuLabels = files.flatMap((name) => [...read(`js/${name}`).matchAll(/ menubarLabel: "(.*)",/g)].map(([, label]) => label));
  const written = labels.map((label) => label.replace(" (Qwen VRAM)", ""));
  assert.deepEqual(menuLabels, written.filter((label) => menuLabels.includes(label)));
  for (const [key, { label }] of Object.entries(chinese)) {
    assert.match(label, /[\u4e00-\u9fff]/);
    assert.equal(locale("zh", "main").menuLabels[inMenu(english[key].label, key)], inMenu(label, key));
  }
});

test("places are shown with how full they are, or with why not", () => {
  const [memory, disk, redis] = placeRows(REPORT, "en");
  assert.deepEqual(memory, { name: "In memory", entries: "3", size: "1.5 MB", bound: "3.0 MB", full: 0.5 });
  assert.deepEqual([disk.entries, disk.size, disk.full], ["1,200", "2.00 GB", 1]);
  assert.deepEqual(redis, { name: "In Redis", note: "off: no URL is set" });
  const away = placeRows({ ...REPORT, disk: tier(null, null, 1), redis: { ...REPORT.redis, state: "away" } }, "en");
  assert.equal(away[1].note, "not measurable");
  assert.match(away[2].note, /does not answer/);
});

test("savings are told for this process and for all", () => {
  const [now, total] = savedRows(REPORT, "en");
  assert.deepEqual(now, { name: "Since ComfyUI started", hits: "2", misses: "1", saved: "3.2 s" });
  assert.deepEqual([total.hits, total.saved], ["1,234", "2.0 h"]);
});

test("days are checked before they are sent", () => {
  assert.deepEqual(["30", " 1,5 ", "0"].map(daysOf), [30, 1.5, 0]);
  assert.deepEqual(["", "x", "-1", "1e9", "NaN"].map(daysOf), [null, null, null, null, null]);
});

test("questions name the days, and that others share it", () => {
  assert.match(question("unused", 7, REPORT, "en"), /not used for 7 days/);
  const shared = { ...REPORT, redis: { ...REPORT.redis, state: "connected" } };
  assert.match(question("all", null, shared, "en"), /for all machines/);
  assert.doesNotMatch(question("all", null, REPORT, "en"), /for all machines/);
  const away = { ...REPORT, redis: { ...REPORT.redis, state: "away" } };
  assert.match(question("all", null, away, "en"), /for all machines/); // it may answer meanwhile
  assert.doesNotMatch(question("all", null, null, "en"), /for all machines/);
  assert.match(question("everything", null, REPORT, "zh"), /固定.*启动时预热/);
  assert.match(question("everything", null, REPORT, "en"), /the workflow that is kept for the warm-up at start\?/);
});

test("what was removed is told, and what could not be", () => {
  const none = { entries: 0, bytes: 0 };
  const removed = { memory: none, disk: { entries: 2, bytes: 3000 }, redis: null, failed: [] };
  assert.equal(removedText(removed, "en"), "Removed: On disk: 2 (3.0 kB).");
  assert.equal(removedText({ ...removed, disk: none }, "en"), panelWords("en").nothing);
  const text = removedText({ ...removed, pins: { entries: 1, bytes: 9 }, failed: ["a.safetensors (locked)"] }, "en");
  assert.match(text, /1 pinned output\. Could not be removed: a\.safetensors \(locked\)\.$/);
  assert.equal(removedText({ deleted: 1 }, "en"), "Removed: 1 pinned output.");
  const all = { ...removed, disk: none, lists: 2, totals: true };
  assert.equal(removedText(all, "en"), "Removed: 2 lists of prompts · the totals.");
  assert.equal(removedText({ ...all, lists: 0 }, "zh"), "已删除: 累计数字.");
  const warmUp = { ...removed, disk: none, warm_up: true };
  assert.equal(removedText(warmUp, "en"), "Removed: the workflow for the warm-up at start.");
  assert.equal(removedText({ ...warmUp, warm_up: false }, "en"), panelWords("en").nothing);
  const away = { ...removed, redis: { entries: null, bytes: null, state: "away" } };
  assert.match(removedText(away, "en"), /^Removed: .*\. Redis does not answer: .* still there\./);
  const connected = { ...removed, redis: { entries: 1, bytes: 3000, state: "connected" } };
  assert.doesNotMatch(removedText(connected, "en"), /does not answer/);
});

test("pins are named by their types", () => {
  const content = "ab".repeat(32);
  const pins = [{ content, bytes: 2000, types: ["IMAGE", "MASK"], last_used: 0 }, { content, bytes: 1, types: [], last_used: 0 }];
  const users = new Map([[content, ["Load Image", "Other"]]]);
  assert.deepEqual(pinRows(pins, users, "en").map((row) => row.name), ["IMAGE, MASK", "abababababab"]);
  assert.deepEqual(pinRows(pins.slice(1), users, "en").map((row) => row.here), ["Load Image, Other"]);
  assert.deepEqual(pinRows(pins.slice(1), new Map(), "en").map((row) => row.here), ["no"]);
});

test("both languages have the same words", () => {
  const keys = (value) => Object.entries(value).flatMap(([k, v]) => (typeof v === "object" ? keys(v).map((x) => `${k}.${x}`) : [k]));
  assert.deepEqual(keys(panelWords("zh")), keys(panelWords("en")));
});
