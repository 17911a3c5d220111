// What pinning needs to know and to say. Pure: no DOM, no app.
import { findNode, nodesIn } from "./status_core.js";
import { sizeText, wordsOf } from "./text_core.js";

const MARKS = "qwen_vram"; // in a node's properties, which are saved with the workflow
const LOST = "qwen_vram_lost"; // not an event of ComfyUI's: nothing more will come
const MOST_OUTPUTS = 8; // of the server's node QwenVRAMPin
const FNV_OFFSET = 0x811c9dc5;
const FNV_PRIME = 0x01000193;

// Chips of their own colour: readable on light and on dark themes.
export const PIN_COLOURS = {
  pinned: { bgColor: "#4c1d95", fgColor: "#ede9fe" },
  missing: { bgColor: "#7f1d1d", fgColor: "#fee2e2" },
  keepsNothing: { bgColor: "#3f3f46", fgColor: "#f4f4f5" },
};

const ENCODE_NODES = new Set([
  "CLIPTextEncode", "TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus", "VAEEncode",
]);

const WORDS = {
  en: {
    pin: "Pin output", unpin: "Unpin output", keepNothing: "Keep nothing of this node",
    keepAgain: "Keep what this node gives again",
    badge: (size) => `pinned ${size}`, keepsNothing: "keeps nothing",
    badgeMissing: "pin is missing", badgeChanged: "values changed since",
    line: "pinned: the values shown here are not used",
    unpinned: "unpinned: it runs again when it is needed",
    missing: (title) => `The pinned value of "${title}" is not on this machine: it was deleted, or ` +
      "the workflow comes from another one. Right-click the node, choose Unpin output (Qwen VRAM), " +
      "and run again.",
    rejected: (title, why) => `The pin of "${title}" is refused. ${why}`,
    privateRun: "This run is not in the prompt cache. ComfyUI still writes the prompt into the " +
      "pictures that it saves, and into its history.",
    pinned: (title, size) => `${title} is pinned (${size}). Its value is kept with its exact ` +
      "content; nothing before it runs until you unpin it.",
    refused: (title, why) => `${title} is not pinned. ${why}`,
    noSelection: "Select the nodes first.",
    subgraph: "It is a sub-graph. Open it, and pin a node inside.",
    notInRun: "It is not part of the run: it is muted or bypassed, or the editor alone knows it.",
    severalTimes: "Its sub-graph is used more than once, where it has another value in each place.",
    output: "It is an output node, which saves or shows something at each run. Pin a node before it.",
    tooMany: `It has more than ${MOST_OUTPUTS} outputs.`,
    gone: "The node is no longer in the open workflow. Pin it again.",
    blocked: "The run gave no value for it.", stopped: "The run was stopped.",
    busy: "ComfyUI is still queueing another run. Try again.",
    lost: "Its run is no longer in ComfyUI's queue: it was deleted, or ComfyUI was started again. " +
      "Pin it again.",
  },
  zh: {
    pin: "固定输出", unpin: "取消固定输出", keepNothing: "不保存此节点的任何结果",
    keepAgain: "恢复保存此节点的结果",
    badge: (size) => `已固定 ${size}`, keepsNothing: "不保存",
    badgeMissing: "固定的值不存在", badgeChanged: "参数已改动",
    line: "已固定：此处显示的参数不起作用",
    unpinned: "已取消固定：需要时会重新运行",
    missing: (title) => `“${title}”的固定值不在这台机器上：已被删除，或工作流来自另一台机器。` +
      "请右键点击该节点，选择“取消固定输出 (Qwen VRAM)”，然后重新运行。",
    rejected: (title, why) => `“${title}”的固定值被拒绝：${why}`,
    privateRun: "本次运行不进入提示词缓存。ComfyUI 仍会把提示词写进保存的图片和历史记录。",
    pinned: (title, size) => `${title} 已固定（${size}）。它的值会原样保存；取消固定之前，它前面的节点都不会运行。`,
    refused: (title, why) => `${title} 未固定。${why}`,
    noSelection: "请先选择节点。",
    subgraph: "这是子图。请打开它，固定其中的节点。",
    notInRun: "它不参与运行：被静音或绕过，或只存在于编辑器中。",
    severalTimes: "它所在的子图被使用了多次，每处的值各不相同。",
    output: "这是输出节点，每次运行都要保存或显示。请固定它前面的节点。",
    tooMany: `它的输出多于 ${MOST_OUTPUTS} 个。`,
    gone: "该节点已不在打开的工作流中，请重新固定。",
    blocked: "本次运行没有给出它的值。", stopped: "运行已被中止。",
    busy: "ComfyUI 正在提交另一次运行，请稍后再试。",
    lost: "它的运行已不在 ComfyUI 的队列中：被删除，或 ComfyUI 已重新启动。请重新固定。",
  },
};

/** The texts in the frontend's language, English where there is no translation. */
export const pinWords = (locale) => wordsOf(WORDS, locale);

/** A mark of a node: "pin" or "keep_nothing". */
export function markOf(node, name) {
  return node.properties?.[MARKS]?.[name];
}

/** Set a mark, or remove it with undefined; nothing is left behind in the saved workflow. */
export function setMark(node, name, value) {
  const { [name]: _, ...rest } = node.properties?.[MARKS] ?? {};
  const marks = value === undefined ? rest : { ...rest, [name]: value };
  node.properties ??= {};
  if (Object.keys(marks).length) node.properties[MARKS] = marks;
  else delete node.properties[MARKS];
}

/**
 * What the badge of a node says, and in which colours; an empty text for nothing. `kept` are the
 * contents of the pins that there are, null where that is not known.
 */
