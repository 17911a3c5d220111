// The panel in the settings dialog: what the prompt cache holds and saved, and its removal.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { daysOf, panelWords, pinRows, placeRows, question, removedText, savedRows } from "./panel_core.js";
import { pinUsers } from "./pins_core.js";
import { fetchJson, request } from "./requests.js";
import { toast } from "./toast.js";

const ROUTE = "/qwen_vram/conditioning";
const PINS_ROUTE = "/qwen_vram/pins";
const DEFAULT_DAYS = 30;
const REMOVAL_SECONDS = 120; // thousands of files, or Redis

const STYLE = `
.form-label:has(+ .form-input .qwen-vram-panel) { display: none; }
.form-input:has(.qwen-vram-panel), .form-input > :has(> .qwen-vram-panel) { width: 100%; }
.qwen-vram-panel { width: 100%; display: flex; flex-direction: column; gap: 1.1rem;
  font-size: 0.875rem; color: var(--base-foreground, var(--fg-color)); }
.qwen-vram-panel table { width: 100%; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.qwen-vram-panel th { font-weight: normal; color: var(--muted-foreground, var(--descrip-text)); }
.qwen-vram-panel th, .qwen-vram-panel td { padding: 0.4rem 0.5rem; text-align: right;
  border-bottom: 1px solid var(--border-subtle, var(--border-color)); }
.qwen-vram-panel :is(th, td):first-child { text-align: left; padding-left: 0; width: 34%; }
.qwen-vram-panel :is(th, td):last-child { padding-right: 0; }
.qwen-vram-panel td.note, .qwen-vram-panel .path { color: var(--muted-foreground, var(--descrip-text)); }
.qwen-vram-panel .path { overflow-wrap: anywhere; font-size: 0.8125rem; user-select: text; }
.qwen-vram-panel .bar { height: 3px; margin-top: 0.3rem; border-radius: 2px; overflow: hidden;
  background: var(--secondary-background, var(--comfy-input-bg)); }
.qwen-vram-panel .bar > i { display: block; height: 100%; min-width: 1px;
  background: var(--primary-background, #3b82f6); }
.qwen-vram-panel .actions { display: flex; flex-wrap: wrap; gap: 0.6rem 1.2rem; align-items: center; }
.qwen-vram-panel .group { display: inline-flex; gap: 0.5rem; align-items: center; }
.qwen-vram-panel button { padding: 0.4rem 0.8rem; border-radius: 0.5rem; border: 0; cursor: pointer;
  color: var(--base-foreground, var(--fg-color));
  background: var(--secondary-background, var(--comfy-input-bg)); }
.qwen-vram-panel button:hover { background: var(--secondary-background-hover, var(--border-color)); }
.qwen-vram-panel button:focus-visible { outline: 2px solid var(--primary-background, #3b82f6); }
.qwen-vram-panel button.danger { margin-left: auto; color: #fff; background: var(--destructive-background, #b3261e); }
.qwen-vram-panel button.danger:hover { background: var(--destructive-background-hover, #8c1d18); }
.qwen-vram-panel input { width: 4.5rem; padding: 0.35rem 0.5rem; border-radius: 0.5rem;
  text-align: right; color: var(--base-foreground, var(--input-text));
  background: var(--secondary-background, var(--comfy-input-bg));
  border: 1px solid var(--border-subtle, var(--border-color)); }
.qwen-vram-panel .said { min-height: 1.25rem; color: var(--muted-foreground, var(--descrip-text)); }
`;

const locale = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

/** An element with properties and children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function styleOnce() {
  const id = "qwen-vram-panel-style";
  if (!document.getElementById(id)) document.head.append(make("style", { id, textContent: STYLE }));
}

/** The list of pins, or null where there is no such route. */
async function fetchPins() {
  const { ok, body } = await request(PINS_ROUTE);
  return ok ? body : null;
}

function table(head, rows) {
  const header = make("tr", {}, ...head.map((text) => make("th", { textContent: text, scope: "col" })));
  return make("table", {}, make("thead", {}, header), make("tbody", {}, ...rows));
}

const cell = (text) => make("td", { textContent: text });

function placeRow(row) {
  const name = cell(row.name);
  if (row.note) return make("tr", {}, name, make("td", { textContent: row.note, colSpan: 3, className: "note" }));
  const bar = make("i");
  bar.style.width = `${row.full * 100}%`;
  name.append(make("div", { className: "bar" }, bar));
  return make("tr", {}, name, cell(row.entries), cell(row.size), cell(row.bound));
}

