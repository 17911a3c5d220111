// What the warm-up sends, shows and says. Pure: no DOM, no app.
import { refusalIn } from "./refusal_core.js";
import { sizeText, wordsOf } from "./text_core.js";

const STATES = new Set(["waiting", "running", "done", "failed", "cancelled"]);
const ACTIVE = new Set(["waiting", "running"]);
const LEAST_SECONDS = 0.1; // what is less is not worth a sentence
export const OPENED = "workflow opened";

/** As nodes/settings.py reads it. */
export const SETTING = {
  id: "QwenVRAM.WarmUp.Automatic",
  name: "Warm up by itself",
  type: "combo",
  options: [
    { text: "never", value: "off" },
    { text: "on opening", value: OPENED },
    { text: "at start", value: "ComfyUI starts" },
  ],
  defaultValue: "off",
  category: ["Qwen VRAM", "Warm up", "QwenVRAM.WarmUp.Automatic"],
  tooltip:
    "Opened: once per workflow and page, and not while something runs. Start: the workflow that " +
    "you warm up by hand after this choice is kept in a file, with its prompts, and warmed up at " +
    "each start of ComfyUI.",
};

const WORDS = {
  en: {
    title: "Warm up",
    idle: "Warm up (silent): load models and encode prompts of this workflow, save and show nothing (Alt+W)",
    press: "Press again to cancel. Run cancels it, too.",
    waiting: (ahead) => `Waits for ${ahead} run${ahead === 1 ? "" : "s"} in the queue.`,
    running: (node) => `Warming up: ${node}.`,
    starting: "Warming up.",
    cancelling: "The warm-up stops at the next step.",
    sending: "The workflow is being sent.",
    unsending: "The warm-up stops as soon as ComfyUI has accepted it.",
    notStarted: "ComfyUI does not answer. The workflow is not warmed up.",
    notCancelled: (why) => `It could not be cancelled. ${why}`,
    leftOut: (names) =>
      `Not warmed up: ${names}. Such a node may save files or is paid, or needs one that does not run.`,
    cancelled: "Cancelled. What was loaded and encoded until then is kept.",
    failed: (why) => `It failed. ${why}`,
    refused: (why) => `It cannot run. ${why}`,
    unreachable: "ComfyUI does not answer. Whether the warm-up goes on is not known.",
    broken: "ComfyUI sent an answer that cannot be read. Reload the page; if it stays so, update Qwen VRAM.",
    gone: "ComfyUI no longer knows this warm-up: it was restarted, or another one took its place.",
    done: (seconds) => `Ready after ${seconds} s.`,
    models: (list) => `Loaded: ${list}.`,
    noModels: "No model stays loaded.",
    prompts: (encoded, known) => `Prompts and pictures: ${encoded} encoded now, ${known} known already.`,
    notStored: (count) => `${count} of them not kept for later.`,
    saved: (seconds) => `The next run takes over results that took ${seconds} s.`,
    classic: "ComfyUI runs with --cache-classic: results of your last run are dropped, its nodes run again.",
    none: "ComfyUI runs with --cache-none: results of nodes are not taken over, only loaded models stay.",
    kinds: { "diffusion model": "diffusion model", "text encoder": "text encoder", VAE: "VAE", other: "model" },
    list: ", ",
    space: " ",
  },
  zh: {
    title: "预热",
    idle: "静默预热：加载此工作流的模型并编码提示词，不保存也不显示任何结果（Alt+W）",
    press: "再按一次取消；点击运行也会取消。",
    waiting: (ahead) => `等待队列中的 ${ahead} 个任务。`,
    running: (node) => `正在预热：${node}。`,
    starting: "正在预热。",
    cancelling: "预热会在下一步停止。",
    sending: "正在发送工作流。",
    unsending: "ComfyUI 接受后，预热会立即停止。",
    notStarted: "ComfyUI 没有应答，工作流没有预热。",
    notCancelled: (why) => `无法取消。${why}`,
    leftOut: (names) => `未预热：${names}。这类节点可能会保存文件或需要付费，或者依赖不会运行的节点。`,
    cancelled: "已取消。此前加载和编码的内容会保留。",
    failed: (why) => `预热失败。${why}`,
    refused: (why) => `无法预热。${why}`,
    unreachable: "ComfyUI 没有应答，无法知道预热是否仍在进行。",
    broken: "无法读懂 ComfyUI 的应答。请刷新页面；如果仍然如此，请更新 Qwen VRAM。",
    gone: "ComfyUI 已不知道这次预热：它重新启动过，或者已有另一次预热。",
    done: (seconds) => `预热完成，用时 ${seconds} 秒。`,
    models: (list) => `已加载：${list}。`,
    noModels: "没有模型留在内存中。",
    prompts: (encoded, known) => `提示词和图片：本次编码 ${encoded} 个，已知 ${known} 个。`,
    notStored: (count) => `其中 ${count} 个不会保留。`,
    saved: (seconds) => `下次运行直接使用耗时 ${seconds} 秒的结果。`,
    classic: "ComfyUI 以 --cache-classic 运行：上次运行的结果已被丢弃，其节点会重新运行。",
    none: "ComfyUI 以 --cache-none 运行：节点的结果不会被沿用，只有已加载的模型会保留。",
    kinds: { "diffusion model": "扩散模型", "text encoder": "文本编码器", VAE: "VAE", other: "模型" },
    list: "、",
    space: "",
  },
};

