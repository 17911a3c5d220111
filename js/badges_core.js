// What a badge says about one run of an encode node, and whose run it is. Pure: no DOM, no app.
import { markOf } from "./pins_core.js";
import { findNode } from "./status_core.js";
import { secondsText, wordsOf } from "./text_core.js";

const WORDS = {
  en: {
    hit: "hit", miss: "miss", partial: "partly", saved: "saved", comfy: "ComfyUI's cache",
    tiers: { memory: "memory", disk: "disk", redis: "redis" },
    hits: "hits", misses: "misses",
    comfyTitle: "Not asked: ComfyUI itself still had the result in memory.",
    hitTitle: "Found in the prompt cache. Saved: the time of encoding when it was stored, " +
      "less the time of this search. Loading the encoder is saved too, and not counted.",
    took: "took", off: "off", notKept: "not kept",
  },
  zh: {
    hit: "命中", miss: "未命中", partial: "部分命中", saved: "节省", comfy: "ComfyUI 缓存",
    tiers: { memory: "内存", disk: "磁盘", redis: "redis" },
    hits: "命中", misses: "未命中",
    comfyTitle: "未查询提示词缓存：ComfyUI 的内存里仍有结果。",
    hitTitle: "在提示词缓存中找到。节省 = 保存时编码所用的时间减去本次查找的时间；" +
      "加载编码器的时间同样省下，但没有计入。",
    took: "用时", off: "已关闭", notKept: "未保存",
  },
};

// Chips of their own colour: readable on light and on dark themes.
export const COLOURS = {
  hit: { bgColor: "#14532d", fgColor: "#dcfce7" },
  partial: { bgColor: "#1e4d5c", fgColor: "#dff6fc" },
  comfy: { bgColor: "#1e3a5f", fgColor: "#dbeafe" },
  miss: { bgColor: "#6b3a0a", fgColor: "#ffedd5" },
  off: { bgColor: "#3f3f46", fgColor: "#f4f4f5" },
};

const LONGEST_WHY = 36; // characters; the whole reason is in the title

const CHINESE_WHY = {
  "new text": "新的文本", evicted: "已被淘汰", "cache is off": "缓存已关闭",
  "its stored file was damaged": "已存的文件损坏",
  "nothing is kept, by the settings": "按设置不保存", "first time": "首次",
  "this node keeps nothing": "此节点不保存", "this run keeps nothing": "本次运行不保存",
};
const CHINESE_PARTS = {
  "nodes before clip": "clip 之前的节点", "nodes before vae": "vae 之前的节点",
  "LoRA file": "LoRA 文件", "text encoder file": "文本编码器文件", "VAE file": "VAE 文件",
  "embedding file": "embedding 文件", "checkpoint file": "检查点文件",
  "diffusion model file": "扩散模型文件", file: "文件", "code version": "代码版本",
  "ComfyUI's version": "ComfyUI 版本", "start options": "启动选项",
  "environment variables": "环境变量", libraries: "依赖库", hardware: "硬件", precision: "精度",
  "number of images": "图片数量", "reference size": "参考尺寸",
};
const CHINESE_ENDS = { changed: "已改变", "is gone": "已移除" };
const NOT_CACHEABLE = "cannot be cached: "; // what follows is a sentence, with commas perhaps
const OF_THE_NODE = "this node keeps nothing"; // its badge says so already: js/pins.js
// Chosen by the user for longer than one run.
const OFF = new Set(["nothing is kept, by the settings", "cache is off"]);

/** The reason of a miss, short and in the frontend's language where it is known. */
export function whyText(why, locale) {
  const [reasons, ...sentence] = String(why).split(NOT_CACHEABLE);
  const isChinese = wordsOf(WORDS, locale) === WORDS.zh;
  const whole = CHINESE_WHY[reasons] ? [reasons] : reasons.split(", ").filter(Boolean);
  const told = isChinese ? whole.map(chineseWhy) : whole;
  const prefix = isChinese ? "无法缓存：" : NOT_CACHEABLE;
  if (sentence.length) told.push(prefix + sentence.join(NOT_CACHEABLE));
  return told.join(isChinese ? "，" : ", ");
}

function chineseWhy(reason) {
  const [, part, end] = reason.match(/^(.*) (changed|is gone)$/) ?? [];
  if (part) return `${chinesePart(part)} ${CHINESE_ENDS[end]}`;
  const number = reason.match(/^new image ?(\d*)$/)?.[1];
  return number === undefined ? (CHINESE_WHY[reason] ?? reason) : `新的图片 ${number}`.trim();
}

function chinesePart(part) {
  const input = part.match(/^linked (.*)$/)?.[1];
  const lora = part.match(/^LoRA before (.*)$/)?.[1];
  const image = part.match(/^image ?(\d*)$/)?.[1];
  if (input) return `连接的 ${input}`;
  if (lora) return `${lora} 之前的 LoRA`;
  return image === undefined ? (CHINESE_PARTS[part] ?? part) : `图片 ${image}`.trim();
}

function shortened(text) {
  return text.length <= LONGEST_WHY ? text : `${text.slice(0, LONGEST_WHY - 1).trimEnd()}…`;
}

/** Nothing where it would be rounded to nothing. */
const savedText = (seconds, words) => seconds >= 0.05 && `${words.saved} ${secondsText(seconds)}`;

