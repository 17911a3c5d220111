// Shows on every encode node, ours and stock, what the prompt cache did in the last run.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { badgesIn, COLOURS, Runs } from "./badges_core.js";
import { fetchJson } from "./requests.js";
import { toast } from "./toast.js";

const ROUTE = "/qwen_vram/conditioning";
const NO_ID = "00000000-0000-0000-0000-000000000000";
const PULSE = "QwenVRAM.Badges.Pulse";
const OURS = /^QwenVRAMCached/;
const runs = new Runs();
let shown = new Map(); // node -> its badge
let none = null; // the badge of the others, which is not drawn
let encodeNodes = new Set();

const rootGraph = () => app.rootGraph ?? app.graph;
const locale = () => app.extensionManager.setting.get("Comfy.Locale");

/** Classes that users added are in the settings; the rest the server knows. */
function isEncode(type) {
  const more = app.extensionManager.setting.get("QwenVRAM.Conditioning.MoreNodes") ?? "";
  return OURS.test(type) || encodeNodes.has(type) || more.split(/[\s,]+/).includes(type);
}

async function fetchEncodeNodes() {
  encodeNodes = new Set((await fetchJson(ROUTE)).encode_nodes);
}

/** What badges are kept under; a graph that was never saved may have no id of its own. */
function openWorkflow() {
  const { id } = rootGraph();
  return id === NO_ID ? (app.extensionManager.workflow?.activeWorkflow?.path ?? id) : id;
}

/** The entry of a prompt that runs now, or ended meanwhile. */
async function queued(promptId) {
  const { queue_running: running } = await fetchJson("/queue");
  const entry = running.find(([, id]) => id === promptId);
  return entry ?? (await fetchJson(`/history/${promptId}`))[promptId]?.prompt ?? [];
}

/** The workflow of a prompt and its nodes: a tab may have changed since it was queued. */
async function workflowOf(promptId) {
  const open = openWorkflow();
  const [, , prompt = {}, extra] = await queued(promptId).catch(() => []);
  const id = extra?.extra_pnginfo?.workflow?.id;
  return [!id || id === NO_ID ? open : id, Object.keys(prompt)];
}

function makeBadge({ kind, text, title }) {
  const onClick = () => toast("info", title, { summary: text });
  const badge = new window.LGraphBadge({ text, onClick, ...COLOURS[kind] });
  badge.title = title; // the tooltip where nodes are HTML; on the canvas a click tells it
  return badge;
}

/** HTML nodes ask for their badges again when something reactive changed that a badge has read. */
const pulse = () => app.extensionManager.setting.settings[PULSE];

/** Bring the badges of the open workflow in line with what its last run said. */
function draw() {
  const graph = rootGraph();
  const wanted = badgesIn(graph, runs.of(openWorkflow()), isEncode, locale());
  shown = new Map([...wanted].map(([node, content]) => [node, makeBadge(content)]));
  pulse().attrs.count++;
  app.canvas?.setDirty(true, true);
}

function listen() {
  api.addEventListener("qwen_vram.pin_marked", draw);
  api.addEventListener("execution_start", async ({ detail }) => {
    const run = runs.start();
    const [workflow, ids] = await workflowOf(detail.prompt_id);
    runs.belongsTo(workflow, run, ids);
    draw();
  });
  api.addEventListener("qwen_vram.cache", ({ detail }) => {
    runs.tell(detail);
    draw();
  });
  api.addEventListener("execution_cached", ({ detail }) => {
    runs.notRun(detail.nodes);
    draw();
  });
}

app.registerExtension({
  name: "QwenVRAM.Badges",
  settings: [{ id: PULSE, name: "", type: "hidden", defaultValue: 0, attrs: { count: 0 } }],
  async setup() {
    listen();
    await fetchEncodeNodes();
  },
  nodeCreated(node) {
    node.badges.push(() => {
      void pulse().attrs.count;
      none ??= new window.LGraphBadge({ text: "" });
      return shown.get(node) ?? none;
    });
  },
  afterConfigureGraph: draw,
});
