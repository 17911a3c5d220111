// Which loaders of a workflow load the same thing, and may become one. Pure: no DOM, no app.
import { wordsOf } from "./text_core.js";

// Loader -> the widget that names its file. All of them give the same for the same values and the
// same inputs, so that one can stand for several.
export const LOADERS = {
  UNETLoader: "unet_name",
  UnetLoaderGGUF: "unet_name",
  CLIPLoader: "clip_name",
  CLIPLoaderGGUF: "clip_name",
  DualCLIPLoader: "clip_name1",
  DualCLIPLoaderGGUF: "clip_name1",
  TripleCLIPLoader: "clip_name1",
  QuadrupleCLIPLoader: "clip_name1",
  VAELoader: "vae_name",
  CheckpointLoaderSimple: "ckpt_name",
  unCLIPCheckpointLoader: "ckpt_name",
  CLIPVisionLoader: "clip_name",
  ControlNetLoader: "control_net_name",
  ModelPatchLoader: "name",
  StyleModelLoader: "style_model_name",
  UpscaleModelLoader: "model_name",
  LoraLoader: "lora_name",
  LoraLoaderModelOnly: "lora_name",
  QwenVRAMLoadDiffusionModel: "unet_name",
  QwenVRAMLoadTextEncoder: "clip_name",
  QwenVRAMLoadVAE: "vae_name",
};
const SHARING = /^QwenVRAM/; // however many nodes ask, they hold one copy
const ACTIVE = 0; // LiteGraph's mode "always": neither muted nor bypassed

const WORDS = {
  en: {
    nothing: "Nothing to merge: no two loaders of this workflow load the same file with the same options.",
    merged: (file, count, title) => `${file}: ${count} loaders are now one, "${title}".`,
    titles: (titles) => `Titles that are gone: ${titles}.`,
    undo: "Undo takes all of this back in one step.",
    emptied: (groups) => `Empty now, and left where they are: ${groups}.`,
    blocked: (titles) => `Not merged, because a node refused the new link: ${titles}.`,
    apart: (file, count) =>
      `${file} has ${count} loaders still: in different sub-graphs, which links cannot cross, or with ` +
      "a name that comes over different links, or shown in app mode. ComfyUI loads equal ones once, unless it was started with --cache-none.",
    shown: (titles) => `Not merged, because app mode shows their values: ${titles}.`,
    unread: (why) => `Which loaders are still there twice is not known: the workflow cannot be read (${why}).`,
    failed: (why) => `Merging was broken off by an error: ${why}`,
    half: "Undo takes back in one step what was changed until then.",
    group: (title) => `group "${title}"`,
  },
  zh: {
    nothing: "没有可合并的内容：此工作流中没有两个加载器以相同选项加载同一个文件。",
    merged: (file, count, title) => `${file}：${count} 个加载器已合并为一个“${title}”。`,
    titles: (titles) => `不再存在的标题：${titles}。`,
    undo: "撤销一次即可全部恢复。",
    emptied: (groups) => `现在为空、但原样保留：${groups}。`,
    blocked: (titles) => `未合并，因为有节点拒绝了新的连接：${titles}。`,
    apart: (file, count) =>
      `${file} 仍有 ${count} 个加载器：它们位于连接无法跨越的不同子图中，文件名来自不同的连接，或显示在应用模式中。` +
      "ComfyUI 对相同的加载器只加载一次，除非以 --cache-none 启动。",
    shown: (titles) => `未合并，因为应用模式显示它们的值：${titles}。`,
    unread: (why) => `无法知道还有哪些加载器重复：工作流无法读取（${why}）。`,
    failed: (why) => `合并因错误中断：${why}`,
    half: "撤销一次即可恢复此前的全部改动。",
    group: (title) => `分组“${title}”`,
  },
};

/** The texts in the frontend's language, English where there is no translation. */
export const mergeWords = (locale) => wordsOf(WORDS, locale);

/**
 * What loads the same in one graph.
 *
 * nodes: [{id, type, mode, title, named, fixed, inApp, marks, values: {widget: value}, inputs: {name: [node id, slot]}}],
 * where `inputs` has the linked ones alone, `values` the others; `named` says that the user gave the
 * title, `fixed` that the node cannot be removed, `inApp` that app mode shows it, so that it stays.
 * Kept is the oldest of those that app mode shows, else of those that the user named, else of all.
 * Returns [{keep: id, title, file, remove: [{id, lostTitle}], shown: [title]}], where `shown` are
 * equal ones that stay, too.
 */
export function planMerges(nodes) {
  const byId = new Map(nodes.map((node) => [String(node.id), node]));
  const loaders = nodes.filter(isCandidate).sort(byAge);
  const same = new Map(); // loader -> the first one that loads the same
  let classes = new Map();
  for (let known = -1; known !== classes.size; ) {
    known = classes.size;
    classes = grouped(loaders, (node) => keyOf(node, byId, same));
    for (const members of classes.values()) {
      for (const node of members) same.set(String(node.id), String(members[0].id));
    }
  }
  return [...classes.values()].filter((members) => members.length > 1).map(mergeOf);
}

function isCandidate(node) {
  const file = Object.hasOwn(LOADERS, node.type) && LOADERS[node.type];
  // A node whose pack is missing has no widgets: nothing is known of what it would load.
  return Boolean(file) && node.mode === ACTIVE && !node.fixed && (file in node.values || file in node.inputs);
}

