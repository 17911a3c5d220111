// What the status line of a node says when the node did not run. Pure: no DOM, no app.
import { wordsOf } from "./text_core.js";

const DEEPEST = 32; // sub-graphs inside of each other
const NOT_RUN = {
  en: "not run: not needed, or ComfyUI still had the result",
  zh: "未运行：不需要，或 ComfyUI 仍保有结果",
};

const TOLD_LATER = {
  en: "ComfyUI still has the result, and shows it when the run has succeeded",
  zh: "ComfyUI 仍保有结果，运行成功后会显示",
};

/** The sentence in the frontend's language, English where there is no translation. */
export const notRun = (locale) => wordsOf(NOT_RUN, locale);
export const toldLater = (locale) => wordsOf(TOLD_LATER, locale);

/** Whether ComfyUI sends at the end of a run what the node showed when it made the result. */
export const isToldAgain = (node) => node?.constructor?.nodeData?.has_intermediate_output === true;

/** The line in what a node showed; null if there is none. */
export function lineIn(output) {
  const shown = Array.isArray(output?.qwen_vram) ? output.qwen_vram : [];
  const line = shown.at(-1)?.text; // of several words from a list, as on the node itself
  return typeof line === "string" ? line : null;
}

/**
 * Every node of a graph and of its sub-graphs, as [execution id, node]; one that stands in a
 * sub-graph that is used twice comes twice.
 */
export function nodesIn(graph, path = "", depth = 0) {
  if (depth > DEEPEST) return [];
  return [...(graph?.nodes ?? [])].flatMap((node) => {
    const id = `${path}${node.id}`;
    return [[id, node], ...nodesIn(node.subgraph, `${id}:`, depth + 1)];
  });
}

/** A node by its execution id; in subgraphs that is a path of ids, as "12:3". */
export function findNode(rootGraph, executionId) {
  let graph = rootGraph;
  let node = null;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById?.(Number(id)) ?? graph?.getNodeById?.(id) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** Execution ids of this pack's nodes among those that ComfyUI reports as cached. */
export function oursAmong(rootGraph, executionIds) {
  return executionIds.filter((id) => findNode(rootGraph, id)?.comfyClass?.startsWith("QwenVRAM"));
}
