// Requests to free memory, and what is said of the answers. Pure: no DOM, no app.
import { jsonOf, refusalIn } from "./refusal_core.js";
import { sizeText, wordsOf } from "./text_core.js";

export const PATH = "/qwen_vram/clear";
export const EVENT = "qwen_vram.cleared";
export const WAIT_SECONDS = 3; // then the server says when it will be done
export const LIMIT_SECONDS = 30; // then nobody waits for the server any more
const NOISE_BYTES = 1e6; // what comes and goes by itself
export const USUAL = "models";
const SETTING = "QwenVRAM.Clear.Level";

/** Texts in other languages: locales/<language>/settings.json. */
export const CLEAR_SETTING = {
  id: SETTING,
  name: "What the button Clear VRAM frees",
  type: "combo",
  options: [
    { text: "caches", value: "cache" },
    { text: "all models", value: "models" },
    { text: "unneeded models", value: "needed" },
    { text: "models and outputs", value: "everything" },
  ],
  defaultValue: USUAL,
  category: ["Qwen VRAM", "Memory", SETTING],
  tooltip:
    "Also for its key binding, Ctrl+Alt+M. Unneeded: those that the open workflow does not use. Models stay in RAM and are loaded again when they are used.",
};

/** What the button and the commands offer, by the level that the server knows. */
const WISHES = {
  cache: { level: "cache" },
  models: { level: "models" },
  needed: { level: "models", keep_needed: true },
  everything: { level: "everything" },
};

const WORDS = {
  en: {
    title: "Clear VRAM",
    button: "Clear VRAM",
    tooltips: {
      cache: "Free caches (Qwen VRAM). The settings say what this button frees.",
      models: "Unload all models from VRAM (Qwen VRAM). The settings say what this button frees.",
      needed:
        "Unload the models that this workflow does not need (Qwen VRAM). The settings say what " +
        "this button frees.",
      everything: "Unload all models and forget node outputs (Qwen VRAM). The settings say what this button frees.",
    },
    freed: (name, bytes, now) => `${name}: ${bytes} freed${now}`,
    more: (name, bytes, now) => `${name}: ${bytes} more in use${now}`,
    same: (name, now) => `${name}: nothing freed${now}`,
    unknown: (name) => `${name}: not measurable`,
    now: (bytes) => `, ComfyUI still uses ${bytes}`,
    unloaded: (names) => `Unloaded: ${names}`,
    inRam:
      'Nothing to unload: the models are in RAM. "Unload all models and forget node outputs" frees them.',
    none: "No model was loaded in VRAM.",
    kept: (names, why) => `Kept, because ${why}: ${names}`,
    why: {},
    left: (parts) => `Still taken: ${parts}`,
    parts: {
      models: "loaded models",
      tensors: "node outputs and other tensors",
      blocks: "free parts of blocks in use",
      context: "driver and libraries",
      keep_loaded: "models with keep_loaded",
      pinned: "pinned memory",
      prompts: "encoded prompts",
      other_processes: "other programs",
      weights: "unloaded models in RAM (not measurable)",
    },
    later: {
      "at once": "Memory is being freed. This takes a while.",
      "between two nodes": "ComfyUI is running. Memory is freed as soon as the running node ends.",
      "at the end of the prompt": "ComfyUI is running. Memory is freed as soon as this run ends.",
    },
    refused: (why) => `ComfyUI did not free memory. ${why}`,
    strange: (status) =>
      `The answer of the server makes no sense (status ${status}). Look into ComfyUI's log; ` +
      "restart ComfyUI if the pack was just updated.",
    unreadable: (why) => `The open workflow cannot be read (${why}). Nothing was freed.`,
    silent: "The server does not answer. Look into ComfyUI's log.",
    unreachable: (why) => `The server cannot be reached (${why}). Is ComfyUI still running?`,
  },
  zh: {
    title: "清理显存",
    button: "清理显存",
    tooltips: {
      cache: "释放缓存（Qwen VRAM）。此按钮释放什么可在设置中选择。",
      models: "从显存卸载所有模型（Qwen VRAM）。此按钮释放什么可在设置中选择。",
      needed: "卸载当前工作流不需要的模型（Qwen VRAM）。此按钮释放什么可在设置中选择。",
      everything: "卸载所有模型并丢弃节点输出（Qwen VRAM）。此按钮释放什么可在设置中选择。",
    },
    freed: (name, bytes, now) => `${name}：释放了 ${bytes}${now}`,
    more: (name, bytes, now) => `${name}：占用增加了 ${bytes}${now}`,
    same: (name, now) => `${name}：没有释放${now}`,
    unknown: (name) => `${name}：无法测量`,
    now: (bytes) => `，ComfyUI 仍占用 ${bytes}`,
    unloaded: (names) => `已卸载：${names}`,
    inRam: "没有可卸载的：模型在内存中。“卸载所有模型并丢弃节点输出”会释放它们。",
    none: "显存中没有已加载的模型。",
    kept: (names, why) => `保留（${why}）：${names}`,
    why: {
      "its kind was not chosen": "没有选择这一类",
      "the workflow needs it": "工作流需要",
      "it is not known which file it was made from, so the workflow may need it":
        "不知道来自哪个文件，工作流可能需要",
      "it computes on the CPU and takes no VRAM, or something still refers to it":
        "在 CPU 上计算，不占显存，或者仍被别处引用",
    },
    left: (parts) => `仍被占用：${parts}`,
    parts: {
      models: "已加载的模型",
      tensors: "节点输出和其他张量",
      blocks: "使用中的块里的空闲部分",
      context: "驱动和库",
      keep_loaded: "开启了 keep_loaded 的模型",
      pinned: "锁页内存",
      prompts: "已编码的提示词",
      other_processes: "其他程序",
      weights: "已卸载但仍在内存中的模型（无法测量）",
    },
    later: {
      "at once": "正在释放内存，需要一点时间。",
      "between two nodes": "ComfyUI 正在运行。当前节点结束后立即释放内存。",
      "at the end of the prompt": "ComfyUI 正在运行。本次运行结束后立即释放内存。",
    },
    refused: (why) => `ComfyUI 没有释放内存。${why}`,
    strange: (status) => `服务器的回答无法理解（状态 ${status}）。请查看 ComfyUI 的日志；如果刚更新过本节点包，请重启 ComfyUI。`,
    unreadable: (why) => `无法读取打开的工作流（${why}）。没有释放任何内存。`,
    silent: "服务器没有回答。请查看 ComfyUI 的日志。",
    unreachable: (why) => `无法连接服务器（${why}）。ComfyUI 还在运行吗？`,
  },
};
const COMMA = { en: ", ", zh: "，" };

