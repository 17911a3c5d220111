// The memory panel: a report as ComfyUI's server sends it -> what is drawn; and when to ask for
// the next. The reply is not believed: it may be broken, huge or hostile. Pure: no DOM, no app.
import { sizeText, wordsOf } from "./text_core.js";

const WORDS = {
  en: {
    title: "Memory", running: "A workflow is running.", idle: "Nothing is running.",
    devices: "Devices", models: "Models", findings: "Findings", actions: "Actions",
    use: (used, total) => `${used} of ${total} in use`,
    useUnknown: (total) => `${total} in all; what is in use is not measurable`,
    unknown: "not measurable", notMeasurable: (count) => `Not measurable: ${count}`,
    model: "Model", places: "on its device", ram: (size) => `RAM: ${size}`,
    of: (part, whole) => `${part} of ${whole}`, pinned: (size) => `${size} pinned`,
    mapped: (size) => `${size} only mapped from the file`,
    shared: (count) => `shared with ${count} more`, duplicate: (name) => `second copy of ${name}`,
    noModels: "ComfyUI holds no model.", noFindings: "Nothing stands out.",
    saves: (size) => `about ${size}`, run: "Do it",
    severities: { problem: "Problem", warning: "Warning", info: "Note" },
    probe: "Probe the largest allocation", probing: "Probing ...",
    probeTitle: "Allocates memory for a moment to find the largest block that can be had now. Not while a workflow runs.",
    largest: (name, size, note) => `${name}: the largest allocation that succeeds now is ${size}. ${note}`.trim(),
    noProbe: "ComfyUI told no largest allocation: there is no device but the RAM.",
    loading: "Asking ComfyUI ...",
    noAnswer: (why) => `No answer: ${why}`, stale: (time) => `The figures are those of ${time}.`,
    slow: (seconds) => `ComfyUI did not answer within ${seconds} seconds.`,
    unreachable: "ComfyUI cannot be reached.", notJson: "ComfyUI sent something that is no report.",
    tooLarge: "the reply is too large to be a report.",
    commands: {
      "qwenvram.mergeloaders": "Merge duplicate loaders", "qwenvram.clear.cache": "Clear caches",
      "qwenvram.clear.models": "Unload all models", "qwenvram.clear.needed": "Unload unneeded models",
      "qwenvram.clear.everything": "Unload all, forget outputs",
    },
    allocator: (name, live, kept, largest, split) =>
      `Allocator ${name}: ${live} allocated, ${kept} reserved, largest free block ${largest}, free between live blocks ${split}`,
    dynamic: (size) => `Dynamic VRAM: ${size} in pages of 32 MiB`,
    blocks: "Look at the free blocks", blocksTitle: "Asks torch's allocator once for its blocks: the largest free one, and the fragments.",
    found: (name, largest, size, number) =>
      `${name}: the largest free block of the allocator has ${largest}; ${size} lie in ${number} fragments smaller than 64 MB.`,
    noBlocks: (name, why) => `${name}: not measurable: ${why}`,
    noDevice: "There is no device with an allocator of torch.",
    kinds: {}, parts: {}, details: {}, what: {}, why: {}, told: {},
  },
  zh: {
    title: "内存", running: "工作流正在运行。", idle: "没有工作流在运行。",
    devices: "设备", models: "模型", findings: "发现", actions: "操作",
    use: (used, total) => `已用 ${used}，共 ${total}`,
    useUnknown: (total) => `共 ${total}；已用量无法测量`,
    unknown: "无法测量", notMeasurable: (count) => `无法测量：${count} 项`,
    model: "模型", places: "在设备上", ram: (size) => `内存：${size}`,
    of: (part, whole) => `${part} / ${whole}`, pinned: (size) => `锁页 ${size}`,
    mapped: (size) => `${size} 仅由文件映射`,
    shared: (count) => `与另外 ${count} 处共用`, duplicate: (name) => `${name} 的第二份`,
    noModels: "ComfyUI 没有持有模型。", noFindings: "没有需要处理的问题。",
    saves: (size) => `约 ${size}`, run: "执行",
    severities: { problem: "问题", warning: "警告", info: "提示" },
    probe: "探测最大可分配量", probing: "正在探测……",
    probeTitle: "短暂分配显存，以找出当前能得到的最大一块。工作流运行时不可用。",
    largest: (name, size, note) => `${name}：当前能成功的最大分配为 ${size}。${note}`.trim(),
    noProbe: "ComfyUI 没有给出最大分配：除内存外没有其他设备。",
    loading: "正在询问 ComfyUI……",
    noAnswer: (why) => `没有应答：${why}`, stale: (time) => `显示的是 ${time} 的数值。`,
    slow: (seconds) => `ComfyUI 在 ${seconds} 秒内没有应答。`,
    unreachable: "无法连接 ComfyUI。", notJson: "ComfyUI 发来的内容不是报告。",
    tooLarge: "应答太大，不可能是报告。",
    commands: {
      "qwenvram.mergeloaders": "合并重复的加载器", "qwenvram.clear.cache": "清理缓存",
      "qwenvram.clear.models": "卸载所有模型", "qwenvram.clear.needed": "卸载不需要的模型",
      "qwenvram.clear.everything": "卸载全部并丢弃输出",
    },
    allocator: (name, live, kept, largest, split) =>
      `分配器 ${name}：已分配 ${live}，已保留 ${kept}，最大空闲块 ${largest}，使用中的块之间空闲 ${split}`,
    dynamic: (size) => `动态显存：${size}（每页 32 MiB）`,
    blocks: "查看空闲块", blocksTitle: "向 torch 的分配器查询一次：最大的空闲块和碎片。",
    found: (name, largest, size, number) => `${name}：分配器最大的空闲块为 ${largest}；${size} 分散在 ${number} 个小于 64 MB 的碎片中。`,
    noBlocks: (name, why) => `${name}：无法测量：${why}`,
    noDevice: "没有使用 torch 分配器的设备。",
    kinds: { "diffusion model": "扩散模型", "text encoder": "文本编码器", VAE: "VAE", model: "模型", other: "其他" },
    parts: {
      other_processes: "其他进程", pack: "Qwen VRAM 的提示词缓存", context: "CUDA 上下文和库",
      others_at_start: "其他进程和驱动（ComfyUI 启动时）", outputs: "节点保留的结果",
      stream_buffers: "权重传输缓冲区（动态显存）", cast_buffers: "权重传输缓冲区",
      reference_cache: "Qwen VRAM 的参考图缓存",
      allocator_live: "节点的张量", allocator_split: "分配器：碎片", allocator_cache: "分配器：缓存",
      process: "ComfyUI 的其余部分", rest: "其他进程、驱动和未能解释的部分",
      unknown: "空闲，或被其他程序占用（无法测量）", unexplained: "未能解释", free: "空闲",
    },
    // Sizes are written in the same way in both languages.
    details: {
      "Python, libraries, other results": "Python、库和其他结果",
      "dynamic VRAM": "动态显存",
      "as measured when ComfyUI started": "ComfyUI 启动时测得",
      "and what other processes took since ComfyUI started": "包括 ComfyUI 启动后其他进程占用的部分",
      "others have given back ([^,;]+) since": "其他进程之后归还了 $1",
      "([^,;]+) more only mapped from the file": "另有 $1 仅由文件映射",
      "([^,;]+) pinned": "锁页 $1",
      "([^,;]+) of ([^,;]+) resident": "$1 / $2 在设备上",
      "([^,;]+); its pages take ([^,;]+)": "$1；所在的页占用 $2",
      "([^,;]+); it takes ([^,;]+)": "$1；占用 $2",
    },
    what: {
      "total memory": "总量", "memory in use": "已用量", "memory of this process by the driver's count": "驱动统计的本进程占用",
      "other processes": "其他进程", "largest free block": "最大空闲块", fragmentation: "碎片",
    },
    why: {
      "the driver's allocator cudaMallocAsync keeps no list of blocks; with --disable-cuda-malloc torch's own allocator does.":
        "驱动的分配器 cudaMallocAsync 不记录显存块；使用 --disable-cuda-malloc 时，torch 自带的分配器会记录。",
      "only asked for on demand, since it takes long: ?fragments=true, or the node.":
        "耗时较长，只在需要时查询：点击“查看空闲块”，或使用节点。",
      "it needs NVIDIA's NVML; `pip install nvidia-ml-py` gives it.": "需要 NVIDIA 的 NVML：pip install nvidia-ml-py。",
    },
    told: {
      other_processes: (about, size) => [`其他程序占用了 ${about} 的 ${size}。`, "关闭不需要的程序：播放视频的浏览器、游戏、另一个 ComfyUI。"],
      allocator_cache: (about, size) => [`torch 为自己保留了 ${about} 的 ${size}，供下次使用。`, "如果其他程序需要，请清理缓存。"],
      fragmentation: (about, size) => [`${about} 的 ${size} 分散在小于 64 MB 的碎片中，放不下大张量。`, null],
      free_between_blocks: (about, size) => [`${about} 的 ${size} 空闲，但夹在使用中的块之间。`, "卸载模型：整块空闲的显存会还给驱动。"],
      models_not_needed: (about, size) => [`显卡上的 ${size} 属于上次运行没有用到的模型：${about}。`, "不必处理，它们会自动让位；要立即释放，请卸载当前工作流不需要的模型。"],
      duplicate_diffusion_model: (about) => [`内存中有两份扩散模型 ${about}。`, "合并加载它的加载器，或使用 Qwen VRAM 的加载器，它们共用一份。"],
      duplicate_text_encoder: (about) => [`内存中有两份文本编码器 ${about}。`, "合并加载它的加载器，或使用 Qwen VRAM 的加载器，它们共用一份。"],
      duplicate_vae: (about) => [`内存中有两份 VAE ${about}。`, "合并加载它的加载器，或使用 Qwen VRAM 的加载器，它们共用一份。"],
      unexplained: (about) => [`${about} 有一部分无人认领（见“未能解释”）：库、绕过 torch 的自定义节点，或其他程序。`, "如果它随运行不断增长，请减少自定义节点后重启 ComfyUI 查找。"],
      counted_twice: (about) => [`${about} 有一部分被统计了两次，各部分之和大于总量。`, "请把各部分看作上限；没有任务运行时再看。"],
      ram_full: () => ["内存几乎用完，模型会反复从硬盘读取。", "关闭其他程序，或使用更小的模型文件，例如 fp8。"],
      pinned: (about, size) => [`${size} 内存为向显卡传输而锁页，系统无法换出。`, "如果其他程序缺内存，请用 --disable-pinned-memory 启动 ComfyUI。"],
    },
  },
};

