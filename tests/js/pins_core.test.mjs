import assert from "node:assert/strict";
import { test } from "node:test";
import {
  eventsOf, executionIds, hasOutputs, isKept, markOf, outcomeOf, PIN_COLOURS, pinBadge, pinPrompt, pinUsers, pinWords,
  problemOf, rejection, setMark, valuesOf, withoutRunMark,
} from "../../js/pins_core.js";

const en = pinWords("en");

test("every text is there in both languages", () => {
  const zh = pinWords("zh");
  assert.deepEqual(Object.keys(zh), Object.keys(en));
  for (const [name, text] of Object.entries(zh)) {
    assert.equal(typeof text, typeof en[name]);
    assert.match(typeof text === "function" ? text("x", "y") : text, /[\u4e00-\u9fff]/);
  }
  assert.equal(pinWords("zh-TW"), zh);
  assert.equal(pinWords("fr"), en);
  assert.equal(pinWords(undefined), en);
});

test("marks leave other properties alone, and nothing behind", () => {
  const node = { properties: { "Node name for S&R": "X", qwen_vram: { keep_nothing: true } } };
  const old = node.properties.qwen_vram;
  setMark(node, "pin", { content: "a" });
  assert.deepEqual(node.properties.qwen_vram, { keep_nothing: true, pin: { content: "a" } });
  assert.deepEqual(old, { keep_nothing: true }); // what undo holds is not written into
  assert.deepEqual(markOf(node, "pin"), { content: "a" });
  setMark(node, "keep_nothing", undefined);
  setMark(node, "pin", undefined);
  assert.deepEqual(node.properties, { "Node name for S&R": "X" });
  const bare = {};
  setMark(bare, "pin", undefined);
  assert.deepEqual(bare.properties, {});
  assert.equal(markOf({}, "pin"), undefined);
});

test("the badge says what is marked", () => {
  const node = (qwen_vram) => ({ properties: { qwen_vram } });
  const badgeText = (...of) => pinBadge(...of).text;
  assert.equal(badgeText({}, en, null), "");
  assert.equal(badgeText(node({ pin: { bytes: 1.3e6 } }), en, null), "pinned 1.3 MB");
  assert.equal(badgeText(node({ keep_nothing: true }), en, null), "keeps nothing");
  assert.equal(badgeText(node({ keep_nothing: true, pin: {} }), en, null), "pinned · keeps nothing");
  assert.deepEqual(pinBadge(node({ keep_nothing: true }), en, null).bgColor, PIN_COLOURS.keepsNothing.bgColor);
});

test("a pin that ComfyUI has no longer is told, once that is known", () => {
  const node = { properties: { qwen_vram: { pin: { content: "a", bytes: 1.3e6 } } } };
  const missing = pinBadge(node, en, new Set(["b"]));
  assert.deepEqual([missing.text, missing.bgColor], ["pin is missing", PIN_COLOURS.missing.bgColor]);
  assert.equal(pinBadge(node, en, new Set(["a"])).text, "pinned 1.3 MB");
  assert.equal(pinBadge(node, en, null).text, "pinned 1.3 MB");
});

test("values that were changed after pinning are told; a seed that is drawn anew is none", () => {
  const seed = { name: "seed", value: 1, linkedWidgets: [{ name: "control_after_generate" }] };
  const shown = { name: "$$line", value: "hit", serialize: false };
  const node = { widgets: [{ name: "text", value: "a" }, seed, shown] };
  setMark(node, "pin", { content: "a", values: valuesOf(node) });
  seed.value = 2;
  shown.value = "miss";
  assert.equal(pinBadge(node, en, null).text, "pinned");
  node.widgets[0].value = "b";
  assert.equal(pinBadge(node, en, null).text, "pinned · values changed since");
  node.widgets[0].value = "a";
  assert.equal(pinBadge(node, en, null).text, "pinned");
  delete node.properties.qwen_vram.pin.values; // as older workflows have it
  node.widgets[0].value = "b";
  assert.equal(pinBadge(node, en, null).text, "pinned");
});

test("the nodes of a workflow that use a pin are named, each once", () => {
  const pinned = (id, title) => ({ id, title, properties: { qwen_vram: { pin: { content: "a" } } } });
  const inner = { nodes: [pinned(3, "Inside")] };
  const root = { nodes: [pinned(1, "One"), { id: 2, subgraph: inner }, { id: 4, subgraph: inner }, { id: 5 }] };
  assert.deepEqual([...pinUsers(root)], [["a", ["One", "Inside"]]]);
});

test("menus are for nodes that can have it", () => {
  assert.ok(hasOutputs({ outputs: [{}] }));
  assert.ok(!hasOutputs({ outputs: [] }) && !hasOutputs({}));
  assert.ok(!hasOutputs({ outputs: [{}], isVirtualNode: true }));
  assert.ok(isKept({ comfyClass: "VAEEncode" }) && isKept({ comfyClass: "QwenVRAMCachedTextEncode" }));
  assert.ok(isKept({ comfyClass: "Mine" }, "Other, Mine") && isKept({ subgraph: {} }));
  assert.ok(isKept({ comfyClass: "X", properties: { qwen_vram: { keep_nothing: true } } }));
  assert.ok(!isKept({ comfyClass: "KSampler" }, "") && !isKept({ type: "Note" }));
});

