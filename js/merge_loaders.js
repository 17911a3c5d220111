// Merge duplicate loaders: several nodes that load the same file become one, as one undoable step.
import { app } from "../../scripts/app.js";
import { appNodes, emptiedGroups, loadedApart, mergedText, planMerges } from "./merge_loaders_core.js";
import { toast } from "./toast.js";

const COMMAND = "QwenVRAM.MergeLoaders";

const locale = () => app.extensionManager.setting.get("Comfy.Locale");

/** A node as the plan wants it; `inApp` are the ids of those that app mode shows. */
function described(graph, node, inApp) {
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
    inApp: inApp.has(String(node.id)),
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
function replace(graph, node, kept, done) {
  done.changed = true;
  for (const output of node.outputs) {
    const links = (output.links ?? []).map((id) => graph.getLink(id)).filter(Boolean);
    for (const link of links) moveLink(graph, link, kept);
  }
  if (node.outputs.some((output) => output.links?.length)) return false;
  graph.remove(node);
  return true;
}

/** Merge within one graph; what was done is added to `done`, also if an exception ends it. */
function mergeIn(graph, inApp, done) {
  const groups = groupsOf(graph);
  const removed = [];
  try {
    for (const merge of planMerges(graph.nodes.map((node) => described(graph, node, inApp)))) {
      const kept = graph.getNodeById(merge.keep);
      const merged = { ...merge, remove: [] };
      done.shown.push(...merge.shown);
      for (const gone of merge.remove) {
        const node = graph.getNodeById(gone.id);
        if (!replace(graph, node, kept, done)) {
          done.blocked.push(node.title);
          continue;
        }
        if (!merged.remove.length) done.merges.push(merged);
        merged.remove.push(gone);
        removed.push(gone.id);
      }
    }
  } finally {
    done.emptied.push(...emptiedGroups(groups, removed));
  }
}

/** Equal loaders that the workflow still has; `done` tells if that cannot be known. */
async function noteApart(done) {
  try {
    done.apart = loadedApart((await app.graphToPrompt()).output);
  } catch (error) {
    done.unread = error.message;
  }
}

async function mergeLoaders() {
  const root = app.rootGraph ?? app.graph;
  const inApp = appNodes(root.extra?.linearData);
  const done = { merges: [], emptied: [], blocked: [], shown: [], apart: [], changed: false };
  // What was changed before, and not yet noted, is a step of its own.
  app.extensionManager.workflow?.activeWorkflow?.changeTracker?.captureCanvasState();
  app.canvas.emitBeforeChange();
  try {
    for (const graph of [root, ...(root.subgraphs?.values() ?? [])]) mergeIn(graph, inApp, done);
  } catch (error) {
    done.failed = error.message;
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
  if (done.failed === undefined) await noteApart(done);
  const severity = done.failed !== undefined ? "error" : done.merges.length ? "success" : "info";
  toast(severity, mergedText(done, locale()));
}

/** For the menu; see menu.js. */
export const MERGE_COMMANDS = [
  {
    id: COMMAND,
    label: "Merge duplicate loaders (Qwen VRAM)",
    menubarLabel: "Merge duplicate loaders",
    icon: "pi pi-sitemap",
    function: mergeLoaders,
  },
];

app.registerExtension({
  name: "QwenVRAM.MergeLoaders",
});
