import assert from "node:assert/strict";
import { test } from "node:test";
import { badgeOf, badgesIn, COLOURS, Runs, summaryOf, whyText } from "../../js/badges_core.js";
import { secondsText } from "../../js/text_core.js";

const node = (id, comfyClass, subgraph) => ({ id, comfyClass, subgraph });
const graphOf = (...nodes) => ({ getNodeById: (id) => nodes.find((n) => String(n.id) === String(id)) });
const isEncode = (type) => type === "CLIPTextEncode";
const textOf = (facts, locale = "en") => badgeOf(facts, locale).text;

test("a hit tells the tier and what it saved", () => {
  assert.equal(textOf({ result: "hit", tier: "disk", seconds_saved: 1.84 }), "hit · disk · saved 1.8 s");
  assert.equal(textOf({ result: "hit", tier: "redis", seconds_saved: 0 }), "hit · redis");
  assert.equal(textOf({ result: "hit", tier: "disk", seconds_saved: 75 }, "zh"), "命中 · 磁盘 · 节省 75 s");
});

test("a miss tells why, and its title the rest", () => {
  assert.equal(textOf({ result: "miss", why: "LoRA before clip changed" }), "miss · LoRA before clip changed");
  assert.equal(textOf({ result: "miss", why: "image2 changed" }), "miss · image2 changed");
  assert.equal(textOf({ result: "miss", why: "new text" }, "zh-TW"), "未命中 · 新的文本");
  assert.equal(textOf({ result: "miss", why: "text encoder file changed" }, "zh"), "未命中 · 文本编码器文件 已改变");
  const why = "cannot be cached: SomeNode reads the whole workflow";
  const badge = badgeOf({ result: "miss", why, seconds: 2, kept: "" }, "en");
  assert.equal(badge.text.length, "miss · ".length + 36);
  assert.equal(badge.title, `${why} · took 2.0 s`);
});

test("ComfyUI's own cache has a badge, other results have none", () => {
  assert.equal(textOf({ result: "comfy" }), "ComfyUI's cache");
  assert.equal(badgeOf({ result: "something new" }, "en"), null);
  assert.match(textOf({ result: "partial", why: "image changed", seconds_saved: 3 }), /^partly · .* · saved 3.0 s$/);
});

test("what is not known in Chinese stays as it is", () => {
  assert.equal(whyText("cannot be cached: a, b changed", "zh"), "无法缓存：a, b changed");
  assert.equal(whyText("mask changed", "zh"), "mask 已改变");
  assert.equal(whyText("something else", "zh"), "something else");
});

test("every reason of the server is told in Chinese", () => {
  const told = {
    "number of images changed": "图片数量 已改变", "reference size changed": "参考尺寸 已改变",
    "new image 2": "新的图片 2", "image 2 changed": "图片 2 已改变", "image2 is gone": "图片 2 已移除",
    "new image": "新的图片", "new image2": "新的图片 2", "image changed": "图片 已改变",
    "nothing is kept, by the settings": "按设置不保存",
    "LoRA before clip is gone": "clip 之前的 LoRA 已移除", "linked text changed": "连接的 text 已改变",
    "this node keeps nothing": "此节点不保存", "this run keeps nothing": "本次运行不保存",
    "first time": "首次", "new text, new image 1": "新的文本，新的图片 1",
    "new text, cannot be cached: x": "新的文本，无法缓存：x",
  };
  for (const [why, chinese] of Object.entries(told)) assert.equal(whyText(why, "zh"), chinese);
  assert.equal(whyText("new image 1, cannot be cached: x, y", "en"), "new image 1, cannot be cached: x, y");
  assert.equal(whyText("nodes before vae is gone", "zh"), "vae 之前的节点 已移除");
  assert.equal(textOf({ result: "hit", tier: "memory, disk" }, "zh"), "命中 · 内存, 磁盘");
});

test("seconds grow into minutes and hours", () => {
  assert.deepEqual([0, 0.04, 9.96, 100, 130, 9000].map(secondsText), ["0 s", "< 0.1 s", "10 s", "100 s", "2 min", "2.5 h"]);
});

test("what is too little to be told is not told as saved", () => {
  assert.equal(textOf({ result: "hit", tier: "disk", seconds_saved: 0.04 }), "hit · disk");
  const small = { result: "hit", tier: "disk", seconds_saved: 0.02 };
  assert.equal(summaryOf([small, small], "en").text, "2 hits");
});

