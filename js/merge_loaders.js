// Merge duplicate loaders: several nodes that load the same file become one, as one undoable step.
import { app } from "../../scripts/app.js";
import { emptiedGroups, loadedApart, mergedText, mergeWords, planMerges } from "./merge_loaders_core.js";

const COMMAND = "QwenVRAM.MergeLoaders";

const locale = () => app.extensionManager.setting.get("Comfy.Locale");

function toast(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "Qwen VRAM", detail, life: 20000 });
}

/** A node as the plan wants it. */
function described(graph, node) {
  const links = (node.inputs ?? []).map((input) => [input.name, graph.getLink(input.link)]);
  const linked = links.filter(([, link]) => link);
  const inputs = Object.fromEntries(linked.map(([name, link]) => [name, [link.origin_id, link.origin_slot]]));
  const kept = (node.widgets ?? []).filter((widget) =>
    widget.serialize !== false && widget.options?.serialize !== false && !(widget.name in inputs));
  return {
    id: node.id,
    type: node.type,
    mode: node.mode,
    title: node.title,
    named: node.title !== node.constructor.title,
    fixed: Boolean(node.ignore_remove || node.block_delete),
    marks: node.properties?.qwen_vram,
    values: Object.fromEntries(kept.map((widget) => [widget.name, widget.value])),
    inputs,
  };
}

/**
 * Groups with the nodes whose centre lies in them, as LiteGraph counts it. Not by its own
 * recomputeInsideNodes(), which may change the order of the groups.
 */
function groupsOf(graph) {
  const inside = ([left, top, width, height], { pos, size }) => {
    const [x, y] = [pos[0] + size[0] / 2, pos[1] + (size[1] - window.LiteGraph.NODE_TITLE_HEIGHT) / 2];
    return x >= left && x < left + width && y >= top && y < top + height;
  };
  return graph.groups.map((group) => ({
    title: group.title,
    nodes: graph.nodes.filter((node) => inside(group.boundingRect, node)).map((node) => node.id),
  }));
}

/** Lead one link from another node's output to where it went, by the same reroutes. */
function moveLink(graph, link, kept) {
  const { origin_slot: slot, parentId: reroute } = link;
  if (link.targetIsIoNode) {
    graph.outputNode.slots[link.target_slot].connect(kept.outputs[slot], kept, reroute);
  } else {
    kept.connect(slot, graph.getNodeById(link.target_id), link.target_slot, reroute);
  }
}

/** Replace a node by an equal one; false if a node refused the link, then the node stays. */
function replace(graph, node, kept) {
  for (const output of node.outputs) {
    const links = (output.links ?? []).map((id) => graph.getLink(id)).filter(Boolean);
    for (const link of links) moveLink(graph, link, kept);
  }
  if (node.outputs.some((output) => output.links?.length)) return false;
  graph.remove(node);
  return true;
}

/** Merge within one graph; what was done is added to `done`. */
function mergeIn(graph, done) {
  const groups = groupsOf(graph);
  const removed = [];
  for (const merge of planMerges(graph.nodes.map((node) => described(graph, node)))) {
    const kept = graph.getNodeById(merge.keep);
    const gone = merge.remove.filter(({ id }) => {
      const node = graph.getNodeById(id);
      if (replace(graph, node, kept)) return true;
      done.blocked.push(node.title);
      return false;
    });
    if (gone.length) done.merges.push({ ...merge, remove: gone });
    removed.push(...gone.map(({ id }) => id));
  }
  done.emptied.push(...emptiedGroups(groups, removed));
}

async function mergeLoaders() {
  const root = app.rootGraph ?? app.graph;
  const done = { merges: [], emptied: [], blocked: [], apart: [] };
  // What was changed before, and not yet noted, is a step of its own.
  app.extensionManager.workflow?.activeWorkflow?.changeTracker?.captureCanvasState();
  app.canvas.emitBeforeChange();
  try {
    for (const graph of [root, ...(root.subgraphs?.values() ?? [])]) mergeIn(graph, done);
  } catch (error) {
    return toast("error", mergeWords(locale()).failed(error.message));
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
  done.apart = loadedApart((await app.graphToPrompt()).output);
  toast(done.merges.length ? "success" : "info", mergedText(done, locale()));
}

app.registerExtension({
  name: "QwenVRAM.MergeLoaders",
  commands: [
    {
      id: COMMAND,
      label: "Merge duplicate loaders (Qwen VRAM)",
      icon: "pi pi-sitemap",
      function: mergeLoaders,
    },
  ],
  menuCommands: [{ path: ["Extensions", "Qwen VRAM"], commands: [COMMAND] }],
});