/** Ask, remove, say what was removed, show the new figures. */
async function removeAfterAsking(panel, { kind, title, path, days }) {
  const message = question(kind, days, panel.report, locale());
  const type = "delete";
  if (!(await app.extensionManager.dialog.confirm({ title, message, type }))) return;
  try {
    panel.say(removedText(await fetchJson(path, { method: "DELETE", seconds: REMOVAL_SECONDS }), locale()));
  } catch (error) {
    panel.say(error.message);
  }
  api.dispatchCustomEvent("qwen_vram.pins_changed"); // nodes that lost theirs show it
  await panel.refresh();
}

/** A panel that is not shown, for the menu command: it knows the report, and tells by toasts. */
async function unseenPanel() {
  const report = await fetchJson(ROUTE).catch(() => null);
  return { report, say: (text) => toast("info", text), refresh: async () => {} };
}

/** Remove every trace; also a command of its own. */
export async function removeEverything(shown = null) {
  const panel = shown ?? (await unseenPanel());
  const title = panelWords(locale()).everything;
  await removeAfterAsking(panel, { kind: "everything", title, path: `${ROUTE}?everything=true` });
}

function buttons(panel, words) {
  const days = make("input", { type: "text", inputMode: "decimal", value: DEFAULT_DAYS, ariaLabel: words.days });
  const clearUnused = () => {
    const wanted = daysOf(days.value);
    if (wanted === null) return panel.say(words.badDays);
    const path = `${ROUTE}?unused_days=${wanted}`;
    const title = `${words.clearUnused} ${wanted} ${words.days}`;
    return removeAfterAsking(panel, { kind: "unused", title, path, days: wanted });
  };
  const clearAll = () => removeAfterAsking(panel, { kind: "all", title: words.clearAll, path: ROUTE });
  const button = (textContent, onclick, className = "") => make("button", { textContent, onclick, className });
  return make(
    "div",
    { className: "actions" },
    button(words.clearAll, clearAll),
    make("span", { className: "group" }, button(words.clearUnused, clearUnused), days, words.days),
    button(words.refresh, () => panel.refresh()),
    button(words.everything, () => removeEverything(panel), "danger"),
  );
}

function pinTable(panel, pins, words) {
  if (pins === null) return make("div", { className: "path", textContent: words.noPinsRoute });
  const users = pinUsers(app.rootGraph ?? app.graph);
  const rows = pinRows(pins, users, locale()).map((row) => {
    const path = `${PINS_ROUTE}/${row.content}`;
    const onclick = () => removeAfterAsking(panel, { kind: "pin", title: words.unpin, path });
    const last = make("td", {}, make("button", { textContent: words.unpin, onclick }));
    return make("tr", {}, cell(row.name), cell(row.here), cell(row.size), cell(row.used), last);
  });
  const empty = make("td", { textContent: words.noPins, colSpan: 5, className: "note" });
  return table([words.pins, words.usedHere, words.size, words.lastUsed, ""], rows.length ? rows : [make("tr", {}, empty)]);
}

function figures(panel, report, pins, words) {
  const saved = savedRows(report, locale()).map((row) =>
    make("tr", {}, cell(row.name), cell(row.hits), cell(row.misses), cell(row.saved)),
  );
  return [
    table([words.place, words.entries, words.size, words.bound], placeRows(report, locale()).map(placeRow)),
    make("div", { className: "path", textContent: words.folder(report.folder) }),
    table([words.time, words.hits, words.misses, words.saved], saved),
    make("div", { className: "path", textContent: words.counted }),
    pinTable(panel, pins, words),
  ];
}

/** The element that the settings dialog shows; it fetches its figures when it is made. */
export function renderPanel() {
  styleOnce();
  const words = panelWords(locale());
  const shown = make("div", { style: "display: contents" });
  const said = make("div", { className: "said" });
  said.setAttribute("role", "status");
  const panel = {
    report: null,
    say: (text) => (said.textContent = text),
    async refresh() {
      try {
        const [report, pins] = await Promise.all([fetchJson(ROUTE), fetchPins()]);
        panel.report = report;
        shown.replaceChildren(...figures(panel, report, pins, words));
      } catch {
        panel.say(words.unreachable);
      }
    },
  };
  panel.refresh();
  return make("div", { className: "qwen-vram-panel" }, shown, buttons(panel, words), said);
}
