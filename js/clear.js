// Frees memory on the server: a button beside Run, commands, and a key binding.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import {
  bodyOf, CLEAR_SETTING, clearWords, EVENT, failureOf, knownLevel, LIMIT_SECONDS, needsWorkflow, PATH, toastOf,
  unreadable,
} from "./clear_core.js";
import { request } from "./requests.js";
import { toast } from "./toast.js";

const LABELS = {
  cache: "Clear caches (Qwen VRAM)",
  models: "Unload all models from VRAM (Qwen VRAM)",
  needed: "Unload the models that this workflow does not need (Qwen VRAM)",
  everything: "Unload all models and forget node outputs (Qwen VRAM)",
};
const ICONS = { cache: "pi pi-eraser", models: "pi pi-eraser", needed: "pi pi-filter-slash", everything: "pi pi-trash" };
const idOf = (level) => `QwenVRAM.Clear.${level[0].toUpperCase()}${level.slice(1)}`;
const CHOSEN = "QwenVRAM.Clear";

const setting = (id) => app.extensionManager?.setting?.get(id);
const locale = () => setting("Comfy.Locale");
const chosenLevel = () => knownLevel(setting(CLEAR_SETTING.id));
const underWay = new Set(); // levels that the server was asked for

const tell = ({ severity, detail }) => toast(severity, detail, { summary: clearWords(locale()).title });

async function clear(level) {
  if (underWay.has(level)) return; // its answer will be shown
  underWay.add(level);
  try {
    const prompt = needsWorkflow(level) ? (await app.graphToPrompt()).output : undefined;
    tell(await ask(bodyOf(level, api.clientId, prompt)));
  } catch (error) {
    tell(unreadable(error, locale()));
  } finally {
    underWay.delete(level);
  }
}

/** The toast that tells what became of a request. */
async function ask(content) {
  try {
    const { status, text } = await request(PATH, { method: "POST", seconds: LIMIT_SECONDS, content });
    return toastOf(status, text, locale());
  } catch (error) {
    return failureOf(error, locale());
  }
}

/** For the bar beside Run; see action_bar.js. */
export function clearButton() {
  const words = clearWords(locale());
  const tooltip = words.tooltips[chosenLevel()];
  return { icon: "pi pi-eraser", label: words.button, tooltip, onClick: () => clear(chosenLevel()) };
}

/** For the menu; see menu.js. */
export const CLEAR_COMMANDS = [
  {
    id: CHOSEN,
    label: "Clear VRAM, as chosen in the settings (Qwen VRAM)",
    menubarLabel: "Clear VRAM, as chosen in the settings",
    icon: "pi pi-eraser",
    function: () => clear(chosenLevel()),
  },
  ...Object.entries(LABELS).map(([level, label]) => ({
    id: idOf(level),
    label,
    menubarLabel: label.replace(" (Qwen VRAM)", ""), // the submenu has the name
    icon: ICONS[level],
    function: () => clear(level),
  })),
];

app.registerExtension({
  name: "QwenVRAM.Clear",
  settings: [CLEAR_SETTING],
  // No letter that AltGr, or Option on a Mac, types into a text: it would be taken from there. A
  // target does not help, since the canvas holds the text fields of its nodes.
  keybindings: [{ commandId: CHOSEN, combo: { ctrl: true, alt: true, key: "m" } }],
  setup() {
    // What was to be done later is done.
    api.addEventListener(EVENT, ({ detail }) => tell(toastOf(200, JSON.stringify(detail), locale())));
  },
});
