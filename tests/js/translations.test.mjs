// Every text of js/ is there in English and in Chinese: in a table of words, or in locales/.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

const ROOM = new URL("../../js/", import.meta.url);
const FILES = readdirSync(ROOM).filter((name) => name.endsWith(".js"));
const source = (name) => readFileSync(new URL(name, ROOM), "utf-8");
const CHINESE = /[\u4e00-\u9fff]/;
// What is written the same in both languages, and what has no letters.
const SAME = /^(Qwen VRAM|VAE|redis|[^a-z\u4e00-\u9fff]*)$/i;

/** [{text, value}] for every `const NAME = { en: ..., zh: ... };` of a file. */
function tables(name) {
  const found = [...source(name).matchAll(/^(?:export )?const \w+ = (\{\n {2}en: [\s\S]*?\n\});$/gm)];
  return found.map(([, text]) => ({ text, value: valueOf(text) }));
}

/** An object as it is written; the constants that it names are left out. */
function valueOf(text) {
  const unknown = new Proxy({}, { has: (_, name) => typeof name === "string", get: () => "" });
  return new Function("unknown", `with (unknown) { return (${text}); }`)(unknown);
}

/** [path, leaf] of everything in a table. */
function leaves(value, path = []) {
  if (typeof value !== "object" || value === null) return [[path.join("."), value]];
  return Object.entries(value).flatMap(([key, inner]) => leaves(inner, [...path, key]));
}

test("every table of words has the same words in Chinese", () => {
  const all = FILES.flatMap((name) => tables(name).map(({ value }) => [name, value]));
  assert.ok(all.length >= 9);
  for (const [name, { en, zh, ...more }] of all) {
    assert.deepEqual(Object.keys(more), [], name);
    const [english, chinese] = [leaves(en), leaves(zh)].map((pairs) => new Map(pairs));
    for (const [path, text] of english) {
      assert.equal(typeof chinese.get(path), typeof text, `${name}: ${path}`);
      assert.equal(chinese.get(path).length, typeof text === "function" ? text.length : chinese.get(path).length, path);
    }
    for (const [path, text] of chinese) {
      // What the server words in English has no English entry: `why`, `parts`.
      assert.ok(english.has(path) || !Object.keys(en[path.split(".")[0]] ?? {}).length, `${name}: ${path} is left over`);
      const written = String(text).replaceAll("${", "");
      const words = written.match(/["'`]([^"'`]*)["'`]/g) ?? [written];
      assert.ok(words.some((word) => CHINESE.test(word)) || SAME.test(text) || leadsOnly(text), `${name}: ${path}`);
    }
  }
});

/** Whether a function only puts values together, with no words. */
function leadsOnly(text) {
  return typeof text === "function" && !/[a-z]{3}/i.test(String(text).replace(/^.*?=>/s, "").replace(/\$\{[^}]*\}/g, ""));
}

test("no sentence stands outside of the tables and of what locales/ translates", () => {
  const read = (name) => JSON.parse(readFileSync(new URL(`../../locales/en/${name}.json`, import.meta.url), "utf-8"));
  const known = new Set(["settings", "commands", "main"].flatMap((name) => leaves(read(name)).map(([, text]) => text)));
  for (const [, text] of FILES.flatMap((name) => tables(name).flatMap(({ value }) => leaves(value.en)))) known.add(text);
  const untold = FILES.flatMap((name) => sentences(name).map((text) => [name, text])).filter(([, text]) => !known.has(text));
  assert.deepEqual(untold, []);
});

/** What looks like words for people in a file, outside its tables and comments. */
function sentences(name) {
  const [bare] = [tables(name).reduce((text, table) => text.replace(table.text, "{}"), source(name))];
  const code = bare.replace(/^\s*(\/\/|\*|\/\*\*).*$/gm, "").replace(/"\s*\+\s*"/g, "").replace(/\s\/\/ .*$/gm, "");
  const texts = [...code.matchAll(/(?<!\w)"((?:[^"\\\n]|\\.)*)"|`([^`]*)`/g)].map(([, plain, template]) => plain ?? template);
  return texts.filter((text) => /^[A-Z][a-z]+ \w+/.test(text));
}

test("every fixed sentence of a refusal is known in Chinese by its code", () => {
  const python = ["nodes", "core"].flatMap((room) => {
    const folder = new URL(`../../${room}/`, import.meta.url);
    return readdirSync(folder).filter((name) => name.endsWith(".py")).map((name) => readFileSync(new URL(name, folder), "utf-8"));
  }).join("\n");
  const patterns = [/refusal\(\d+, "(\w+)"/g, /^ {4}code = "(\w+)"/gm, /self\.code = .*, "(\w+)"$/gm];
  const codes = new Set(patterns.flatMap((pattern) => [...python.matchAll(pattern)].map(([, code]) => code)));
  codes.delete("invalid"); // those name what is wrong, and are shown as they came
  const [{ value: { zh } }] = tables("refusal_core.js");
  assert.deepEqual([...codes].sort(), Object.keys(zh).sort());
});