/** The oldest first; ids are numbers, but for those of some generated workflows. */
function byAge(one, other) {
  return String(one.id).localeCompare(String(other.id), "en", { numeric: true });
}

/** All that the result of a loader depends on. */
function keyOf(node, byId, same) {
  const sources = entries(node.inputs).map(([name, source]) => [name, ...sourceOf(source, byId, same)]);
  return JSON.stringify([node.type, entries(node.values), sources, node.marks ?? null]);
}

/** Where a link comes from: through reroutes, and by the first of several equal loaders. */
function sourceOf([id, slot], byId, same) {
  const passed = new Set();
  let source = [String(id), slot];
  for (;;) {
    const node = byId.get(source[0]);
    const before = node?.type === "Reroute" && node.mode === ACTIVE && Object.values(node.inputs)[0];
    if (!before || passed.has(source[0])) return [same.get(source[0]) ?? source[0], source[1]];
    passed.add(source[0]);
    source = [String(before[0]), before[1]];
  }
}

/** Map of key -> items (Map.groupBy, which browsers before 2024 lack). */
function grouped(items, keyFor) {
  const groups = new Map();
  for (const item of items) {
    const key = keyFor(item);
    groups.set(key, [...(groups.get(key) ?? []), item]);
  }
  return groups;
}

const entries = (record) => Object.entries(record).sort(([one], [other]) => (one < other ? -1 : 1));

function mergeOf(members) {
  const keep = members.find((node) => node.inApp) ?? members.find((node) => node.named) ?? members[0];
  const others = members.filter((node) => node !== keep);
  const removed = others.filter((node) => !node.inApp);
  const lost = ({ named, title }) => (named && title !== keep.title ? title : null);
  return {
    keep: keep.id,
    remove: removed.map((node) => ({ id: node.id, lostTitle: lost(node) })),
    shown: others.filter((node) => node.inApp).map((node) => node.title),
    file: fileOf(keep),
    title: keep.title,
  };
}

/**
 * The ids of the nodes whose widgets app mode shows, from the `linearData` of a workflow. Its inputs
 * are [id, widget, ...], where id is "graph:node:widget", in older workflows a node's alone or a path
 * of nodes through sub-graphs. Every part counts.
 */
export function appNodes(linearData) {
  const inputs = Array.isArray(linearData?.inputs) ? linearData.inputs : [];
  return new Set(inputs.filter(Array.isArray).flatMap(([id]) => String(id).split(":")));
}

/** The file's name for people; the whole title where it comes over a link. */
function fileOf({ type, title, values }) {
  const value = values[LOADERS[type]];
  return typeof value === "string" && value ? value.split(/[\\/]/).at(-1) : title;
}

/** Titles of groups that had nodes before and have none after. groups: [{title, nodes: [id]}] */
export function emptiedGroups(groups, removedIds) {
  const removed = new Set(removedIds.map(String));
  const ids = ({ nodes }) => nodes.map(String);
  return groups.filter((group) => group.nodes.length && ids(group).every((id) => removed.has(id)))
    .map((group) => group.title);
}

/**
 * Equal loaders that an API-format prompt still has: sub-graphs are unfolded in it, so that this
 * sees those that no link can join. Our own hold one copy anyhow. [{file, count}]
 */
export function loadedApart(output) {
  const loaders = Object.values(output).filter(
    (node) => Object.hasOwn(LOADERS, node.class_type) && !SHARING.test(node.class_type),
  );
  const classes = grouped(loaders, (node) => JSON.stringify([node.class_type, entries(node.inputs)]));
  return [...classes.values()].filter((members) => members.length > 1).map((members) => ({
    file: fileOf({ type: members[0].class_type, title: members[0].class_type, values: members[0].inputs }),
    count: members.length,
  }));
}

/**
 * What was done, for a toast. done: {merges, emptied: [title], blocked: [title], shown: [title],
 * apart: [{file, count}], changed, unread, failed}; the last two are reasons, if there are any.
 */
export function mergedText({ merges, emptied, blocked, shown = [], apart, changed, unread, failed }, locale) {
  const words = mergeWords(locale);
  const join = (texts) => texts.join(", ");
  const titles = merges.flatMap(({ remove }) => remove.map((node) => node.lostTitle)).filter(Boolean);
  const lines = merges.map((merge) => words.merged(merge.file, merge.remove.length + 1, merge.title));
  if (failed !== undefined) lines.unshift(words.failed(failed));
  else if (!merges.length && !blocked.length && !shown.length) lines.push(words.nothing);
  if (titles.length) lines.push(words.titles(join(titles.map((title) => `"${title}"`))));
  if (emptied.length) lines.push(words.emptied(join(emptied.map((title) => words.group(title)))));
  if (failed === undefined && merges.length) lines.push(words.undo);
  if (failed !== undefined && changed) lines.push(words.half);
  if (blocked.length) lines.push(words.blocked(join(blocked)));
  if (shown.length) lines.push(words.shown(join(shown)));
  if (unread !== undefined) lines.push(words.unread(unread));
  return [...lines, ...apart.map(({ file, count }) => words.apart(file, count))].join("\n");
}
