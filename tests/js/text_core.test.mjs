import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { clearWords, toastOf } from "../../js/clear_core.js";
import { jsonOf, refusalIn } from "../../js/refusal_core.js";
import { sizeText } from "../../js/text_core.js";

const folder = new URL("../../js/", import.meta.url);
const sources = readdirSync(folder).filter((name) => name.endsWith(".js"))
  .map((name) => [name, readFileSync(new URL(name, folder), "utf-8")]);
const having = (pattern) => sources.filter(([, source]) => pattern.test(source)).map(([name]) => name);

test("sizes are decimal", () => {
  assert.deepEqual([0, 999, 1500, 1.34e6, 268435456, 2.5e9, NaN].map(sizeText),
    ["0 B", "999 B", "1.5 kB", "1.3 MB", "268.4 MB", "2.50 GB", "?"]);
});

test("sizes, toasts and requests are made in one place", () => {
  assert.deepEqual(having(/1e9 ?\)|1e9, "GB"/), ["text_core.js"]);
  assert.deepEqual(having(/toast\.add\(/), ["toast.js"]);
  assert.deepEqual(having(/fetchApi\(|\bfetch\(/), ["prefill.js", "requests.js"]); // a file, of any size
  assert.deepEqual(having(/AbortController|AbortSignal/), ["requests.js"]);
});

test("a refusal speaks the user's language where its sentence is known", () => {
  const busy = { error: "A warm-up is already waiting.", code: "busy" };
  assert.equal(refusalIn(busy, "en"), busy.error);
  assert.match(refusalIn(busy, "zh-TW"), /^已有一次预热/);
  assert.equal(refusalIn({ error: "Node 7 is odd.", code: "invalid" }, "zh"), "Node 7 is odd.");
  assert.equal(refusalIn({ error: "old", code: "constructor" }, "zh"), "old");
  assert.equal(refusalIn({ error: "x".repeat(1e5) }, "en").length, 500);
  for (const none of [null, undefined, 7, "busy", [], {}, { error: 7 }]) assert.equal(refusalIn(none, "zh"), null);
  assert.deepEqual([jsonOf("<html>"), jsonOf("7")], [null, 7]);
  const refused = toastOf(403, JSON.stringify({ error: "Other.", code: "other_origin" }), "zh");
  assert.match(refused.detail, /其他来源/);
  assert.ok(refused.detail.startsWith(clearWords("zh").refused("").slice(0, 5)));
});