/** The texts in the frontend's language, English where there is no translation. */
export const memoryWords = (locale) => wordsOf(WORDS, locale);

// ------------------------------------------------------------------------------------- the reply
export const MOST_BYTES = 1 << 20; // of a reply; a report with a hundred models has some 50 kB
const MOST_ITEMS = 100;
const MOST_LETTERS = 400;
const TURNING = /[\u0000-\u0008\u200e\u200f\u202a-\u202e\u2066-\u2069]/g; // letters would run backwards
const OUR_COMMAND = /^QwenVRAM\.[\w.]+$/; // a reply must not press other buttons of the editor

/** Why there is no report, for people, from an error of js/requests.js or of parseReport(). */
export function failureText(error, seconds, words) {
  if (error.name === "TimeoutError") return words.slow(seconds);
  if (error.name === "TypeError") return words.unreachable; // as fetch tells it
  if (error.name === "RangeError") return words.tooLarge;
  return error.message === "notJson" ? words.notJson : error.message;
}

/** A report from the text of a reply. Throws Error("notJson") where it is none. */
export function parseReport(text) {
  let report = null;
  try {
    report = JSON.parse(text);
  } catch {
    throw new Error("notJson");
  }
  if (!Array.isArray(report?.devices)) throw new Error("notJson");
  return report;
}

