// The settings of PyTorch's memory allocator; prestartup_script.py reads them at the next start.
import { app } from "../../scripts/app.js";
import { ALLOCATOR_SETTINGS, MAX_SPLIT, splitProblem } from "./allocator_core.js";
import { toast } from "./toast.js";

/** The dialog's field knows no gap between 0 and the least. */
function warn(value) {
  const detail = splitProblem(value, app.extensionManager.setting.get("Comfy.Locale"));
  if (detail) toast("warn", detail);
}

const settings = ALLOCATOR_SETTINGS.map((each) => (each.id === MAX_SPLIT ? { ...each, onChange: warn } : each));
app.registerExtension({ name: "QwenVRAM.Allocator", settings });
