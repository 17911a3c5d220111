// A button, a command and a key that run the open workflow once without leaving a trace.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import {
  acceptedText,
  buttonOf,
  endOf,
  isActive,
  OPENED,
  reportOf,
  SETTING,
  warmUpRequest,
  warmUpWords,
} from "./warmup_core.js";

const ROUTE = "/qwen_vram/warmup";
const COMMAND = "QwenVRAM.WarmUp";
const PULSE = "QwenVRAM.WarmUp.Pulse";
const REMEMBERED = "QwenVRAM.WarmUp"; // in this tab's storage: the warm-up that it started
const EVERY_MS = 400;
const ANSWER_MS = 8000;
const ACCEPT_MS = 60000; // nodes check their files when a prompt is sent
const MOST_SILENCES = 5;
const AFTER_OPENING_MS = 1000; // other extensions fill in widgets meanwhile
const seen = new Set(); // workflows that were warmed up when they were opened
let report = null;
let sending = false;

const locale = () => app.extensionManager.setting.get("Comfy.Locale");
const words = () => warmUpWords(locale());

/** Vue draws the button again when something reactive changed that its properties have read. */
const pulse = () => app.extensionManager.setting.settings[PULSE];

function show(now) {
  report = now;
  if (isActive(now)) sessionStorage.setItem(REMEMBERED, now.id);
  else sessionStorage.removeItem(REMEMBERED);
  pulse().attrs.count++;
}

function toast(severity, detail, life = 12000) {
  app.extensionManager.toast.add({ severity, summary: words().title, detail, life });
}

/** {status, body}; body is null where it is no JSON. Raises Error where nobody answers in time. */
async function request(method, life, content) {
  const options = { method, signal: AbortSignal.timeout(life) };
  if (content) Object.assign(options, { body: JSON.stringify(content), headers: { "Content-Type": "application/json" } });
  const response = await api.fetchApi(ROUTE, options);
  const body = await response.json().catch(() => null);
  return { status: response.status, body };
}

/** A press: start, or cancel what this page started. */
async function press() {
  if (sending) return;
  if (!isActive(report)) return start();
  try {
    await request("DELETE", ANSWER_MS);
    if (isActive(report)) show({ ...report, cancelling: true });
  } catch {
    toast("error", words().unreachable);
  }
}

async function start() {
  sending = true;
  try {
    const { status, body } = await request("POST", ACCEPT_MS, warmUpRequest(await app.graphToPrompt()));
    const accepted = status === 200 ? reportOf(body) : null;
    if (accepted) {
      const text = acceptedText(accepted, locale());
      if (text) toast("info", text);
      show(accepted);
      follow(accepted.id);
    } else if (typeof body?.error === "string") toast("warn", words().refused(body.error));
    else toast("error", words().broken);
  } catch (error) {
    toast("error", error.name === "TimeoutError" ? words().unreachable : words().refused(error.message));
  } finally {
    sending = false;
  }
}

const pause = () => new Promise((resolve) => setTimeout(resolve, EVERY_MS));

/** Ask until it has ended, and say once what came of it. */
async function follow(id) {
  let silences = 0;
  while (isActive(report)) {
    await pause();
    let body;
    try {
      ({ body } = await request("GET", ANSWER_MS));
      silences = 0;
    } catch {
      silences += 1;
      if (silences < MOST_SILENCES) continue;
      return finish("error", words().unreachable);
    }
    if (body?.state === "none" || (reportOf(body) && body.id !== id)) return finish("info", words().gone);
    const now = reportOf(body);
    if (!now) return finish("error", words().broken);
    show(now);
  }
  const { severity, detail } = endOf(report, locale());
  finish(severity, detail, severity === "success" ? 15000 : 12000);
}

function finish(severity, detail, life) {
  show(null);
  toast(severity, detail, life);
}

/** After a reload of the page: go on showing what it had started. */
async function resume() {
  const id = sessionStorage.getItem(REMEMBERED);
  if (!id) return;
  const { body } = await request("GET", ANSWER_MS).catch(() => ({}));
  const now = reportOf(body);
  const own = now?.id === id && isActive(now);
  show(own ? now : null);
  if (own) follow(id);
}

const openWorkflow = () => app.extensionManager.workflow?.activeWorkflow?.path ?? (app.rootGraph ?? app.graph).id;

/** Once per workflow and page: a change of tab and undo open it, too. Not beside a run. */
async function opened() {
  const name = openWorkflow();
  const empty = !(app.rootGraph ?? app.graph).nodes.length;
  if (empty || seen.has(name) || sending || isActive(report)) return;
  if (app.extensionManager.setting.get(SETTING.id) !== OPENED) return;
  seen.add(name);
  const queue = await (await api.fetchApi("/prompt")).json().catch(() => null);
  if (!queue?.exec_info?.queue_remaining) await start();
}

const button = {
  get icon() {
    return view().icon;
  },
  get label() {
    return view().label;
  },
  get tooltip() {
    return view().tooltip;
  },
  class: "qwen-vram-warm-up",
  onClick: press,
};

function view() {
  void pulse()?.attrs.count;
  return buttonOf(report, locale());
}

app.registerExtension({
  name: "QwenVRAM.WarmUp",
  settings: [
    { id: PULSE, name: "", type: "hidden", defaultValue: 0, attrs: { count: 0 } },
    SETTING,
  ],
  actionBarButtons: [button],
  commands: [{ id: COMMAND, label: "Warm up (silent) (Qwen VRAM)", icon: "pi pi-bolt", function: press }],
  menuCommands: [{ path: ["Extensions", "Qwen VRAM"], commands: [COMMAND] }],
  keybindings: [
    { commandId: COMMAND, combo: { alt: true, key: "w" } },
    { commandId: COMMAND, combo: { alt: true, key: "∑" } }, // what a Mac types for it
  ],
  setup: resume,
  afterConfigureGraph: () => void setTimeout(opened, AFTER_OPENING_MS),
});