const isObject = (value) => typeof value === "object" && value !== null;
const list = (value) => (Array.isArray(value) ? value : []).filter(isObject).slice(0, MOST_ITEMS);
const count = (value) => (Number.isFinite(value) ? value : null);

function text(value, fallback = "") {
  const given = typeof value === "string" || typeof value === "number" ? String(value) : fallback;
  const shown = given.slice(0, MOST_LETTERS + 1).replace(TURNING, "");
  return shown.length > MOST_LETTERS ? `${shown.slice(0, MOST_LETTERS)} ...` : shown;
}

/** A size, or that there is none. */
export function bytesText(value, words) {
  if (count(value) === null) return words.unknown;
  return value < 0 ? `−${sizeText(-value)}` : sizeText(value);
}

// --------------------------------------------------------------------------------- what is drawn
// The colours of the picture (core/memory_map.py): Okabe and Ito's for the models, told apart by
// people who see red and green alike; a part looks the same on every device.
const MODEL_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800"];
const COLOURS = {
  other_processes: "#7A7A7A", rest: "#7A7A7A", others_at_start: "#7A7A7A", unknown: "#7A7A7A", process: "#A58F7A",
  context: "#9C9CB4", allocator_live: "#3E7C7B", allocator_split: "#C9B458", allocator_cache: "#8FB3B2", pack: "#7C5BB0",
  stream_buffers: "#5D6FB8", cast_buffers: "#5D6FB8", reference_cache: "#A64D79", outputs: "#B07C5B", unexplained: null, free: null, // drawn by their class
};

