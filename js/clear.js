// Frees memory on the server: a button beside Run, commands, and a key binding.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import {
  bodyOf, CLEAR_SETTING, clearWords, EVENT, failureOf, knownLevel, LIMIT_MS, needsWorkflow, PATH, toastOf,
  unreadable,
} from "./clear_core.js";

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

function toast({ severity, detail }) {
  const life = { success: 15000, info: 8000, error: 20000 }[severity];
  app.extensionManager.toast.add({ severity, summary: clearWords(locale()).title, detail, life });
}

async function clear(level) {
  if (underWay.has(level)) return; // its answer will be shown
  underWay.add(level);
  try {
    const prompt = needsWorkflow(level) ? (await app.graphToPrompt()).output : undefined;
    toast(await ask(bodyOf(level, api.clientId, prompt)));
  } catch (error) {
    toast(unreadable(error, locale()));
  } finally {
    underWay.delete(level);
  }
}

/** The toast that tells what became of a request. */
async function ask(body) {
  const limit = new AbortController();
  const timer = setTimeout(() => limit.abort(), LIMIT_MS);
  try {
    const response = await api.fetchApi(PATH, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: limit.signal, // also while the body is read
    });
    return toastOf(response.status, await response.text(), locale());
  } catch (error) {
    return failureOf(error, locale());
  } finally {
    clearTimeout(timer);
  }
}

app.registerExtension({
  name: "QwenVRAM.Clear",
  settings: [CLEAR_SETTING],
  commands: [
    {
      id: CHOSEN,
      label: "Clear VRAM, as chosen in the settings (Qwen VRAM)",
      icon: "pi pi-eraser",
      function: () => clear(chosenLevel()),
    },
    ...Object.entries(LABELS).map(([level, label]) => ({
      id: idOf(level),
      label,
      icon: ICONS[level],
      function: () => clear(level),
    })),
  ],
  // On a Mac, and on a German keyboard, the two modifiers make another letter of M.
  keybindings: ["m", "µ"].map((key) => ({ combo: { ctrl: true, alt: true, key }, commandId: CHOSEN })),
  menuCommands: [
    { path: ["Extensions", "Qwen VRAM"], commands: [CHOSEN, ...Object.keys(LABELS).map(idOf)] },
  ],
  get actionBarButtons() {
    const words = clearWords(locale());
    const tooltip = words.tooltips[chosenLevel()];
    return [{ icon: "pi pi-eraser", label: words.button, tooltip, onClick: () => clear(chosenLevel()) }];
  },
  setup() {
    // What was to be done later is done.
    api.addEventListener(EVENT, ({ detail }) => toast(toastOf(200, JSON.stringify(detail), locale())));
  },
});