/** What the user did not want to be kept is no miss. */
function chosenBadge({ why, seconds }, words, locale) {
  if (why === OF_THE_NODE) return null;
  const took = seconds > 0 && `${words.took} ${secondsText(seconds)}`;
  const title = [whyText(why, locale), took].filter(Boolean).join(" · ");
  return { kind: "off", text: OFF.has(why) ? words.off : words.notKept, title };
}

/** {kind, text, title} for what one event says of one node; null for what no badge shows. */
export function badgeOf(facts, locale) {
  const words = wordsOf(WORDS, locale);
  if (facts.result === "comfy") return { kind: "comfy", text: words.comfy, title: words.comfyTitle };
  const saved = savedText(facts.seconds_saved, words);
  if (facts.result === "hit") {
    const tier = String(facts.tier).split(", ").map((name) => words.tiers[name] ?? name).join(", ");
    const text = [words.hit, tier, saved].filter(Boolean).join(" · ");
    return { kind: "hit", text, title: words.hitTitle };
  }
  if (facts.result === "not kept") return chosenBadge(facts, words, locale);
  if (facts.result !== "miss" && facts.result !== "partial") return null;
  const why = whyText(facts.why ?? "", locale);
  const took = facts.seconds > 0 && `${words.took} ${secondsText(facts.seconds)}`;
  const text = [words[facts.result], shortened(why), facts.result === "partial" && saved];
  return {
    kind: facts.result,
    text: text.filter(Boolean).join(" · "),
    title: [why, took, facts.kept].filter(Boolean).join(" · "),
  };
}

/** One badge for a sub-graph: of its only encode node, or how many hit and missed. */
export function summaryOf(many, locale) {
  if (many.length === 1) return badgeOf(many[0], locale);
  const words = wordsOf(WORDS, locale);
  const count = (result) => many.filter((facts) => facts.result === result).length;
  const [hits, misses, own] = [count("hit"), count("miss") + count("partial"), count("comfy")];
  const seconds = many.reduce((sum, facts) => sum + (facts.seconds_saved ?? 0), 0);
  const parts = [
    hits && `${hits} ${hits === 1 ? words.hit : words.hits}`,
    misses && `${misses} ${misses === 1 ? words.miss : words.misses}`,
    own && `${own} × ${words.comfy}`,
    savedText(seconds, words),
  ];
  const others = own ? "comfy" : "off";
  if (!hits && !misses && !own) parts.push(badgeOf(many[0], locale)?.text);
  const kind = misses ? "miss" : hits ? "hit" : others;
  const titles = many.map((facts) => badgeOf(facts, locale)?.text).filter(Boolean);
  return { kind, text: parts.filter(Boolean).join(" · "), title: titles.join("\n") };
}

/** What the runs said, by workflow and by execution id: of every node its last run. */
export class Runs {
  constructor() {
    this.byWorkflow = new Map();
    this.count = 0;
    this.start();
  }

  /** A prompt starts; which workflow it belongs to becomes known a little later. */
  start() {
    this.running = { number: ++this.count, facts: new Map(), workflow: null };
    return this.running;
  }

  /** A run of these nodes belongs to this workflow: what was told of them before is over. */
  belongsTo(workflowId, run, executionIds) {
    if (!this.byWorkflow.has(workflowId)) this.byWorkflow.set(workflowId, new Map());
    run.workflow = workflowId;
    for (const id of executionIds.map(String)) this.#note(run, id, null);
    for (const [id, facts] of run.facts) this.#note(run, id, facts);
  }

  /** An event of the running prompt. */
  tell(facts) {
    const id = String(facts.node);
    this.running.facts.set(id, facts);
    if (this.running.workflow !== null) this.#note(this.running, id, facts);
  }

  /** Nodes that ComfyUI does not run: those without a hit were in its own cache. */
  notRun(executionIds) {
    for (const id of executionIds.map(String)) {
      if (!this.running.facts.has(id)) this.tell({ node: id, result: "comfy" });
    }
  }

  /** Execution id -> facts. */
  of(workflowId) {
    const notes = [...(this.byWorkflow.get(workflowId) ?? [])];
    return new Map(notes.filter(([, { facts }]) => facts).map(([id, { facts }]) => [id, facts]));
  }

  #note({ number, workflow }, id, facts) {
    const notes = this.byWorkflow.get(workflow);
    if (!(notes.get(id)?.number > number)) notes.set(id, { number, facts });
  }
}

/** The badge of every encode node of an open workflow, and of the sub-graphs that hold one. */
export function badgesIn(rootGraph, factsById, isEncode, locale) {
  const inside = new Map();
  const badges = new Map();
  for (const [id, facts] of factsById) {
    const node = findNode(rootGraph, id);
    if (!node || markOf(node, "pin")) continue; // what runs in its place is no encode node
    const skipped = facts.result === "comfy" && !isEncode(node.comfyClass ?? "");
    const badge = !skipped && badgeOf(facts, locale);
    if (!badge) continue;
    badges.set(node, badge);
    const path = id.split(":");
    for (let depth = 1; depth < path.length; depth++) {
      const outer = findNode(rootGraph, path.slice(0, depth).join(":"));
      if (outer) inside.set(outer, [...(inside.get(outer) ?? []), facts]);
    }
  }
  for (const [outer, many] of inside) badges.set(outer, summaryOf(many, locale));
  return badges;
}
