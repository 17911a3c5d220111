// Memory, a tab of the sidebar: who holds what, refreshed while it is seen.
import { app } from "../../scripts/app.js";
import {
  blocksText, commandLabel, failureText, LIMIT_SECONDS, memoryWords, MOST_BYTES, parseReport, poller, probedText, viewOf,
} from "./memory_panel_core.js";
import { STYLE } from "./memory_panel_style.js";
import { refusalIn } from "./refusal_core.js";
import { request } from "./requests.js";

const TAB = "qwen-vram-memory";
const ROUTE = "/qwen_vram/report";
const PROBE_SECONDS = 60;
const CLEAR = "QwenVRAM.Clear.";

const clock = {
  setTimeout: (act, milliseconds) => window.setTimeout(act, milliseconds),
  clearTimeout: (timer) => window.clearTimeout(timer),
  now: () => performance.now(),
};
const locale = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

/** An element with properties, attributes and children; text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const { aria = {}, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

function styleOnce() {
  const id = "qwen-vram-memory-style";
  if (!document.getElementById(id)) document.head.append(make("style", { id, textContent: STYLE }));
}

// ---------------------------------------------------------------------------------------- asking
/** A report, or an Error whose message is for people. Ends after `seconds`, whatever comes. */
async function askReport(query, seconds, posted = {}) {
  const words = memoryWords(locale());
  try {
    const { ok, status, statusText, text, body } = await request(ROUTE + query, { seconds, most: MOST_BYTES, ...posted });
    if (!ok) throw new Error(refusalIn(body, locale()) ?? `${status} ${statusText}`);
    return parseReport(text);
  } catch (error) {
    throw new Error(failureText(error, seconds, words));
  }
}

// --------------------------------------------------------------------------------------- drawing
function swatch(row) {
  const dot = make("i", { className: `swatch ${row.colour ? "" : row.id}`, aria: { "aria-hidden": "true" } });
  if (row.colour) dot.style.background = row.colour;
  return dot;
}

function bar(device) {
  const pieces = device.rows.filter((row) => row.share > 0).map((row) => {
    const piece = swatch(row);
    piece.className = piece.className.replace("swatch", "piece");
    piece.style.width = `${row.share * 100}%`;
    piece.title = [row.label, row.size, row.detail].filter(Boolean).join(" · ");
    return piece;
  });
  return make("div", { className: "bar", aria: { role: "img", "aria-label": device.label } }, ...pieces);
}

function legendRow(row) {
  const detail = row.detail ? make("div", { className: "quiet", textContent: row.detail }) : "";
  const name = make("th", { scope: "row" }, swatch(row), row.label, detail);
  return make("tr", {}, name, make("td", { textContent: row.size }));
}

/** A list that can be folded; it stays as the user left it. */
function folded(key, summary, texts) {
  if (!texts.length) return "";
  const items = texts.map((each) => make("li", { textContent: each }));
  const head = make("summary", { textContent: summary });
  head.dataset.key = `fold ${key}`;
  return make("details", {}, head, make("ul", {}, ...items));
}

function drawDevice(device, words) {
  return make(
    "section", { className: "device", aria: { "aria-label": device.name } },
    make("h3", { textContent: device.name }),
    make("div", { className: "quiet", textContent: device.use }),
    bar(device),
    make("table", {}, make("tbody", {}, ...device.rows.map(legendRow))),
    ...device.notes.map((note) => make("div", { className: "quiet", textContent: note })),
    folded(device.key, words.notMeasurable(device.unknown.length), device.unknown),
  );
}

function drawModels(models, words) {
  const heading = make("h3", { textContent: words.models });
  if (!models.length) return [heading, make("div", { className: "quiet", textContent: words.noModels })];
  const head = [words.model, words.places].map((name) => make("th", { textContent: name, scope: "col" }));
  const rows = models.map((model) => make(
    "tr", {},
    make(
      "th", { scope: "row" }, model.name,
      make("div", { className: "quiet", textContent: model.notes }),
      model.duplicate && make("div", { className: "warning", textContent: model.duplicate }),
    ),
    make("td", {}, model.onDevice, model.inRam && make("div", { className: "quiet", textContent: model.inRam })),
  ));
  return [heading, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))];
}

function drawFindings(findings, panel, words) {
  const heading = make("h3", { textContent: words.findings });
  if (!findings.length) return [heading, make("div", { className: "quiet", textContent: words.noFindings })];
  const items = findings.map((finding) => make(
    "li", { className: `finding ${finding.severity}` },
    make("strong", { textContent: `${finding.heading}. ` }), finding.text,
    make("div", { textContent: [finding.action, finding.saves && `(${finding.saves})`].filter(Boolean).join(" ") }),
    finding.command && findCommand(finding.command) ? commandButton(findCommand(finding.command), panel, words) : "",
  ));
  return [heading, make("ul", {}, ...items)];
}

const commands = () => app.extensionManager.command.commands;
const findCommand = (id) => commands().find((command) => command.id.toLowerCase() === id.toLowerCase());

function commandButton(command, panel, words) {
  const onclick = async () => {
    await app.extensionManager.command.execute(command.id);
    panel.poll.soon();
  };
  return keyed(command.id, { textContent: commandLabel(command.id, command.label, words), title: command.label ?? "", onclick });
}

function keyed(key, properties) {
  const button = make("button", { type: "button", ...properties });
  button.dataset.key = key;
  return button;
}

const drawn = new WeakMap(); // place -> what it shows, as JSON

