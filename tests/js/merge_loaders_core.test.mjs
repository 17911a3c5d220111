import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { appNodes, emptiedGroups, loadedApart, LOADERS, mergedText, mergeWords, planMerges } from "../../js/merge_loaders_core.js";

const read = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf-8");
const node = (id, type, values = {}, inputs = {}, more = {}) => ({
  id, type, mode: 0, title: type, named: false, fixed: false, values, inputs, ...more,
});
const vae = (id, more = {}) => node(id, "VAELoader", { vae_name: "sub\\qwen.safetensors" }, {}, more);
const unet = (id, name = "a.safetensors") => node(id, "UNETLoader", { unet_name: name, weight_dtype: "default" });
const lora = (id, source, strength = 1) =>
  node(id, "LoraLoaderModelOnly", { lora_name: "l", strength_model: strength }, { model: source });
/** [[kept, removed ...], ...] */
const ids = (merges) => merges.map((merge) => [merge.keep, ...merge.remove.map((gone) => gone.id)]);

test("same file and same options become one, the oldest stays", () => {
  assert.deepEqual(ids(planMerges([vae(10), vae(9), vae(2, { values: { vae_name: "other" } })])), [[9, 10]]);
  const options = [unet(1), { ...unet(2), values: { unet_name: "a.safetensors", weight_dtype: "fp8_e5m2" } }];
  assert.deepEqual(planMerges(options), []);
  assert.deepEqual(planMerges([vae(1), node(2, "VAEDecode", { vae_name: "sub\\qwen.safetensors" })]), []);
});

test("a title that the user gave is kept; a second one is told", () => {
  const [merge] = planMerges([vae(1), vae(2, { named: true, title: "Mine" }), vae(3, { named: true, title: "His" })]);
  assert.deepEqual([merge.keep, merge.title, merge.file], [2, "Mine", "qwen.safetensors"]);
  assert.deepEqual(merge.remove, [{ id: 1, lostTitle: null }, { id: 3, lostTitle: "His" }]);
  const text = mergedText({ merges: [merge], emptied: ["Models"], blocked: [], apart: [] }, "en");
  assert.match(text, /^qwen\.safetensors: 3 loaders are now one, "Mine"\.\nTitles that are gone: "His"\./);
  assert.match(text, /group "Models"/);
  assert.match(text, /Undo/);
});

test("what app mode shows is kept, and several of them stay", () => {
  const data = { inputs: [["0a-1:12:vae_name", "vae_name"], [7, "seed"], ["3:4", "x", { height: 9 }], "odd"], outputs: [9] };
  const shown = appNodes(data);
  assert.deepEqual(["12", "7", "3", "4", "9", "1"].map((id) => shown.has(id)), [true, true, true, true, false, false]);
  for (const none of [undefined, null, {}, { inputs: 7 }]) assert.equal(appNodes(none).size, 0);
  const [merge] = planMerges([vae(1), vae(2, { named: true, title: "Mine" }), vae(3, { inApp: true })]);
  assert.deepEqual([merge.keep, merge.remove], [3, [{ id: 1, lostTitle: null }, { id: 2, lostTitle: "Mine" }]]);
  const [two] = planMerges([vae(1, { inApp: true }), vae(2, { inApp: true, title: "Shown" })]);
  assert.deepEqual([two.keep, two.remove, two.shown], [1, [], ["Shown"]]);
  const done = { merges: [], emptied: [], blocked: [], shown: two.shown, apart: [], changed: false };
  assert.equal(mergedText(done, "en"), "Not merged, because app mode shows their values: Shown.");
});

test("an error in the middle tells what was done, and how to take it back", () => {
  const [merge] = planMerges([vae(1), vae(2)]);
  const done = { merges: [merge], emptied: [], blocked: [], shown: [], apart: [], changed: true };
  const text = mergedText({ ...done, failed: "odd" }, "en");
  assert.match(text, /^Merging was broken off by an error: odd\nqwen\.safetensors: 2 loaders are now one, .*\nUndo takes back in one step/);
  const nothing = mergedText({ ...done, merges: [], changed: false, failed: "odd" }, "en");
  assert.equal(nothing, "Merging was broken off by an error: odd"); // undo would take back something else
  assert.match(mergedText({ ...done, unread: "odd" }, "en"), /are now one.*\nUndo takes all.*\nWhich loaders .* \(odd\)\.$/);
});

test("muted, bypassed, fixed, marked and unknown nodes stay apart", () => {
  for (const more of [{ mode: 2 }, { mode: 4 }, { fixed: true }, { marks: { pin: { content: "x" } } }]) {
    assert.deepEqual(planMerges([vae(1), vae(2, more)]), []);
  }
  assert.deepEqual(planMerges([node(1, "UnetLoaderGGUF"), node(2, "UnetLoaderGGUF")]), []); // its pack is missing
  assert.deepEqual(planMerges([node(1, "constructor"), node(2, "constructor")]), []);
});