export const clearWords = (locale) => wordsOf(WORDS, locale);
const isChinese = (locale) => clearWords(locale) === WORDS.zh;

/** A level that exists, whatever the settings file says. */
export const knownLevel = (level) => (Object.hasOwn(WISHES, level) ? level : USUAL);
export const needsWorkflow = (level) => Boolean(WISHES[knownLevel(level)].keep_needed);

/** The body of the request. `prompt` is the open workflow in API format, for the level needed. */
export function bodyOf(level, clientId, prompt) {
  const body = { ...WISHES[knownLevel(level)], wait_seconds: WAIT_SECONDS };
  if (clientId) body.client_id = clientId;
  if (body.keep_needed) body.prompt = prompt;
  return body;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const objects = (value) => (Array.isArray(value) ? value.filter(isObject) : []);

/** The toast for a reply of the server, by its status and the text of its body. */
export function toastOf(status, text, locale) {
  const words = clearWords(locale);
  const answer = jsonOf(text);
  const refusal = refusalIn(answer, locale);
  if (refusal !== null) return { severity: "error", detail: words.refused(refusal) };
  if (status < 200 || status > 299 || !isObject(answer) || typeof answer.done !== "boolean")
    return { severity: "error", detail: words.strange(status) };
  if (!answer.done) {
    const detail = words.later[answer.when] ?? words.later["at once"];
    return { severity: "info", detail };
  }
  return { severity: "success", detail: detailOf(answer, locale) };
}

/** What was freed, unloaded, kept and not freed: one line each. */
export function detailOf(answer, locale) {
  const words = clearWords(locale);
  const comma = isChinese(locale) ? COMMA.zh : COMMA.en;
  const names = (models) => models.map(({ name }) => String(name)).join(comma);
  const lines = objects(answer.devices).map((device) => deviceLine(device, words));
  const [unloaded, kept, left] = [answer.unloaded, answer.kept, answer.left].map(objects);
  const inRam = answer.level === "models" && !kept.length && staysInRam(answer);
  if (unloaded.length && inRam) lines.push(words.inRam);
  else if (unloaded.length) lines.push(words.unloaded(names(unloaded)));
  else if (answer.level !== "cache" && !kept.length) lines.push(words.none);
  for (const why of new Set(kept.map((model) => String(model.why))))
    lines.push(words.kept(names(kept.filter((model) => String(model.why) === why)), words.why[why] ?? why));
  const told = left.map((part) => partText(part, words));
  if (told.length) lines.push(words.left(told.join(comma)));
  return lines.join("\n");
}

/** Whether there is no card that a model could leave, and nothing was freed. */
function staysInRam(answer) {
  const devices = objects(answer.devices);
  return devices.length > 0 && devices.every(({ kind, freed_bytes: freed }) => kind === "cpu" && !(freed >= NOISE_BYTES));
}

function deviceLine({ device, kind, freed_bytes: freed, after }, words) {
  const name = kind === "cpu" ? "RAM" : String(device);
  if (!Number.isFinite(freed)) return words.unknown(name);
  const own = [after?.own_bytes, after?.reserved_bytes].find(Number.isFinite);
  const now = own === undefined ? "" : words.now(sizeText(own));
  if (Math.abs(freed) < NOISE_BYTES) return words.same(name, now);
  return (freed < 0 ? words.more : words.freed)(name, sizeText(Math.abs(freed)), now);
}

function partText({ id, bytes, text }, words) {
  const name = words.parts[id] ?? String(text ?? id);
  return Number.isFinite(bytes) ? `${name} ${sizeText(bytes)}` : name;
}

/** The toast for an open workflow that cannot be sent. */
export function unreadable(error, locale) {
  const why = String(error?.message ?? error).slice(0, 200);
  return { severity: "error", detail: clearWords(locale).unreadable(why) };
}

/** The toast for a request that got no answer at all. */
export function failureOf(error, locale) {
  const words = clearWords(locale);
  const silent = error?.name === "AbortError" || error?.name === "TimeoutError";
  const why = String(error?.message ?? error).slice(0, 200);
  return { severity: "error", detail: silent ? words.silent : words.unreachable(why) };
}