/** Gives every part its colour, one that is not in the table the next of a model. */
function painter() {
  const models = new Map();
  return (id) => {
    if (Object.hasOwn(COLOURS, id)) return COLOURS[id];
    if (!models.has(id)) models.set(id, MODEL_COLOURS[models.size % MODEL_COLOURS.length]);
    return models.get(id);
  };
}

/** What the panel shows of a report, in plain texts and numbers from 0 to 1. */
export function viewOf(report, locale) {
  const words = memoryWords(locale);
  const colourOf = painter();
  return {
    state: report.running ? words.running : words.idle,
    busy: Boolean(report.running),
    devices: list(report.devices).map((device) => deviceView(device, colourOf, words)),
    models: list(report.models).map((model) => modelView(model, words)),
    findings: list(report.findings).map((finding) => findingView(finding, words)),
  };
}

function deviceView(device, colourOf, words) {
  const parts = list(device.parts);
  const total = count(device.total_bytes);
  const sum = parts.reduce((all, part) => all + Math.max(0, count(part.bytes) ?? 0), 0);
  const scale = Math.max(total ?? 0, sum); // sources that overlap add up to more than there is
  const rows = parts.map((part) => {
    const id = text(part.id);
    return partRow(part, { id, colour: colourOf(id), scale }, words);
  });
  const name = nameOf(device);
  const use = useText(device, total, words);
  const drawn = rows.filter((row) => row.share > 0).map((row) => `${row.label} ${row.size}`);
  return {
    key: text(device.device), name, use, rows, label: `${name}: ${use}. ${drawn.join(", ")}`,
    notes: deviceNotes(device, words),
    unknown: list(device.not_measurable).map(({ what, why }) => `${worded(what, words.what)}: ${worded(why, words.why)}`),
  };
}

/** Two cards may have the same name. */
function nameOf({ name, device, kind }) {
  return kind === "cpu" ? text(name) : [text(device), text(name)].filter(Boolean).join(" - ");
}

/** What the server says of a part, in the user's language as far as there are words for it. */
function detailText(value, { details }) {
  const told = (piece) => {
    const known = Object.keys(details).find((pattern) => new RegExp(`^${pattern}$`).test(piece));
    return known && piece.replace(new RegExp(`^${known}$`), details[known]);
  };
  const whole = text(value);
  const pieces = whole.split(/, |; /);
  const known = told(whole) ?? (pieces.every(told) ? pieces.map(told).join("，") : undefined);
  return known ?? whole;
}

/** A text of the server in the user's language, where there is one. */
function worded(value, translations) {
  const given = text(value);
  return Object.hasOwn(translations, given) ? translations[given] : given;
}

function deviceNotes({ allocator, dynamic_vram_bytes: pages }, words) {
  const notes = count(pages) ? [words.dynamic(bytesText(pages, words))] : [];
  if (!isObject(allocator)) return notes;
  const names = ["allocated_bytes", "reserved_bytes", "largest_free_block_bytes", "inactive_split_bytes"];
  return [...notes, words.allocator(text(allocator.backend), ...names.map((name) => bytesText(allocator[name], words)))];
}

function partRow(part, { id, colour, scale }, words) {
  const bytes = count(part.bytes);
  const share = scale > 0 && bytes > 0 ? bytes / scale : 0;
  const label = words.parts[id] ?? modelText(text(part.label, id), id, words);
  return { id, label, size: bytesText(bytes, words), share, colour, detail: detailText(part.detail, words) };
}

/** A part that is a model begins with its kind: "Text encoder NAME (fp16)". */
function modelText(label, id, { kinds }) {
  const kind = id.startsWith("model:") && Object.keys(kinds).find((each) => label.toLowerCase().startsWith(`${each.toLowerCase()} `));
  return kind ? kinds[kind] + label.slice(kind.length) : label;
}

function useText(device, total, words) {
  const free = count(device.free_bytes);
  if (total === null) return words.unknown;
  if (free === null) return words.useUnknown(bytesText(total, words));
  return words.use(bytesText(total - free, words), bytesText(total, words));
}

/** What a probe found, or why there was none. */
export function probedText(report, locale) {
  const words = memoryWords(locale);
  const probed = list(report.devices).filter((device) => isObject(device.largest_allocation));
  const told = probed.map((device) => {
    const { bytes, note } = device.largest_allocation;
    return words.largest(nameOf(device), bytesText(bytes, words), text(note));
  });
  return told.join(" ") || words.noProbe;
}

