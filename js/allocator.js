// The settings of PyTorch's memory allocator; prestartup_script.py reads them at the next start.
import { app } from "../../scripts/app.js";
import { ALLOCATOR_SETTINGS, MAX_SPLIT, splitProblem } from "./allocator_core.js";

/** The dialog's field knows no gap between 0 and the least. */
function warn(value) {
  const { setting, toast } = app.extensionManager;
  const detail = splitProblem(value, setting.get("Comfy.Locale"));
  if (detail) toast.add({ severity: "warn", summary: "Qwen VRAM", detail, life: 10000 });
}

const settings = ALLOCATOR_SETTINGS.map((each) => (each.id === MAX_SPLIT ? { ...each, onChange: warn } : each));
app.registerExtension({ name: "QwenVRAM.Allocator", settings });
