// Builds the request that encodes a list of prompts. Pure: no DOM, no app.
import { helperId } from "./pins_core.js";
import { secondsText, wordsOf } from "./text_core.js";

const WORDS = {
  en: {
    title: "Prompt cache",
    sent: (name) => `${name} is queued. The result will be shown here.`,
    noNode:
      "No text encoder was found. Open a workflow with a CLIP Text Encode or Cached Text Encode " +
      "node whose clip input is connected.",
    several:
      "This workflow has several text encoders. Select the encode node whose encoder is to be " +
      "used, then try again.",
    upload: (name, why) => `${name} could not be sent to ComfyUI: ${why}.`,
    refused: (why) => `ComfyUI refused the list. ${why}`,
    stopped: "The run was stopped. What was encoded until then is kept.",
    notAList: (name) => `${name} is no list of prompts: use a file that ends in .txt, .csv or .tsv.`,
    done: ({ prompts, known, encoded, seconds, not_stored: lost }) =>
      `${prompts} prompts: ${known} known, ${encoded} encoded in ${seconds}, ${lost} not stored`,
  },
  zh: {
    title: "提示词缓存",
    sent: (name) => `${name} 已加入队列，结果会显示在这里。`,
    noNode: "没有找到文本编码器。请打开含有“CLIP文本编码”或“缓存文本编码”节点且 clip 输入已连接的工作流。",
    several: "此工作流有多个文本编码器。请先选中要使用的编码节点，然后重试。",
    upload: (name, why) => `无法把 ${name} 发送给 ComfyUI：${why}。`,
    refused: (why) => `ComfyUI 拒绝了该列表。${why}`,
    stopped: "运行已被中止。此前编码的内容会保留。",
    notAList: (name) => `${name} 不是提示词列表：请使用以 .txt、.csv 或 .tsv 结尾的文件。`,
    done: ({ prompts, known, encoded, seconds, not_stored: lost }) =>
      `共 ${prompts} 条提示词：${known} 条已知，${encoded} 条编码用时 ${seconds}，${lost} 条未保存`,
  },
};
// Their result depends on nothing but text and clip, as the prefill's does.
const TEXT_ENCODES = new Set(["CLIPTextEncode", "QwenVRAMCachedTextEncode"]);

/** Whether the server would read a file of this name. */
export const isList = (name) => /\.(txt|csv|tsv)$/i.test(name);

/** What became of a list, from what its node says. */
export function doneText(facts, locale) {
  const told = prefillWords(locale).done({ ...facts, seconds: secondsText(facts.seconds) });
  return facts.reason ? `${told} (${facts.reason})` : told;
}

export const prefillWords = (locale) => wordsOf(WORDS, locale);

const isLink = (value) => Array.isArray(value) && value.length === 2;

/**
 * The clip link to encode with: that of a selected node, or the only one of all text encodes.
 * {link} or {problem}: a key of the words.
 */
export function clipOf(output, selectedIds) {
  const linkOf = (id) => output[id]?.inputs?.clip;
  const selected = selectedIds.map(linkOf).filter(isLink);
  const encodes = Object.keys(output).filter((id) => TEXT_ENCODES.has(output[id].class_type));
  const candidates = selected.length ? selected : encodes.map(linkOf).filter(isLink);
  const different = new Set(candidates.map((link) => JSON.stringify(link)));
  if (different.size === 1) return { link: candidates[0] };
  return { problem: different.size ? "several" : "noNode" };
}

/** Only what a link needs: nodes beside it would be validated and looked up for nothing. */
export function upstreamOf(output, link) {
  const found = {};
  const waiting = [link[0]];
  while (waiting.length) {
    const id = String(waiting.pop());
    if (found[id] || !output[id]) continue;
    found[id] = output[id];
    for (const value of Object.values(output[id].inputs)) if (isLink(value)) waiting.push(value[0]);
  }
  return found;
}

/** {id, output}: the prompt that encodes the uploaded file behind a clip link. */
export function prefillPrompt(output, link, file) {
  const id = helperId(output, "prefill");
  const inputs = { clip: link, prompts: "", file, cache: "memory and disk" };
  const node = { class_type: "QwenVRAMPrefill", inputs, _meta: { title: "Prefill" } };
  return { id, output: { ...upstreamOf(output, link), [id]: node } };
}

/** How a node names an uploaded file. */
export function annotated({ name, subfolder, type }) {
  return `${subfolder ? `${subfolder}/` : ""}${name} [${type}]`;
}