/** What a look at the allocator's blocks found, or why there are none. */
export function blocksText(report, locale) {
  const words = memoryWords(locale);
  const told = list(report.devices).filter((device) => isObject(device.allocator)).map((device) => {
    const { fragments } = device;
    if (!isObject(fragments)) {
      const reason = list(device.not_measurable).find(({ what }) => ["largest free block", "free blocks"].includes(what));
      return words.noBlocks(nameOf(device), worded(reason?.why, words.why));
    }
    const sizes = [fragments.largest_bytes, fragments.small_bytes].map((size) => bytesText(size, words));
    return words.found(nameOf(device), ...sizes, count(fragments.small_count) ?? words.unknown);
  });
  return told.join(" ") || words.noDevice;
}

function modelView(model, words) {
  const size = (value) => (count(value) === null ? null : bytesText(value, words));
  const kind = Object.hasOwn(words.kinds, text(model.kind)) ? words.kinds[model.kind] : text(model.kind);
  const name = text(model.name) || text(model.file) || kind;
  const whole = size(model.bytes);
  const resident = size(model.resident_bytes);
  const notes = [text(model.file).startsWith(name) ? "" : text(model.file), kind, text(model.dtype), text(model.device)];
  if (count(model.pinned_bytes)) notes.push(words.pinned(size(model.pinned_bytes)));
  if (count(model.mapped_bytes)) notes.push(words.mapped(size(model.mapped_bytes)));
  if (count(model.shared_with)) notes.push(words.shared(model.shared_with));
  return {
    name,
    notes: notes.filter(Boolean).join(" · "),
    onDevice: whole && resident ? words.of(resident, whole) : (resident ?? words.unknown),
    inRam: model.device === "cpu" ? "" : words.ram(size(model.ram_bytes) ?? words.unknown), // the same there
    duplicate: model.duplicate_of ? words.duplicate(text(model.duplicate_of)) : "",
  };
}

function findingView(finding, words) {
  const severity = Object.hasOwn(words.severities, finding.severity) ? finding.severity : "info";
  const command = typeof finding.command === "string" && OUR_COMMAND.test(finding.command) ? finding.command : null;
  const saves = count(finding.saves_bytes);
  const wording = Object.hasOwn(words.told, finding.id) ? words.told[finding.id] : () => [];
  const [said, action] = wording(text(finding.about), bytesText(saves, words));
  return {
    severity, heading: words.severities[severity], text: said ?? text(finding.text), action: action ?? text(finding.action),
    saves: saves ? words.saves(bytesText(saves, words)) : "", command,
  };
}

/** What a button says that runs a command. */
export function commandLabel(id, label, words) {
  return words.commands[id.toLowerCase()] ?? (text(label) || words.run);
}

// ------------------------------------------------------------------------------------- when to ask
export const SECONDS = 1;
const LONGEST_PAUSE = 30;
export const LIMIT_SECONDS = 5;
const PATIENCE = 4; // asks for at most a fifth of the time, however slow the server is

/** Seconds to wait after an answer that took so long, or after so many failures in a row. */
export function pauseAfter(tookSeconds, failures) {
  const pause = failures ? SECONDS * 2 ** Math.min(failures, 10) : Math.max(SECONDS, PATIENCE * tookSeconds);
  return Math.min(pause, LONGEST_PAUSE);
}

/**
 * Asks again and again, never twice at once.
 *
 * ask() -> promise of an answer, which must end by itself; show(answer); fail(error);
 * wanted() -> "yes", "later" (hidden: nothing is asked) or "never" (gone: it ends). `clock` has
 * setTimeout, clearTimeout and now() in milliseconds. Returns {start, stop, soon}.
 */
export function poller({ ask, show, fail, wanted, clock }) {
  let timer = null;
  let started = false;
  let asking = false;
  let failures = 0;

  function wait(seconds) {
    clock.clearTimeout(timer);
    timer = clock.setTimeout(turn, seconds * 1000);
  }
  async function turn() {
    const wish = wanted();
    if (wish === "never") return stop();
    if (asking) return undefined; // its answer calls the next turn
    return wish === "later" ? wait(SECONDS) : once();
  }
  async function once() {
    const since = clock.now();
    asking = true;
    try {
      const answer = await ask();
      failures = 0;
      if (started) show(answer);
    } catch (error) {
      failures += 1;
      if (started) fail(error);
    } finally {
      asking = false;
      if (started) wait(pauseAfter((clock.now() - since) / 1000, failures));
    }
  }
  function start() {
    started = true;
    wait(0);
  }
  function stop() {
    started = false;
    clock.clearTimeout(timer);
  }
  return { start, stop, soon: () => started && !asking && wait(0) };
}
