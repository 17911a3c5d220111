import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import {
  blocksText, bytesText, commandLabel, failureText, memoryWords, parseReport, pauseAfter, poller, probedText, viewOf,
} from "../../js/memory_panel_core.js";

const read = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf-8");
const en = memoryWords("en");
const part = (id, bytes, label = id) => ({ id, label, bytes, detail: "" });
const REPORT = {
  version: 1, running: true,
  devices: [{
    device: "cuda:0", name: "NVIDIA", kind: "cuda", total_bytes: 24e9, free_bytes: 9e9,
    parts: [
      part("other_processes", 1e9), part("model:0", 12e9, "Qwen-Image (fp8)"), part("model:1", 1.5e9, "VAE"),
      part("context", null), part("unexplained", -0.5e9), part("free", 9e9),
    ],
    not_measurable: [{ what: "fragmentation", why: "cudaMallocAsync keeps none" }],
  }],
  models: [{
    name: "Qwen-Image", file: "q.safetensors", kind: "diffusion model", dtype: "fp8", device: "cuda:0", bytes: 20e9,
    resident_bytes: 12e9, ram_bytes: null, pinned_bytes: 2e9, shared_with: 1, duplicate_of: "Qwen-Image (1)",
  }],
  findings: [{ id: "d", severity: "problem", text: "Two copies.", action: "Merge.", saves_bytes: 3.1e9, command: "QwenVRAM.MergeLoaders" }],
};

test("bars are to scale, and what cannot be measured has no piece of them", () => {
  const [device] = viewOf(REPORT, "en").devices;
  const shares = Object.fromEntries(device.rows.map((row) => [row.id, row.share]));
  const near = (share, wanted) => assert.ok(Math.abs(share - wanted) < 1e-9, `${share}`);
  near(shares["model:0"], 12 / 24);
  near(shares.free, 9 / 24);
  assert.deepEqual([shares.context, shares.unexplained], [0, 0]);
  assert.equal(device.use, "15.00 GB of 24.00 GB in use");
  const sizes = Object.fromEntries(device.rows.map((row) => [row.id, row.size]));
  assert.deepEqual([sizes.context, sizes.unexplained], ["not measurable", "−500.0 MB"]);
  assert.deepEqual(device.unknown, ["fragmentation: cudaMallocAsync keeps none"]);
  assert.match(device.label, /^cuda:0 - NVIDIA: 15\.00 GB of .*Qwen-Image \(fp8\) 12\.00 GB/); // for screen readers
  const colours = device.rows.map((row) => row.colour).filter(Boolean);
  assert.equal(new Set(colours).size, 4);
});

test("cards of the same name are told apart, and a part has one colour on all devices", () => {
  const [card] = REPORT.devices;
  const ram = { device: "cpu", name: "RAM", kind: "cpu", total_bytes: 9e9, parts: [part("model:1", 1e9), part("model:7", 1e9)] };
  const { devices } = viewOf({ devices: [card, { ...card, device: "cuda:1" }, ram] }, "en");
  assert.deepEqual(devices.map(({ name }) => name), ["cuda:0 - NVIDIA", "cuda:1 - NVIDIA", "RAM"]);
  const colours = devices.flatMap(({ rows }) => rows.filter(({ id }) => id.startsWith("model")).map(({ id, colour }) => [id, colour]));
  assert.equal(new Set(colours.map(String)).size, 3); // three models, each of one colour
  assert.equal(new Set(colours.map(([, colour]) => colour)).size, 3);
});

