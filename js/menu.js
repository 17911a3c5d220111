// The menu Extensions > Qwen VRAM: registered here alone, since ComfyUI loads extensions in any order
// and shows their entries so. Short, or it opens above a small window: the rest is one level deeper.
import { app } from "../../scripts/app.js";
import { CLEAR_COMMANDS } from "./clear.js";
import { MERGE_COMMANDS } from "./merge_loaders.js";
import { PIN_COMMANDS } from "./pins.js";
import { PREFILL_COMMANDS } from "./prefill.js";
import { PRIVATE_COMMANDS } from "./private.js";
import { REMOVE_COMMANDS } from "./settings.js";
import { WARM_UP_COMMANDS } from "./warmup.js";

const PACK = ["Extensions", "Qwen VRAM"];
const FIRST = [...WARM_UP_COMMANDS, ...PREFILL_COMMANDS, ...PRIVATE_COMMANDS, ...MERGE_COMMANDS];
const GROUPS = [
  [PACK, FIRST],
  [[...PACK, "Pin output"], PIN_COMMANDS],
  [[...PACK, "Clear VRAM"], CLEAR_COMMANDS],
  [PACK, REMOVE_COMMANDS], // behind a line, and last: it cannot be undone
];

app.registerExtension({
  name: "QwenVRAM.Menu",
  commands: GROUPS.flatMap(([, commands]) => commands),
  menuCommands: GROUPS.map(([path, commands]) => ({ path, commands: commands.map(({ id }) => id) })),
});
