// What pinning needs to know and to say. Pure: no DOM, no app.
import { findNode } from "./status_core.js";

const MARKS = "qwen_vram"; // in a node's properties, which are saved with the workflow
const LOST = "qwen_vram_lost"; // not an event of ComfyUI's: nothing more will come
const MOST_OUTPUTS = 8; // of the server's node QwenVRAMPin
const ENCODE_NODES = new Set([
  "CLIPTextEncode", "TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus", "VAEEncode",
]);

const WORDS = {
  en: {
    pin: "Pin output", unpin: "Unpin output", keepNothing: "Keep nothing of this node",
    keepAgain: "Keep what this node gives again",
    badge: (size) => `pinned ${size}`, keepsNothing: "keeps nothing",
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
export function pinWords(locale) {
  return WORDS[locale] ?? WORDS[String(locale).split("-")[0]] ?? WORDS.en;
}

/** A size for people, decimal as the server's. */
export function sizeText(bytes) {
  if (bytes < 1e5) return `${(bytes / 1e3).toFixed(1)} kB`;
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

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

/** Whether a badge says something, and what. */
export function badgeText(node, words) {
  const pin = markOf(node, "pin");
  const nothing = markOf(node, "keep_nothing") ? words.keepsNothing : "";
  const pinned = pin ? words.badge(pin.bytes ? sizeText(pin.bytes) : "").trim() : "";
  return [pinned, nothing].filter(Boolean).join(" · ");
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

/** The API prompt with one node more, which pins all outputs of another. */
export function pinPrompt(output, nodeId, outputs) {
  const numbers = Object.keys(output).map((id) => Number.parseInt(id, 10)).filter(Number.isFinite);
  const id = String(Math.max(0, ...numbers) + 1);
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