test("the kinds of models are Chinese in a Chinese editor", () => {
  const [known] = read("core/clearing.py").match(/KINDS = \((.*)\)/).slice(1);
  const kinds = [...known.matchAll(/"([^"]+)"/g)].map(([, kind]) => kind);
  assert.equal(kinds.length, 4);
  const seen = (kind, locale) => {
    const label = `${kind === "other" ? "Model" : kind[0].toUpperCase() + kind.slice(1)} q.safetensors (fp8)`; // memory_report.py
    const devices = [{ ...REPORT.devices[0], parts: [part("model:0", 1e9, label)] }];
    const { devices: [device], models: [model] } = viewOf({ devices, models: [{ ...REPORT.models[0], kind }] }, locale);
    return [device.rows[0].label, model.notes];
  };
  for (const kind of kinds) {
    for (const text of seen(kind, "zh")) assert.doesNotMatch(text, /model|encoder|other/i);
    if (kind !== "VAE") for (const text of seen(kind, "zh")) assert.match(text, /[\u4e00-\u9fff]+ |[\u4e00-\u9fff]+ · /);
    assert.ok(seen(kind, "en")[1].includes(kind));
  }
  assert.deepEqual(seen("text encoder", "zh")[0], "文本编码器 q.safetensors (fp8)");
  for (const locale of ["en", "zh"]) assert.match(seen("constructor", locale)[1], /constructor/);
});

