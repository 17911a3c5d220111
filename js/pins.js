// Pin output: keeps what a node gives, so that nothing before it runs. The mark is a property of
// the node; the server's queue_time puts the kept value in its place.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import {
  eventsOf, executionIds, hasOutputs, isKept, markOf, outcomeOf, pinBadge, pinPrompt, pinWords, problemOf,
  rejection, setMark, valuesOf,
} from "./pins_core.js";
import { fetchJson } from "./requests.js";
import { findNode, nodesIn, oursAmong } from "./status_core.js";
import { sizeText } from "./text_core.js";
import { toast } from "./toast.js";

const PINS_ROUTE = "/qwen_vram/pins";
const CHANGED = "qwen_vram.pins_changed"; // told by panel.js
const EVENTS = ["executed", "execution_error", "execution_interrupted", "execution_success"];
const CHANGES = ["status", "reconnected"]; // the queue may have lost a run, or events were missed

let kept = null; // contents of the pins that ComfyUI has; null while that is not known

const rootGraph = () => app.rootGraph ?? app.graph;
const words = () => pinWords(app.extensionManager.setting.get("Comfy.Locale"));
const moreNodes = () => app.extensionManager.setting.get("QwenVRAM.Conditioning.MoreNodes");

/** The frontend draws badges again when it is told that they changed. */
function redraw(node) {
  node.graph?.trigger("node:property:changed", {
    type: "node:property:changed",
    nodeId: node.id,
    property: "badges",
    oldValue: node.badges,
    newValue: [...node.badges],
  });
  app.canvas?.setDirty(true, true);
}

/** Set a mark so that undo knows it. */
function mark(node, name, value) {
  setMark(node, name, value);
  redraw(node);
  api.dispatchCustomEvent("qwen_vram.pin_marked"); // what the cache did for it counts no longer
  app.extensionManager.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.();
}

/** Say on a node of ours what became of it; its last line is of before. */
function showLine(node, text) {
  const ids = nodesIn(rootGraph()).filter(([, each]) => each === node).map(([id]) => id);
  for (const nodeId of oursAmong(rootGraph(), ids)) {
    api.dispatchCustomEvent("progress_text", { nodeId, text });
  }
}

/** Learn which pins there are, and show it on the nodes that have one. */
async function refresh() {
  kept = await fetchJson(PINS_ROUTE).then((pins) => new Set(pins.map((pin) => pin.content)), () => null);
  for (const [, node] of nodesIn(rootGraph())) if (markOf(node, "pin")) redraw(node);
}

/** ComfyUI's own message of a refused pin says only that an input was rejected. */
function tellRefused({ detail: { node: nodeId, missing, text } }) {
  const title = findNode(rootGraph(), nodeId)?.title ?? nodeId;
  toast("error", missing ? words().missing(title) : words().rejected(title, text));
  return refresh();
}

/** The queue first: a run that ends in between is in the history. */
async function lookUp(promptId) {
  const queue = await fetchJson("/queue");
  return eventsOf(promptId, queue, await fetchJson(`/history/${promptId}`));
}

/** Listen while `act` runs, which is handed a promise of the outcome for a prompt id. */
async function listening(act) {
  const events = [];
  let check = () => {};
  let look = () => {};
  const note = ({ type, detail }) => {
    events.push([type, detail]);
    check();
  };
  const lookAgain = () => look();
  for (const name of EVENTS) api.addEventListener(name, note);
  for (const name of CHANGES) api.addEventListener(name, lookAgain);
  const outcome = (promptId) => new Promise((resolve) => {
    check = () => {
      const found = outcomeOf(events, promptId);
      if (found) resolve(found);
    };
    look = () => lookUp(promptId).then((told) => {
      events.push(...told);
      check();
    }, () => {}); // ComfyUI does not answer now; it tells when it does
    check();
    look(); // it may have been taken out of the queue before its number was known here
  });
  try {
    return await act(outcome);
  } finally {
    for (const name of EVENTS) api.removeEventListener(name, note);
    for (const name of CHANGES) api.removeEventListener(name, lookAgain);
  }
}