export function pinBadge(node, words, kept) {
  const pin = markOf(node, "pin");
  const nothing = markOf(node, "keep_nothing") ? words.keepsNothing : "";
  const missing = Boolean(pin && kept && !kept.has(pin.content));
  const pinned = pin ? words.badge(pin.bytes ? sizeText(pin.bytes) : "").trim() : "";
  const changed = pin?.values !== undefined && pin.values !== valuesOf(node);
  const told = [missing ? words.badgeMissing : pinned, changed && words.badgeChanged, nothing];
  const kind = missing ? "missing" : pin ? "pinned" : "keepsNothing";
  return { text: told.filter(Boolean).join(" · "), ...PIN_COLOURS[kind] };
}

/**
 * A short digest (FNV-1a, 32 bits) of the values that a node shows. Left out is what the editor
 * changes by itself at every run, as a seed.
 */
export function valuesOf(node) {
  const drawn = (widget) => widget.linkedWidgets?.some(({ name }) => name === "control_after_generate");
  const counted = (node.widgets ?? []).filter((widget) =>
    widget.serialize !== false && !drawn(widget) && widget.name !== "control_after_generate");
  let digest = FNV_OFFSET;
  for (const letter of JSON.stringify(counted.map(({ name, value }) => [name, value]))) {
    digest = Math.imul(digest ^ letter.codePointAt(0), FNV_PRIME) >>> 0;
  }
  return digest.toString(16);
}

/** The titles of the nodes of a workflow that use a pin, by its content. */
export function pinUsers(rootGraph) {
  const users = new Map();
  for (const node of new Set(nodesIn(rootGraph).map(([, node]) => node))) {
    const content = markOf(node, "pin")?.content;
    if (content) users.set(content, [...(users.get(content) ?? []), node.title]);
  }
  return users;
}

/** Whether a node can be offered for pinning at all. */
export function hasOutputs(node) {
  return Boolean(node.outputs?.length) && !node.isVirtualNode;
}

/** Whether the pack keeps something of this kind of node; `more` is the user's own list. */
export function isKept(node, more) {
  const kind = node.comfyClass ?? node.type ?? "";
  const added = String(more ?? "").split(/[\s,]+/);
  return ENCODE_NODES.has(kind) || kind.startsWith("QwenVRAMCached") || added.includes(kind) ||
    Boolean(node.subgraph) || Boolean(markOf(node, "keep_nothing"));
}

/** Where the node is in the API prompt; in sub-graphs that are used twice it is there twice. */
export function executionIds(rootGraph, node, output) {
  return Object.keys(output).filter((id) => findNode(rootGraph, id) === node);
}

/** Why a node cannot be pinned, as a name among the texts; null if it can be tried. */
export function problemOf(node, ids) {
  if (node.subgraph) return "subgraph";
  if (node.constructor?.nodeData?.output_node) return "output";
  if (node.outputs.length > MOST_OUTPUTS) return "tooMany";
  if (ids.length === 0) return "notInRun";
  return ids.length > 1 ? "severalTimes" : null;
}

/**
 * An id for a node that is in a request and in no graph: no number, which a node that is not
 * queued (a note), or one that is added meanwhile, could have. It would be shown as the culprit.
 */
export function helperId(output, name) {
  let id = `qwen_vram_${name}`;
  while (id in output) id += "_";
  return id;
}

/** The API prompt with one node more, which pins all outputs of another. */
export function pinPrompt(output, nodeId, outputs) {
  const id = helperId(output, "pin");
  const inputs = {};
  for (let slot = 0; slot < outputs; slot += 1) inputs[`value_${slot}`] = [nodeId, slot];
  const node = { class_type: "QwenVRAMPin", inputs, _meta: { title: "Pin output" } };
  return { id, output: { ...output, [id]: node } };
}

/** The events of a run as ComfyUI's queue and history tell them; none while it waits or runs. */
export function eventsOf(promptId, queue, history) {
  const waiting = [...(queue.queue_running ?? []), ...(queue.queue_pending ?? [])];
  if (waiting.some(([, id]) => id === promptId)) return [];
  const entry = history[promptId];
  if (!entry) return [[LOST, { prompt_id: promptId }]];
  const outputs = Object.values(entry.outputs ?? {});
  const executed = outputs.map((output) => ["executed", { prompt_id: promptId, output }]);
  return [...executed, ...(entry.status?.messages ?? [])];
}

/** A graph's `extra` without the mark of a private run. */
export function withoutRunMark(extra) {
  const { [MARKS]: ours, ...others } = extra;
  if (ours?.keep_nothing === undefined) return extra;
  const { keep_nothing: _, ...rest } = ours;
  return Object.keys(rest).length ? { ...others, [MARKS]: rest } : others;
}

/** What the events of a run say so far: a pin, an error (a text, or a name among the texts), null. */
export function outcomeOf(events, promptId) {
  let pin = null;
  for (const [name, detail] of events) {
    if (detail?.prompt_id !== promptId) continue;
    pin = detail.output?.qwen_vram_pin?.[0] ?? pin;
    if (name === "execution_error") return { error: String(detail.exception_message).trim() };
    if (name === "execution_interrupted") return { problem: "stopped" };
    if (name === LOST) return { problem: "lost" };
    if (name === "execution_success") return pin ? { pin } : { problem: "blocked" };
  }
  return null;
}

/** Why the server refused a request, from its answer. */
export function rejection(response, fallback) {
  const errors = Object.values(response?.node_errors ?? {}).flatMap((entry) => entry.errors ?? []);
  const texts = errors.map(({ type, message, details }) =>
    type === "custom_validation_failed" ? String(details).replace(/^\w+ - /, "") : `${message}: ${details}`);
  const told = [...new Set(texts)].join("\n");
  return told || response?.error?.message || fallback;
}
