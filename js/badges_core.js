// What a badge says about one run of an encode node, and whose run it is. Pure: no DOM, no app.
import { findNode } from "./status_core.js";

const WORDS = {
  en: {
    hit: "hit", miss: "miss", partial: "partly", saved: "saved", comfy: "ComfyUI's cache",
    tiers: { memory: "memory", disk: "disk", redis: "redis" },
    hits: "hits", misses: "misses",
    comfyTitle: "Not asked: ComfyUI itself still had the result in memory.",
    hitTitle: "Found in the prompt cache. Saved: the time of encoding when it was stored, " +
      "less the time of this search. Loading the encoder is saved too, and not counted.",
    took: "took",
  },
  zh: {
    hit: "命中", miss: "未命中", partial: "部分命中", saved: "节省", comfy: "ComfyUI 缓存",
    tiers: { memory: "内存", disk: "磁盘", redis: "redis" },
    hits: "命中", misses: "未命中",
    comfyTitle: "未查询提示词缓存：ComfyUI 的内存里仍有结果。",
    hitTitle: "在提示词缓存中找到。节省 = 保存时编码所用的时间减去本次查找的时间；" +
      "加载编码器的时间同样省下，但没有计入。",
    took: "用时",
  },
};

// Chips of their own colour: readable on light and on dark themes.
export const COLOURS = {
  hit: { bgColor: "#14532d", fgColor: "#dcfce7" },
  partial: { bgColor: "#1e4d5c", fgColor: "#dff6fc" },
  comfy: { bgColor: "#1e3a5f", fgColor: "#dbeafe" },
  miss: { bgColor: "#6b3a0a", fgColor: "#ffedd5" },
};

const LONGEST_WHY = 36; // characters; the whole reason is in the title

const CHINESE_WHY = {
  "new text": "新的文本", evicted: "已被淘汰", "cache is off": "缓存已关闭",
  "its stored file was damaged": "已存的文件损坏",
  "nothing is kept, by the settings": "按设置不保存", "first time": "首次",
  "this node keeps nothing": "此节点不保存", "this run keeps nothing": "本次运行不保存",
};
const CHINESE_PARTS = {
  LoRA: "LoRA", "nodes before clip": "clip 之前的节点", "nodes before vae": "vae 之前的节点",
  "LoRA file": "LoRA 文件", "text encoder file": "文本编码器文件", "VAE file": "VAE 文件",
  "embedding file": "embedding 文件", "checkpoint file": "检查点文件", image: "图片",
  "diffusion model file": "扩散模型文件", file: "文件", "code version": "代码版本",
  "ComfyUI's version": "ComfyUI 版本", "start options": "启动选项",
  "environment variables": "环境变量", libraries: "依赖库", hardware: "硬件", precision: "精度",
  "number of images": "图片数量", "reference size": "参考尺寸",
};
const CHINESE_ENDS = { changed: "已改变", "is gone": "已移除" };
const NOT_CACHEABLE = "cannot be cached: "; // what follows is a sentence, with commas perhaps
// How the parts of a key are called to a user.
const PARTS = [
  [/^graph before (\w+)(?= (changed|is gone)$)/, "nodes before $1"],
  [/^LoRA before \w+(?= (changed|is gone)$)/, "LoRA"],
  [/^(image ?\d*|pixels)(?= (changed|is gone)$)/, "image"],
];

/** The words of the frontend's language, English where there is no translation. */
export function wordsOf(words, locale) {
  return words[locale] ?? words[String(locale).split("-")[0]] ?? words.en;
}

/** Seconds for people. */
export function secondsText(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 119.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/** The reason of a miss, short and in the frontend's language where it is known. */
export function whyText(why, locale) {
  const [reasons, ...sentence] = String(why).split(NOT_CACHEABLE);
  const isChinese = wordsOf(WORDS, locale) === WORDS.zh;
  const short = (reason) => PARTS.reduce((text, [part, name]) => text.replace(part, name), reason);
  const known = reasons.split(", ").filter(Boolean).map(short);
  const told = isChinese ? known.map(chineseWhy) : known;
  const prefix = isChinese ? "无法缓存：" : NOT_CACHEABLE;
  if (sentence.length) told.push(prefix + sentence.join(NOT_CACHEABLE));
  return told.join(isChinese ? "，" : ", ");
}

function chineseWhy(reason) {
  const [, part, end] = reason.match(/^(.*) (changed|is gone)$/) ?? [];
  if (part) return `${chinesePart(part)} ${CHINESE_ENDS[end]}`;
  const number = reason.match(/^new image (\d+)$/)?.[1];
  return number ? `新的图片 ${number}` : (CHINESE_WHY[reason] ?? reason);
}

function chinesePart(part) {
  const input = part.match(/^linked (.*)$/)?.[1];
  return input ? `连接的 ${input}` : (CHINESE_PARTS[part] ?? part);
}

function shortened(text) {
  return text.length <= LONGEST_WHY ? text : `${text.slice(0, LONGEST_WHY - 1).trimEnd()}…`;
}

/** {kind, text, title} for what one event says of one node; null for what no badge shows. */
export function badgeOf(facts, locale) {
  const words = wordsOf(WORDS, locale);
  if (facts.result === "comfy") return { kind: "comfy", text: words.comfy, title: words.comfyTitle };
  const saved = facts.seconds_saved > 0 && `${words.saved} ${secondsText(facts.seconds_saved)}`;
  if (facts.result === "hit") {
    const tier = String(facts.tier).split(", ").map((name) => words.tiers[name] ?? name).join(", ");
    const text = [words.hit, tier, saved].filter(Boolean).join(" · ");
    return { kind: "hit", text, title: words.hitTitle };
  }
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
    seconds > 0 && `${words.saved} ${secondsText(seconds)}`,
  ];
  const kind = misses ? "miss" : hits ? "hit" : "comfy";
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
    const skipped = facts.result === "comfy" && !isEncode(node?.comfyClass ?? "");
    const badge = node && !skipped && badgeOf(facts, locale);
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
