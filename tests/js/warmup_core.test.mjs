import assert from "node:assert/strict";
import test from "node:test";
import { acceptedText, buttonOf, endOf, isActive, isSending, reportOf, SENDING, warmUpRequest } from "../../js/warmup_core.js";

const RESULT = {
  models: [{ name: "QwenImage", kind: "diffusion model", device: "cuda:0", bytes: 20.4e9 }],
  encoded: 2,
  stored: 2,
  known: 1,
  seconds: 12.34,
  kept_seconds: 8.05,
  cache: "ram",
};
const report = (more) => ({ id: "a", state: "running", problems: [], percent: 0, ...more });
const done = (result, more) => report({ state: "done", result: { ...RESULT, ...result }, ...more });

test("the request is what Run would send", () => {
  const sent = warmUpRequest({ output: { 1: {} }, workflow: { nodes: [] } });
  assert.deepEqual(sent, { prompt: { 1: {} }, extra_data: { extra_pnginfo: { workflow: { nodes: [] } } } });
});

test("a broken or hostile answer is no report", () => {
  const hostile = [null, undefined, "text", 7, [], {}, { id: 1, state: "done" }, { id: "a", state: "wild" }];
  hostile.push({ id: "a", state: "running" }, report({ state: "done", result: null }));
  hostile.push(done({ seconds: "1" }), done({ models: {} }), done({ known: undefined }));
  for (const body of hostile) assert.equal(reportOf(body), null, JSON.stringify(body));
  for (const body of [report(), done()]) assert.equal(reportOf(body), body);
});

test("what is shown never fails, whatever a model entry is", () => {
  const text = endOf(done({ models: [null, 3, {}] }), "en").detail;
  assert.match(text, /model undefined \? \(undefined\)/);
});

test("the button tells what to press, how far it is, and at which node", () => {
  assert.deepEqual([buttonOf(null, "en").icon, buttonOf(null, "en").label], ["pi pi-bolt", "Warm up"]);
  const now = buttonOf(report({ percent: 41.7, node: "VAE Decode" }), "en");
  assert.equal(now.label, "42 %");
  assert.equal(now.tooltip, "Warming up: VAE Decode. Press again to cancel. Run cancels it, too.");
  assert.match(buttonOf(report({ state: "waiting", ahead: 2 }), "en").tooltip, /^Waits for 2 runs in the queue\./);
  assert.match(buttonOf(report({ cancelling: true }), "en").tooltip, /stops at the next step/);
  assert.equal(buttonOf(report({ percent: "x" }), "zh").label, "0 %");
  assert.equal(buttonOf(done(), "zh").label, "预热");
  assert.deepEqual(["label", "icon"].map((name) => buttonOf(SENDING, "en")[name]), ["…", "pi pi-spin pi-spinner"]);
  assert.match(buttonOf({ ...SENDING, cancelling: true }, "en").tooltip, /as soon as ComfyUI has accepted it/);
});

test("a queue that is busy is told", () => {
  assert.equal(acceptedText(report({ state: "waiting", ahead: 1 }), "en"), "Waits for 1 run in the queue.");
  assert.equal(acceptedText(report({ state: "waiting", ahead: 0 }), "en"), "");
});

test("the message in the end says what is loaded, cached and saved", () => {
  const { severity, detail } = endOf(done(), "en");
  assert.equal(severity, "success");
  for (const part of [
    "Ready after 12.3 s.",
    "Loaded: diffusion model QwenImage 20.40 GB (cuda:0).",
    "2 encoded now, 1 known already",
    "results that took 8.1 s",
  ])
    assert.ok(detail.includes(part), `${part} / ${detail}`);
  assert.ok(!detail.includes("not kept"));
  assert.ok(detail.endsWith("results that took 8.1 s."));
  for (const locale of ["en", "zh"]) {
    const short = endOf(done({ kept_seconds: 0.09 }), locale).detail;
    assert.doesNotMatch(short, /takes over|直接使用/);
    assert.match(endOf(done({ kept_seconds: 0.1 }), locale).detail, /takes over|直接使用/);
  }
});

test("it says what the start options of ComfyUI and a private run change", () => {
  assert.match(endOf(done({ cache: "classic" }), "en").detail, /--cache-classic: results of your last run are dropped/);
  const none = endOf(done({ cache: "none" }), "en").detail;
  assert.ok(none.includes("--cache-none") && !none.includes("takes over"));
  assert.match(endOf(done({ stored: 0 }), "en").detail, /2 of them not kept/);
  assert.match(endOf(done({ models: [] }), "zh").detail, /没有模型/);
});

test("problems, failures and cancellation have their own tone", () => {
  const warned = endOf(done({}, { problems: ['"Save" (9): Value not in list'] }), "en");
  assert.equal(warned.severity, "warn");
  assert.ok(warned.detail.endsWith('"Save" (9): Value not in list'));
  assert.deepEqual(endOf(report({ state: "failed", error: "why" }), "en"), { severity: "error", detail: "It failed. why" });
  assert.equal(endOf(report({ state: "cancelled" }), "en").severity, "info");
});

test("nodes that were left out are named, and a failure that is known speaks the user's language", () => {
  const { severity, detail } = endOf(done({}, { left_out: ['"A" (1)', '"B" (2)'], problems: ["odd"] }), "en");
  assert.equal(severity, "warn");
  assert.match(detail, /Not warmed up: "A" \(1\), "B" \(2\)\. Such a node may save files .* odd$/);
  assert.match(endOf(done({}, { left_out: ["甲"] }), "zh").detail, /未预热：甲。/);
  assert.equal(endOf(done({}, { left_out: "odd" }), "en").severity, "success");
  const lost = report({ state: "failed", error: "Another listened.", code: "lost" });
  assert.equal(endOf(lost, "en").detail, "It failed. Another listened.");
  assert.match(endOf(lost, "zh").detail, /^预热失败。另一个客户端/);
});

test("both languages have every text", () => {
  for (const locale of ["en", "zh"]) {
    const texts = [done(), done({ cache: "classic", stored: 0 }), done({ cache: "none", models: [] })];
    for (const one of texts) assert.ok(!/undefined|NaN/.test(endOf(one, locale).detail));
  }
  assert.match(buttonOf(null, "zh-TW").label, /预热/);
});

test("what waits or runs is active", () => {
  assert.deepEqual(["waiting", "running", "done", "failed"].map((state) => isActive({ state })), [true, true, false, false]);
  assert.equal(isActive(null), false);
  assert.deepEqual([isSending(SENDING), isSending(report()), isSending(null)], [true, false, false]);
});