export const warmUpWords = (locale) => wordsOf(WORDS, locale);

/** What is sent: the graph as Run would send it, and the workflow that nodes may read. */
export function warmUpRequest({ output, workflow }) {
  return { prompt: output, extra_data: { extra_pnginfo: { workflow } } };
}

/** Whether the warm-up of a report waits or runs. */
export const isActive = (report) => ACTIVE.has(report?.state);

/** In place of a report while the request is on its way; a second press wants it cancelled. */
export const SENDING = { state: "sending", problems: [] };
export const isSending = (report) => report?.state === SENDING.state;

/** A report of the server as it is; null if it is none, whatever it is. */
export function reportOf(body) {
  const whole = body && typeof body === "object" && typeof body.id === "string" && STATES.has(body.state);
  if (!whole || !Array.isArray(body.problems)) return null;
  if (body.state === "done" && !isResult(body.result)) return null;
  return body;
}

function isResult(result) {
  const numbers = ["encoded", "stored", "known", "seconds", "kept_seconds"];
  return (
    Boolean(result) && numbers.every((name) => Number.isFinite(result[name])) && Array.isArray(result.models)
  );
}

/** How the button looks: {icon, label, tooltip}; `report` null while nothing is warmed up. */
export function buttonOf(report, locale) {
  const words = warmUpWords(locale);
  const busy = isSending(report) || isActive(report);
  if (!busy) return { icon: "pi pi-bolt", label: words.title, tooltip: words.idle };
  const label = report.state === "running" ? `${Math.round(Number(report.percent) || 0)} %` : "…";
  return { icon: "pi pi-spin pi-spinner", label, tooltip: `${nowText(report, words)} ${words.press}` };
}

function nowText(report, words) {
  if (isSending(report)) return report.cancelling ? words.unsending : words.sending;
  if (report.cancelling) return words.cancelling;
  if (report.state === "waiting") return report.ahead ? words.waiting(report.ahead) : words.starting;
  return report.node ? words.running(report.node) : words.starting;
}

/** What to say when the server has taken it: nothing, unless it has to wait. */
export function acceptedText(report, locale) {
  const words = warmUpWords(locale);
  return report.state === "waiting" && report.ahead ? words.waiting(report.ahead) : "";
}

/** The one message in the end: {severity, detail}. */
export function endOf(report, locale) {
  const words = warmUpWords(locale);
  const problems = report.problems.map(String);
  if (report.state === "cancelled") return { severity: "info", detail: words.cancelled };
  if (report.state === "failed")
    return { severity: "error", detail: words.failed(refusalIn(report, locale) ?? "") };
  const detail = resultText(report.result, words);
  const leftOut = Array.isArray(report.left_out) ? report.left_out.map(String) : [];
  if (leftOut.length) problems.unshift(words.leftOut(leftOut.join(words.list)));
  if (!problems.length) return { severity: "success", detail };
  return { severity: "warn", detail: [detail, ...problems].join(" ") };
}

function resultText(result, words) {
  const models = result.models.map((model) => modelText(model, words));
  const missing = result.encoded - result.stored;
  const texts = [
    words.done(seconds(result.seconds)),
    models.length ? words.models(models.join(words.list)) : words.noModels,
    result.encoded || result.known ? words.prompts(result.encoded, result.known) : "",
    missing > 0 ? words.notStored(missing) : "",
    result.cache === "none" ? words.none : savedText(result.kept_seconds, words),
    result.cache === "classic" ? words.classic : "",
  ];
  return texts.filter(Boolean).join(words.space);
}

const savedText = (value, words) => (value < LEAST_SECONDS ? "" : words.saved(seconds(value)));
const seconds = (value) => value.toFixed(1);

function modelText(model, words) {
  const kind = words.kinds[model?.kind] ?? words.kinds.other;
  const named = model?.kind === "text encoder" || model?.kind === "VAE" ? "" : ` ${model?.name}`;
  return `${kind}${named} ${sizeText(Number(model?.bytes))} (${model?.device})`;
}
