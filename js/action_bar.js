// The buttons beside Run, always in this order: ComfyUI loads extensions in any, and shows them so.
import { app } from "../../scripts/app.js";
import { clearButton } from "./clear.js";
import { warmUpButton } from "./warmup.js";

app.registerExtension({
  name: "QwenVRAM.ActionBar",
  get actionBarButtons() {
    return [warmUpButton, clearButton()];
  },
});