/** Fill a part of the panel if it changed; focus and folds stay where they were. */
function fill(place, view, draw) {
  const now = JSON.stringify(view);
  if (drawn.get(place) === now) return;
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const open = [...place.querySelectorAll("details[open] > summary")].map((each) => each.dataset.key);
  place.replaceChildren(...[draw()].flat());
  drawn.set(place, now);
  for (const each of place.querySelectorAll("[data-key]")) {
    if (open.includes(each.dataset.key)) each.parentElement.open = true;
    if (focused && each.dataset.key === focused) each.focus({ preventScroll: true });
  }
}

// ----------------------------------------------------------------------------------------- panel
function makePanel(place) {
  const words = memoryWords(locale());
  const parts = Object.fromEntries(["devices", "findings", "models", "buttons"].map((name) => [name, make("div", { className: name })]));
  const said = make("div", { className: "said", textContent: words.loading, aria: { role: "status" } });
  const state = make("div", { className: "quiet" });
  const probed = make("div", { className: "probed", aria: { role: "status" } });
  const head = make("header", {}, make("h2", { textContent: words.title }), state);
  const root = make(
    "div", { className: "qwen-vram-memory", aria: { role: "region", "aria-label": words.title } },
    head, said, parts.devices, parts.findings, parts.buttons, probed, parts.models,
  );
  place.replaceChildren(root);
  const panel = { root, words, parts, said, state, probed, shownAt: null, probing: false };
  panel.poll = poller({
    ask: () => askReport("", LIMIT_SECONDS),
    show: (report) => show(panel, report),
    fail: (error) => fail(panel, error),
    wanted: () => wanted(panel),
    clock,
  });
  return panel;
}

/** Another tab may take our place, even our element, without a call of destroy(). */
function wanted({ root, probing }) {
  if (app.extensionManager.sidebarTab.activeSidebarTabId !== TAB) root.remove();
  if (!root.isConnected) return "never";
  const seen = !document.hidden && root.getClientRects().length > 0;
  return seen && !probing ? "yes" : "later";
}

function say({ said }, text) {
  if (said.textContent !== text) said.textContent = text; // read aloud once, not each second
}

function show(panel, report) {
  const { words, parts } = panel;
  const view = viewOf(report, locale());
  const clears = commands().filter((command) => command.id.startsWith(CLEAR)).map((command) => command.id);
  panel.shownAt = new Date();
  panel.root.classList.remove("stale");
  panel.state.textContent = view.state;
  say(panel, "");
  fill(parts.devices, view.devices, () => view.devices.map((device) => drawDevice(device, words)));
  fill(parts.findings, view.findings, () => drawFindings(view.findings, panel, words));
  fill(parts.models, view.models, () => drawModels(view.models, words));
  fill(parts.buttons, [clears, panel.probing], () => buttons(panel, clears));
}

function fail(panel, error) {
  const { words, shownAt } = panel;
  panel.root.classList.add("stale");
  panel.state.textContent = ""; // whether something runs is not known
  const stale = shownAt ? words.stale(shownAt.toLocaleTimeString(locale())) : "";
  say(panel, `${words.noAnswer(error.message)} ${stale}`.trim());
}

function buttons(panel, clears) {
  const { words, probing } = panel;
  const probe = keyed("probe", {
    textContent: probing ? words.probing : words.probe, title: words.probeTitle,
    onclick: () => askOnce(panel, () => askReport("", PROBE_SECONDS, { method: "POST", content: {} }), probedText), // it allocates
  });
  const blocks = keyed("blocks", {
    textContent: words.blocks, title: words.blocksTitle,
    onclick: () => askOnce(panel, () => askReport("?fragments=true", PROBE_SECONDS), blocksText),
  });
  probe.ariaDisabled = blocks.ariaDisabled = String(probing); // a disabled button would lose the focus
  return make("div", { className: "actions", aria: { role: "group", "aria-label": words.actions } },
    probe, blocks, ...clears.map((id) => commandButton(findCommand(id), panel, words)));
}

/** What is asked on request only. The usual reports wait for it. */
async function askOnce(panel, ask, tell) {
  const { words, parts, probed } = panel;
  if (panel.probing) return;
  panel.probing = true;
  probed.textContent = "";
  fill(parts.buttons, "probing", () => buttons(panel, []));
  try {
    const report = await ask();
    panel.probing = false;
    show(panel, report);
    probed.textContent = tell(report, locale());
  } catch (error) {
    panel.probing = false;
    fill(parts.buttons, "failed", () => buttons(panel, []));
    probed.textContent = words.noAnswer(error.message);
  }
}

// -------------------------------------------------------------------------------------------- tab
let panel = null;

function close() {
  panel?.poll.stop();
  panel = null;
}

/** The frontend calls this again whenever it draws the tab. */
function render(place) {
  if (panel && place.contains(panel.root)) return;
  close();
  styleOnce();
  panel = makePanel(place);
  panel.poll.start();
}

app.registerExtension({
  name: "QwenVRAM.MemoryPanel",
  setup() {
    // Texts of locales/<language>/main.json.
    const [title, tooltip] = ["qwenVram.memory", "qwenVram.memoryTooltip"];
    app.extensionManager.registerSidebarTab({
      id: TAB, icon: "pi pi-microchip", title, tooltip, type: "custom", render, destroy: close,
    });
    document.addEventListener("visibilitychange", () => panel?.poll.soon());
  },
});
