// A button, a command and a key that run the open workflow once without leaving a trace.
import { app } from "../../scripts/app.js";
import { refusalIn } from "./refusal_core.js";
import { request } from "./requests.js";
import { toast } from "./toast.js";
import {
  acceptedText,
  buttonOf,
  endOf,
  isActive,
  isSending,
  OPENED,
  reportOf,
  SENDING,
  SETTING,
  warmUpRequest,
  warmUpWords,
} from "./warmup_core.js";

const ROUTE = "/qwen_vram/warmup";
const COMMAND = "QwenVRAM.WarmUp";
const PULSE = "QwenVRAM.WarmUp.Pulse";
const REMEMBERED = "QwenVRAM.WarmUp"; // in this tab's storage: the warm-up that it started
const EVERY_MS = 400;
const ANSWER_SECONDS = 8;
const ACCEPT_SECONDS = 60; // nodes check their files when a prompt is sent
const MOST_SILENCES = 5;
const AFTER_OPENING_MS = 1000; // other extensions fill in widgets meanwhile
const seen = new Set(); // workflows that were warmed up when they were opened
let report = null; // of the warm-up that this page has started; SENDING until it is accepted

const locale = () => app.extensionManager.setting.get("Comfy.Locale");
const words = () => warmUpWords(locale());

/** Vue draws the button again when something reactive changed that its properties have read. */
const pulse = () => app.extensionManager.setting.settings[PULSE];

function show(now) {
  report = now;
  if (isActive(now)) sessionStorage.setItem(REMEMBERED, now.id);
  else if (!isSending(now)) sessionStorage.removeItem(REMEMBERED);
  pulse().attrs.count++;
}

const tell = (severity, detail) => toast(severity, detail, { summary: words().title });

/** A press: start, or cancel what this page started. */
async function press() {
  if (isSending(report)) return show({ ...SENDING, cancelling: true }); // start() sees to it
  return isActive(report) ? cancel(report.id) : start();
}

/** Cancel the warm-up of this page: another one may have taken its place meanwhile. */
async function cancel(id) {
  const path = `${ROUTE}?id=${encodeURIComponent(id)}`;
  try {
    const { ok, body } = await request(path, { method: "DELETE", seconds: ANSWER_SECONDS });
    if (!ok || typeof body?.cancelled !== "boolean")
      return tell("warn", words().notCancelled(refusalIn(body, locale()) ?? words().broken));
    // False: it has ended by itself, which follow() tells.
    if (body.cancelled && report?.id === id && isActive(report)) show({ ...report, cancelling: true });
  } catch {
    tell("error", words().notCancelled(words().unreachable));
  }
}

async function start() {
  show(SENDING);
  let accepted = null;
  try {
    const content = warmUpRequest(await app.graphToPrompt());
    const { status, body } = await request(ROUTE, { method: "POST", seconds: ACCEPT_SECONDS, content });
    const refusal = refusalIn(body, locale());
    accepted = status === 200 ? reportOf(body) : null;
    if (!accepted) tell(...(refusal ? ["warn", words().refused(refusal)] : ["error", words().broken]));
  } catch (error) {
    tell("error", error.name === "TimeoutError" ? words().unreachable : words().refused(error.message));
  }
  const unwanted = report.cancelling;
  show(accepted);
  if (!accepted) return;
  follow(accepted.id);
  if (unwanted) return cancel(accepted.id);
  const text = acceptedText(accepted, locale());
  if (text) tell("info", text);
}

const pause = () => new Promise((resolve) => setTimeout(resolve, EVERY_MS));

/** Ask until it has ended, and say once what came of it. */
async function follow(id) {
  let silences = 0;
  while (isActive(report)) {
    await pause();
    let body;
    try {
      ({ body } = await request(ROUTE, { seconds: ANSWER_SECONDS }));
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
  finish(severity, detail);
}

function finish(severity, detail) {
  show(null);
  tell(severity, detail);
}

/** After a reload of the page: go on showing what it had started. */
async function resume() {
  const id = sessionStorage.getItem(REMEMBERED);
  if (!id) return;
  const { body } = await request(ROUTE, { seconds: ANSWER_SECONDS }).catch(() => ({}));
  if (report) return; // a press was faster
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
  if (empty || seen.has(name) || report) return;
  if (app.extensionManager.setting.get(SETTING.id) !== OPENED) return;
  seen.add(name);
  const { body } = await request("/prompt", { seconds: ANSWER_SECONDS }).catch(() => ({}));
  const waiting = body?.exec_info?.queue_remaining;
  if (!Number.isInteger(waiting)) tell("warn", words().notStarted);
  else if (!waiting && !report) await start();
}

/** For the bar beside Run; see action_bar.js. */
export const warmUpButton = {
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

/** For the menu; see menu.js. */
export const WARM_UP_COMMANDS = [
  {
    id: COMMAND,
    label: "Warm up (silent) (Qwen VRAM)",
    menubarLabel: "Warm up (silent)",
    icon: "pi pi-bolt",
    function: press,
  },
];

app.registerExtension({
  name: "QwenVRAM.WarmUp",
  settings: [
    { id: PULSE, name: "", type: "hidden", defaultValue: 0, attrs: { count: 0 } },
    SETTING,
  ],
  keybindings: [
    { commandId: COMMAND, combo: { alt: true, key: "w" } }, // no letter of a text: see clear.js
  ],
  setup: resume,
  afterConfigureGraph: () => void setTimeout(opened, AFTER_OPENING_MS),
});