test("loaders with inputs are the same behind the same source, also one that was merged", () => {
  const both = [unet(1), unet(2), lora(3, [1, 0]), lora(4, [2, 0])];
  assert.deepEqual(ids(planMerges(both)), [[1, 2], [3, 4]]);
  assert.deepEqual(ids(planMerges([unet(1), unet(2, "b"), lora(3, [1, 0]), lora(4, [2, 0])])), []);
  assert.deepEqual(ids(planMerges([unet(1), lora(3, [1, 0]), lora(4, [1, 0], 0.5)])), []);
  const chained = [unet(1), lora(2, [1, 0]), lora(3, [2, 0])]; // twice on purpose: twice the strength
  assert.deepEqual(planMerges(chained), []);
});

test("a linked widget counts by where the link comes from, not by what it shows", () => {
  const linked = (id, source, shown) => ({ ...vae(id), values: {}, inputs: { vae_name: source }, shown });
  assert.deepEqual(ids(planMerges([linked(1, [7, 0]), linked(2, [7, 0])])), [[1, 2]]);
  assert.deepEqual(planMerges([linked(1, [-10, 0]), linked(2, [-10, 1])]), []); // two sub-graph inputs
  assert.deepEqual(planMerges([linked(1, [7, 0]), vae(2)]), []);
});

test("reroutes are looked through, and circles of them end", () => {
  const reroute = (id, source) => node(id, "Reroute", {}, source ? { "": source } : {});
  const nodes = [unet(1), reroute(5, [1, 0]), reroute(6, [5, 0]), lora(2, [6, 0]), lora(3, [1, 0])];
  assert.deepEqual(ids(planMerges(nodes)), [[2, 3]]);
  const circle = [reroute(5, [6, 0]), reroute(6, [5, 0]), lora(2, [6, 0]), lora(3, [5, 0])];
  assert.equal(planMerges(circle).length, 0);
});

test("in random graphs merging changes no value and leaves nothing to merge", () => {
  let seed = 1;
  const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
  for (let round = 0; round < 300; round += 1) {
    const nodes = [];
    for (let id = 1; id <= 2 + random(12); id += 1) {
      const make = [() => unet(id, "ab"[random(2)]), () => vae(id, { mode: [0, 0, 4][random(3)] }),
        () => lora(id, [random(id), 0], random(2))][random(3)];
      nodes.push(make());
    }
    const shuffled = [...nodes].sort(() => random(3) - 1);
    // What a node gives, written out; there is no node 0.
    const given = (list) => (id) => {
      const found = list.find((each) => each.id === id);
      if (!found) return `?${id}`;
      const sources = Object.entries(found.inputs).map(([name, [from]]) => `${name}: ${given(list)(from)}`);
      return `${found.type} ${found.mode} ${JSON.stringify(found.values)} (${sources})`;
    };
    const merges = planMerges(shuffled);
    assert.deepEqual(ids(merges).map((x) => x[0]).sort(), ids(planMerges(nodes)).map((x) => x[0]).sort());
    const to = new Map(ids(merges).flatMap(([keep, ...gone]) => gone.map((id) => [id, keep])));
    const after = nodes.filter((each) => !to.has(each.id)).map((each) => ({
      ...each, inputs: Object.fromEntries(Object.entries(each.inputs).map(([n, [from, slot]]) => [n, [to.get(from) ?? from, slot]])),
    }));
    for (const { id } of nodes) assert.equal(given(after)(to.get(id) ?? id), given(nodes)(id));
    assert.deepEqual(planMerges(after), []);
  }
});

test("only groups that lost their last node are told as empty", () => {
  const groups = [{ title: "A", nodes: [1, 2] }, { title: "B", nodes: [2] }, { title: "C", nodes: [] }];
  assert.deepEqual(emptiedGroups(groups, [2]), ["B"]);
});

test("what sub-graphs still load twice is told, but not of our own loaders", () => {
  const load = (class_type, name) => ({ class_type, inputs: { [LOADERS[class_type]]: name } });
  const output = {
    "1:2": load("VAELoader", "v"), "3:2": load("VAELoader", "v"), 4: load("VAELoader", "w"),
    5: load("QwenVRAMLoadVAE", "v"), 6: load("QwenVRAMLoadVAE", "v"),
  };
  assert.deepEqual(loadedApart(output), [{ file: "v", count: 2 }]);
  const done = { merges: [], emptied: [], blocked: [], apart: loadedApart(output) };
  assert.match(mergedText(done, "en"), /^Nothing to merge: .*\nv has 2 loaders still/);
  assert.match(mergedText({ ...done, apart: [], blocked: ["Load VAE"] }, "en"), /^Not merged.*Load VAE\.$/);
});

test("words and labels exist in both languages", () => {
  assert.deepEqual(Object.keys(mergeWords("zh")), Object.keys(mergeWords("en")));
  const label = (language) => JSON.parse(read(`locales/${language}/commands.json`)).QwenVRAM_MergeLoaders.label;
  assert.ok(read("js/merge_loaders.js").includes(`label: "${label("en")}"`));
  assert.match(label("zh"), /[\u4e00-\u9fff]/);
});
