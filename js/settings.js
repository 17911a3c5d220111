// The settings of the prompt cache, its panel, and the command that removes every trace of it.
import { app } from "../../scripts/app.js";
import { removeEverything, renderPanel } from "./panel.js";
import { panelSetting, SETTINGS } from "./settings_core.js";

const REMOVE = "QwenVRAM.RemoveEverything";

/** For the menu; see menu.js. */
export const REMOVE_COMMANDS = [
  {
    id: REMOVE,
    label: "Remove everything, pins too (Qwen VRAM)",
    menubarLabel: "Remove everything, pins too",
    icon: "pi pi-trash",
    function: () => removeEverything(),
  },
];

app.registerExtension({
  name: "QwenVRAM.Settings",
  settings: [panelSetting(renderPanel), ...SETTINGS],
});