test("colours are those of the picture", () => {
  const table = read("core/memory_map.py").split("OTHER_COLOURS = {")[1].split("}")[0];
  const known = [...table.matchAll(/"(\w+)": "(#\w+)"/g)].filter(([, id]) => !["unexplained", "smaller"].includes(id));
  const parts_ = [...known.map(([, id]) => part(id, 1e6)), part("model:0", 1e6)];
  const rows = viewOf({ devices: [{ name: "x", parts: parts_ }] }, "en").devices[0].rows;
  const first = read("core/memory_map.py").match(/MODEL_COLOURS = \("(#\w+)"/)[1];
  assert.deepEqual(rows.map(({ id, colour }) => [id, colour]), [...known.map(([, id, colour]) => [id, colour]), ["model:0", first]]);
});

test("the allocator and dynamic VRAM are told, and a look at the blocks", () => {
  const allocator = { backend: "native", allocated_bytes: 2e9, reserved_bytes: 3e9, largest_free_block_bytes: null, inactive_split_bytes: 1e8 };
  const device = { device: "cuda:0", name: "G", allocator, dynamic_vram_bytes: 33.7e6 };
  assert.deepEqual(viewOf({ devices: [device] }, "en").devices[0].notes, [
    "Dynamic VRAM: 33.7 MB in pages of 32 MiB",
    "Allocator native: 2.00 GB allocated, 3.00 GB reserved, largest free block not measurable, free between live blocks 100.0 MB",
  ]);
  const fragments = { largest_bytes: 5e8, small_bytes: 2e9, small_count: 7 };
  assert.equal(blocksText({ devices: [{ ...device, fragments }] }, "en"),
    "cuda:0 - G: the largest free block of the allocator has 500.0 MB; 2.00 GB lie in 7 fragments smaller than 64 MB.");
  const why = [{ what: "largest free block", why: "nobody keeps one." }];
  assert.equal(blocksText({ devices: [{ ...device, not_measurable: why }] }, "en"), "cuda:0 - G: not measurable: nobody keeps one.");
  assert.equal(blocksText({ devices: [{ name: "RAM", kind: "cpu", allocator: null }] }, "en"), en.noDevice);
});

test("parts, findings and reasons that the server words are there in Chinese", () => {
  const zh = memoryWords("zh");
  const ids = ["core/memory_report.py", "nodes/memory_sources.py"].flatMap((path) =>
    [...read(path).matchAll(/(?:Part|Holding)\(\s*"(\w+)"/g)].map((match) => match[1]));
  assert.ok(ids.includes("outputs") && ids.includes("stream_buffers"));
  for (const id of ids.concat("others_at_start")) assert.match(zh.parts[id] ?? "", /[\u4e00-\u9fff]/, id);
  const found = [...read("core/memory_findings.py").matchAll(/Finding\(\s*"(\w+)"/g)].map((match) => match[1]);
  for (const id of found.concat("duplicate_vae", "duplicate_text_encoder", "duplicate_diffusion_model")) assert.ok(zh.told[id], id);
  assert.ok(found.length >= 8);
  const sources = ["core/memory_report.py", "nodes/memory_sources.py", "nodes/nvml.py"].map(read).join("").replace(/"\s*\n\s*f?"/g, "").replace('{ASYNC}', "cudaMallocAsync");
  for (const reason of [...Object.keys(zh.why), ...Object.keys(zh.what)]) assert.ok(sources.includes(reason), reason);
  const finding = { id: "other_processes", text: "Other ...", action: "Close ...", about: "cuda:1", saves_bytes: 2e9 };
  const [told] = viewOf({ devices: [], findings: [finding, { ...finding, id: "constructor" }] }, "zh").findings;
  assert.deepEqual([told.text, told.action.slice(0, 2)], ["其他程序占用了 cuda:1 的 2.00 GB。", "关闭"]);
  assert.equal(viewOf({ devices: [], findings: [{ ...finding, id: "constructor" }] }, "zh").findings[0].text, "Other ...");
});

test("what the server says of a part is told in Chinese, with its figures", () => {
  const detail = (text, locale) => viewOf({ devices: [{ parts: [{ id: "a", detail: text }] }] }, locale).devices[0].rows[0].detail;
  const told = {
    "Python, libraries, other results": "Python、库和其他结果",
    "2.00 GB more only mapped from the file, 1.0 MB pinned": "另有 2.00 GB 仅由文件映射，锁页 1.0 MB",
    "1.00 GB of 2.00 GB resident": "1.00 GB / 2.00 GB 在设备上",
    "1.00 GB; its pages take 1.03 GB": "1.00 GB；所在的页占用 1.03 GB",
    "1.00 GB; it takes 1.03 GB": "1.00 GB；占用 1.03 GB",
    "as measured when ComfyUI started; others have given back 1.0 MB since": "ComfyUI 启动时测得，其他进程之后归还了 1.0 MB",
    "and what other processes took since ComfyUI started": "包括 ComfyUI 启动后其他进程占用的部分",
    "dynamic VRAM": "动态显存",
    "something new, 1.0 MB pinned": "something new, 1.0 MB pinned",
  };
  for (const [english, chinese] of Object.entries(told)) assert.deepEqual([detail(english, "zh"), detail(english, "en")], [chinese, english]);
  const source = ["core/memory_report.py", "nodes/memory_sources.py"].map(read).join("");
  for (const pattern of Object.keys(memoryWords("zh").details))
    for (const piece of pattern.split("([^,;]+)")) assert.ok(source.includes(piece.replace(/^; /, "").trim()), pattern);
});

test("parts that overlap still fit into the bar", () => {
  const device = { ...REPORT.devices[0], total_bytes: 10e9, parts: [part("a", 8e9), part("b", 8e9)] };
  const [{ rows }] = viewOf({ devices: [device] }, "en").devices;
  assert.deepEqual(rows.map((row) => row.share), [0.5, 0.5]);
});

test("a model tells where it is, and a missing figure is never 0", () => {
  const [model] = viewOf(REPORT, "en").models;
  assert.equal(model.onDevice, "12.00 GB of 20.00 GB");
  assert.equal(model.inRam, "RAM: not measurable");
  assert.equal(viewOf({ ...REPORT, models: [{ ...REPORT.models[0], device: "cpu" }] }, "en").models[0].inRam, "");
  assert.equal(model.notes, "q.safetensors · diffusion model · fp8 · cuda:0 · 2.00 GB pinned · shared with 1 more");
  assert.equal(model.duplicate, "second copy of Qwen-Image (1)");
  const [none] = viewOf({ devices: [], models: [{}] }, "en").models;
  assert.deepEqual([none.onDevice, none.inRam], ["not measurable", "RAM: not measurable"]);
  assert.equal(viewOf({ devices: [], models: [{ name: "a\u202erotsnetefas" }] }, "en").models[0].name, "arotsnetefas");
});

test("findings keep their action; only commands of ours are offered", () => {
  const [finding] = viewOf(REPORT, "en").findings;
  assert.deepEqual([finding.heading, finding.saves, finding.command], ["Problem", "about 3.10 GB", "QwenVRAM.MergeLoaders"]);
  for (const command of ["Comfy.ClearWorkflow", "QwenVRAM.<b>", 7, {}, null]) {
    assert.equal(viewOf({ devices: [], findings: [{ ...REPORT.findings[0], command }] }, "en").findings[0].command, null);
  }
  assert.equal(viewOf({ devices: [], findings: [{ severity: "constructor" }] }, "en").findings[0].severity, "info");
  assert.equal(commandLabel("QwenVRAM.Clear.cache", "x", en), "Clear caches");
  assert.equal(commandLabel("QwenVRAM.Other", "Other", en), "Other");
});

test("what is no report is refused", () => {
  for (const reply of ["", "<html>", "null", "[]", "7", '{"devices": 3}', "{"]) {
    assert.throws(() => parseReport(reply), { message: "notJson" });
  }
  assert.deepEqual(parseReport(JSON.stringify(REPORT)), REPORT);
});

test("why there is no report is told for people", () => {
  const told = (name, message = "") => failureText(Object.assign(new Error(message), { name }), 5, en);
  assert.equal(told("TimeoutError"), "ComfyUI did not answer within 5 seconds.");
  assert.deepEqual(["TypeError", "RangeError"].map((name) => told(name)), [en.unreachable, en.tooLarge]);
  assert.deepEqual([told("Error", "notJson"), told("Error", "502 Bad")], [en.notJson, "502 Bad"]);
});

test("hostile reports give bounded plain texts", () => {
  const values = [null, undefined, "x".repeat(1e5), -1, 1e308, NaN, Infinity, [], {}, [[]], true, "<img src=x onerror=alert(1)>"];
  let seed = 7;
  const any = () => values[(seed = (seed * 48271) % 2147483647) % values.length];
  const thing = (keys) => Object.fromEntries(keys.map((key) => [key, any()]));
  for (let round = 0; round < 100; round += 1) {
    const many = (keys) => (any() ? Array.from({ length: 150 }, () => thing(keys)) : any());
    const devices = Array.from({ length: 3 }, () => ({
      ...thing(["device", "name", "total_bytes", "free_bytes", "largest_allocation", "allocator", "fragments", "kind", "dynamic_vram_bytes"]),
      parts: many(["id", "label", "bytes", "detail"]), not_measurable: many(["what", "why"]),
    }));
    const report = {
      running: any(), devices: [...devices, any()],
      models: many(["name", "file", "kind", "dtype", "device", "bytes", "resident_bytes", "ram_bytes", "pinned_bytes", "shared_with", "duplicate_of"]),
      findings: many(["severity", "text", "action", "saves_bytes", "command"]),
    };
    const view = viewOf(report, "en");
    for (const { rows } of view.devices) {
      assert.ok(rows.length <= 100 && rows.every((row) => row.share >= 0 && row.share <= 1));
      assert.ok(rows.reduce((all, row) => all + row.share, 0) <= 1 + 1e-9);
    }
    for (const finding of view.findings) for (const said of Object.values(finding)) assert.ok(said === null || said.length < 500);
    assert.equal(typeof probedText(report, "zh"), "string");
    assert.equal(typeof blocksText(report, "zh"), "string");
    assert.ok(viewOf(report, "zh").findings);
  }
});

test("a probe tells what it found, or why it did not try", () => {
  const probed = (largest) => probedText({ devices: [{ name: "GPU", largest_allocation: largest }] }, "en");
  assert.equal(probed({ bytes: 2e9, note: "" }), "GPU: the largest allocation that succeeds now is 2.00 GB.");
  assert.match(probed({ bytes: null, note: "A prompt runs." }), /not measurable\. A prompt runs\.$/);
  assert.equal(probed(null), en.noProbe);
});

test("sizes are those of the report's texts", () => {
  assert.deepEqual([3.104e9, 2.5e8, -1.5e9, 0, null, "7"].map((size) => bytesText(size, en)),
    ["3.10 GB", "250.0 MB", "−1.50 GB", "0 B", "not measurable", "not measurable"]);
});

// A clock that goes when it is told to.
function fakeClock() {
  let time = 0;
  let waiting = [];
  return {
    now: () => time,
    setTimeout: (act, delay) => { waiting.push({ act, at: time + delay }); return waiting.at(-1); },
    clearTimeout: (timer) => { waiting = waiting.filter((each) => each !== timer); },
    async go(milliseconds) {
      const end = time + milliseconds;
      for (;;) {
        await new Promise((resolve) => setImmediate(resolve));
        const next = waiting.filter(({ at }) => at <= end).sort((one, other) => one.at - other.at)[0];
        if (!next) break;
        waiting = waiting.filter((each) => each !== next);
        time = next.at;
        next.act();
      }
      time = end;
    },
  };
}

test("asks once a second, only while it is seen, and not after it is gone", async () => {
  const clock = fakeClock();
  let [asked, wish] = [0, "yes"];
  const told = [];
  const poll = poller({ ask: async () => (asked += 1), show: (answer) => told.push(answer), fail: assert.fail, wanted: () => wish, clock });
  poll.start();
  poll.start();
  await clock.go(3500);
  assert.deepEqual(told, [1, 2, 3, 4]);
  wish = "later";
  await clock.go(60_000);
  assert.equal(asked, 4);
  wish = "yes";
  await clock.go(1000);
  assert.ok(asked >= 5);
  poll.soon();
  poll.soon();
  const before = asked;
  await clock.go(10);
  assert.equal(asked, before + 1);
  wish = "never";
  await clock.go(60_000);
  assert.equal(asked, before + 1);
  wish = "yes";
  poll.start(); // opened again
  await clock.go(10);
  assert.equal(asked, before + 2);
  poll.stop();
  await clock.go(60_000);
  assert.equal(asked, before + 2);
});

test("never asks twice at once; a slow server is asked less often", async () => {
  const clock = fakeClock();
  let [open, most, asked] = [0, 0, 0];
  const ask = () => new Promise((resolve) => {
    asked += 1;
    most = Math.max(most, (open += 1));
    clock.setTimeout(() => { open -= 1; resolve(1); }, 3000);
  });
  const poll = poller({ ask, show: () => {}, fail: assert.fail, wanted: () => "yes", clock });
  poll.start();
  await clock.go(60_000);
  assert.equal(most, 1);
  assert.ok(asked <= 5, `${asked}`); // 3 s to answer, 12 s of peace
  poll.stop();
  poll.start(); // while an answer is still out
  await clock.go(60_000);
  assert.equal(most, 1);
  while (!open) await clock.go(100);
  poll.stop();
  const before = asked;
  await clock.go(60_000);
  assert.equal(asked, before);
});

test("failures are told, asked less and less often, and forgotten", async () => {
  const clock = fakeClock();
  const told = [];
  let broken = true;
  const ask = async () => { if (broken) throw new Error("500"); return "fine"; };
  const poll = poller({ ask, show: (x) => told.push(x), fail: (x) => told.push(x.message), wanted: () => "yes", clock });
  poll.start();
  await clock.go(60_000);
  assert.ok(told.length >= 4 && told.length <= 7 && told.every((x) => x === "500"), told.join());
  broken = false;
  await clock.go(33_000);
  assert.equal(told.at(-1), "fine");
  assert.deepEqual([pauseAfter(0.01, 0), pauseAfter(0.5, 0), pauseAfter(9, 99)], [1, 2, 30]);
});

test("words exist in both languages, and so do the texts of the tab", () => {
  const keys = (value) => Object.entries(value).flatMap(([k, v]) => (typeof v === "object" && !["kinds", "parts", "details", "what", "why", "told"].includes(k) ? keys(v).map((x) => `${k}.${x}`) : [k]));
  assert.deepEqual(keys(memoryWords("zh")), keys(en));
  for (const language of ["en", "zh"]) {
    const load = (name) => JSON.parse(read(`locales/${language}/${name}.json`));
    assert.deepEqual(Object.keys(load("main").qwenVram), ["memory", "memoryTooltip"]);
    assert.ok(load("commands")["Workspace_ToggleSidebarTab_qwen-vram-memory"].label);
  }
  assert.ok(read("js/memory_panel.js").includes('["qwenVram.memory", "qwenVram.memoryTooltip"]'));
});