test("what the user does not want to be kept is no miss", () => {
  const badge = (why, locale = "en") => badgeOf({ result: "not kept", why, seconds: 2 }, locale);
  const run = badge("this run keeps nothing");
  assert.deepEqual(run, { kind: "off", text: "not kept", title: "this run keeps nothing · took 2.0 s" });
  assert.equal(badge("nothing is kept, by the settings").text, "off");
  assert.equal(badge("cache is off", "zh").text, "已关闭");
  assert.equal(badge("this node keeps nothing"), null); // pins.js says it
  const facts = { result: "not kept", why: "cache is off" };
  assert.deepEqual([summaryOf([facts, facts], "en").kind, summaryOf([facts, facts], "en").text], ["off", "off"]);
});

test("a pinned node has no badge of what ran in its place", () => {
  const pinned = { ...node(6, "CLIPTextEncode"), properties: { qwen_vram: { pin: { content: "a" } } } };
  const facts = new Map([["6", { result: "hit", tier: "disk" }]]);
  assert.equal(badgesIn(graphOf(pinned), facts, isEncode, "en").size, 0);
  assert.equal(badgesIn(graphOf(node(6, "CLIPTextEncode")), facts, isEncode, "en").size, 1);
});

test("a sub-graph sums up its encode nodes", () => {
  const hit = { result: "hit", tier: "disk", seconds_saved: 1.5 };
  assert.equal(summaryOf([hit], "en").text, "hit · disk · saved 1.5 s");
  const both = summaryOf([hit, { result: "miss", why: "new text" }, hit], "en");
  assert.deepEqual([both.kind, both.text], ["miss", "2 hits · 1 miss · saved 3.0 s"]);
});

test("badges stand on encode nodes alone, in sub-graphs and on what holds them", () => {
  const inner = node(3, "CLIPTextEncode");
  const outer = node(12, "sub", graphOf(inner, node(4, "KSampler")));
  const root = graphOf(outer, node(5, "VAEDecode"), node(6, "CLIPTextEncode"));
  const runs = new Runs();
  const run = runs.start();
  runs.tell({ node: "12:3", result: "hit", tier: "disk", seconds_saved: 1 });
  runs.notRun(["12:3", "12:4", "5", "6", "99"]);
  runs.belongsTo("w", run, ["12:3", "12:4", "5", "6"]);
  const badges = badgesIn(root, runs.of("w"), isEncode, "en");
  const found = [...badges].map(([n, badge]) => [n.id, badge.kind]);
  assert.deepEqual(found, [[3, "hit"], [6, "comfy"], [12, "hit"]]);
});

test("a node keeps its last run, whichever answer comes first", () => {
  const runs = new Runs();
  const first = runs.start();
  runs.tell({ node: "1", result: "miss" });
  const second = runs.start();
  runs.tell({ node: "1", result: "hit" });
  runs.belongsTo("a", second, ["1"]);
  runs.belongsTo("a", first, ["1"]);
  assert.equal(runs.of("a").get("1").result, "hit");
});

test("badges of a workflow are its own, and a run clears those of its nodes alone", () => {
  const runs = new Runs();
  runs.belongsTo("a", runs.start(), ["1", "2"]);
  runs.tell({ node: "1", result: "miss" });
  runs.tell({ node: "2", result: "hit" });
  runs.belongsTo("b", runs.start(), ["1"]);
  assert.deepEqual([runs.of("a").size, runs.of("b").size, runs.of("c").size], [2, 0, 0]);
  runs.belongsTo("a", runs.start(), ["2", "3"]);
  assert.deepEqual([...runs.of("a").keys()], ["1"]);
});

const channel = (hex, at) => {
  const value = Number.parseInt(hex.slice(at, at + 2), 16) / 255;
  return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
};
const luminance = (hex) => 0.2126 * channel(hex, 1) + 0.7152 * channel(hex, 3) + 0.0722 * channel(hex, 5);

test("every chip is readable", () => {
  for (const { fgColor, bgColor } of Object.values(COLOURS)) {
    const [dark, light] = [bgColor, fgColor].map(luminance);
    assert.ok((light + 0.05) / (dark + 0.05) > 7, `${fgColor} on ${bgColor}`);
  }
});