/** Queue a request and wait for its end: what was pinned. Throws an Error with the reason. */
async function run(prompt, workflow) {
  try {
    return await listening(async (outcomeFor) => {
      const options = { partialExecutionTargets: [prompt.id] };
      const { prompt_id: promptId } = await api.queuePrompt(0, { output: prompt.output, workflow }, options);
      const outcome = await outcomeFor(promptId);
      if (outcome.pin) return outcome.pin;
      throw new Error(outcome.error ?? words()[outcome.problem]);
    });
  } catch (error) {
    throw error.response ? new Error(rejection(error.response, error.message)) : error;
  }
}

async function pinOne(node) {
  const { output, workflow } = await app.graphToPrompt();
  const ids = executionIds(rootGraph(), node, output);
  const problem = problemOf(node, ids);
  if (problem) throw new Error(words()[problem]);
  const values = valuesOf(node);
  const pin = await run(pinPrompt(output, ids[0], node.outputs.length), workflow);
  if (node.graph?.getNodeById(node.id) !== node) throw new Error(words().gone);
  kept?.add(pin.content);
  mark(node, "pin", { ...pin, values });
  showLine(node, words().line);
  toast("success", words().pinned(node.title, sizeText(pin.bytes)));
}

/** One after the other: what several need runs once, and each refusal names its node. */
async function pin(nodes) {
  for (const node of nodes.filter((each) => !markOf(each, "pin"))) {
    try {
      await pinOne(node);
    } catch (error) {
      toast("error", words().refused(node.title, error.message));
    }
  }
}

function unpin(nodes) {
  for (const node of nodes.filter((each) => markOf(each, "pin"))) {
    mark(node, "pin", undefined);
    showLine(node, words().unpinned);
  }
}

function selected() {
  return Object.values(app.canvas.selected_nodes ?? {}).filter(hasOutputs);
}

/** Run `act` for the selected nodes, or say that there are none. */
async function forSelected(act) {
  const nodes = selected();
  if (nodes.length) await act(nodes);
  else toast("warn", words().noSelection);
}

/** The node of a menu, with the others that are selected. */
function withSelected(node) {
  return [...new Set([node, ...selected()])];
}

function keepItem(node) {
  const nothing = Boolean(markOf(node, "keep_nothing"));
  return {
    content: `${nothing ? words().keepAgain : words().keepNothing} (Qwen VRAM)`,
    callback: () => mark(node, "keep_nothing", nothing ? undefined : true),
  };
}

/** For the menu; see menu.js. */
export const PIN_COMMANDS = [
  {
    id: "QwenVRAM.PinOutput",
    label: "Pin output of the selected nodes (Qwen VRAM)",
    menubarLabel: "Pin output of the selected nodes",
    icon: "pi pi-thumbtack",
    function: () => forSelected(pin),
  },
  {
    id: "QwenVRAM.UnpinOutput",
    label: "Unpin output of the selected nodes (Qwen VRAM)",
    menubarLabel: "Unpin output of the selected nodes",
    icon: "pi pi-thumbtack",
    function: () => forSelected(unpin),
  },
];

app.registerExtension({
  name: "QwenVRAM.Pins",
  async setup() {
    api.addEventListener("qwen_vram.pin_refused", tellRefused);
    for (const name of [CHANGED, "reconnected"]) api.addEventListener(name, refresh);
    await refresh();
  },
  afterConfigureGraph: refresh,
  nodeCreated(node) {
    let badge = null;
    node.badges.push(() => {
      const wanted = pinBadge(node, words(), kept);
      if (badge?.text !== wanted.text) badge = new window.LGraphBadge(wanted);
      return badge;
    });
  },
  getNodeMenuItems(node) {
    const items = [];
    if (hasOutputs(node)) {
      const nodes = withSelected(node);
      const pinned = Boolean(markOf(node, "pin"));
      items.push({
        content: `${pinned ? words().unpin : words().pin} (Qwen VRAM)`,
        callback: () => (pinned ? unpin(nodes) : pin(nodes)),
      });
    }
    if (isKept(node, moreNodes())) items.push(keepItem(node));
    return items;
  },
});