test("a node is found where the prompt has it", () => {
  const graph = (nodes) => ({ getNodeById: (id) => nodes[id] ?? null });
  const deep = { outputs: [{}] };
  const shared = { subgraph: graph({ 3: deep }) };
  const plain = { outputs: [{}] };
  const root = graph({ 1: plain, 2: shared, 4: { subgraph: shared.subgraph } });
  const output = { 1: {}, "2:3": {}, "4:3": {} };
  assert.deepEqual(executionIds(root, plain, output), ["1"]);
  assert.deepEqual(executionIds(root, deep, output), ["2:3", "4:3"]);
  assert.deepEqual(executionIds(root, plain, {}), []);
});

test("what cannot be pinned has a reason", () => {
  const node = (more) => ({ outputs: [{}], ...more });
  assert.equal(problemOf(node(), ["1"]), null);
  assert.equal(problemOf(node(), []), "notInRun");
  assert.equal(problemOf(node(), ["2:3", "4:3"]), "severalTimes");
  assert.equal(problemOf(node({ subgraph: {} }), ["1"]), "subgraph");
  assert.equal(problemOf({ outputs: Array(9).fill({}) }, ["1"]), "tooMany");
  class Saver {}
  Saver.nodeData = { output_node: true };
  assert.equal(problemOf(Object.assign(new Saver(), node()), ["1"]), "output");
  for (const name of ["notInRun", "severalTimes", "subgraph", "tooMany", "output"]) assert.ok(en[name]);
});

test("the request has one node more, fed by every output", () => {
  const output = { 5: {}, "12:3": {} };
  const prompt = pinPrompt(output, "12:3", 2);
  const added = prompt.output[prompt.id];
  assert.deepEqual(added.inputs, { value_0: ["12:3", 0], value_1: ["12:3", 1] });
  assert.equal(added.class_type, "QwenVRAMPin");
  assert.ok(Number.isNaN(Number.parseInt(prompt.id, 10))); // no node of a graph can have it
  assert.notEqual(pinPrompt(prompt.output, "5", 1).id, prompt.id);
  assert.deepEqual(Object.keys(output), ["5", "12:3"]);
});

test("the end of a run is told by its own events", () => {
  const done = ["executed", { prompt_id: "p", output: { qwen_vram_pin: [{ content: "a" }] } }];
  const success = ["execution_success", { prompt_id: "p" }];
  const other = ["execution_error", { prompt_id: "q", exception_message: "no" }];
  assert.equal(outcomeOf([], "p"), null);
  assert.equal(outcomeOf([done, other], "p"), null);
  assert.deepEqual(outcomeOf([other, done, success], "p"), { pin: { content: "a" } });
  assert.deepEqual(outcomeOf([success], "p"), { problem: "blocked" });
  assert.deepEqual(outcomeOf([["execution_interrupted", { prompt_id: "p" }]], "p"), { problem: "stopped" });
  assert.deepEqual(outcomeOf([["execution_error", { prompt_id: "p", exception_message: "why\n" }]], "p"), {
    error: "why",
  });
});

test("what the events did not tell is in the queue and in the history", () => {
  const queue = { queue_running: [[0, "r", {}]], queue_pending: [[1, "p", {}]] };
  const ended = (...messages) => ({ x: { outputs: { 9: { qwen_vram_pin: [{ content: "a" }] } }, status: { messages } } });
  const outcome = (id, history) => outcomeOf(eventsOf(id, queue, history), id);
  assert.equal(outcome("r", {}), null);
  assert.equal(outcome("p", {}), null);
  assert.deepEqual(outcome("x", {}), { problem: "lost" });
  assert.deepEqual(outcome("x", ended(["execution_success", { prompt_id: "x" }])), { pin: { content: "a" } });
  assert.deepEqual(outcome("x", ended(["execution_interrupted", { prompt_id: "x" }])), { problem: "stopped" });
  assert.ok(en.lost);
});

test("a private run leaves no mark behind", () => {
  const extra = { ds: 1, qwen_vram: { keep_nothing: true } };
  assert.deepEqual(withoutRunMark(extra), { ds: 1 });
  assert.deepEqual(withoutRunMark({ qwen_vram: { keep_nothing: true, more: 1 } }), { qwen_vram: { more: 1 } });
  const other = { qwen_vram: { more: 1 } };
  assert.equal(withoutRunMark(other), other);
  assert.deepEqual(withoutRunMark({}), {});
});

test("a refusal is told in the server's words", () => {
  const error = (type, details) => ({ type, message: "Custom validation failed", details });
  const response = {
    error: { message: "Prompt outputs failed validation" },
    node_errors: { 9: { errors: [error("custom_validation_failed", "input_types - The output MODEL ..."),
      error("value_not_in_list", "x")] } },
  };
  assert.equal(rejection(response, "?"), "The output MODEL ...\nCustom validation failed: x");
  assert.equal(rejection({ error: { message: "no" }, node_errors: {} }, "?"), "no");
  assert.equal(rejection({}, "?"), "?");
});
