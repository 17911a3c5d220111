// A run that keeps nothing: the server's queue_time reads the mark, and removes it from what is
// saved with the pictures.
import { app } from "../../scripts/app.js";
import { pinWords } from "./pins_core.js";

const COMMAND = "QwenVRAM.QueuePrivate";

async function queuePrivate() {
  if (app.processingQueue) {
    // This run would be sent later, by the one that is being queued: without the mark.
    const { busy } = pinWords(app.extensionManager.setting.get("Comfy.Locale"));
    app.extensionManager.toast.add({ severity: "warn", summary: "Qwen VRAM", detail: busy, life: 8000 });
    return;
  }
  const graph = app.rootGraph ?? app.graph;
  const before = graph.extra.qwen_vram;
  graph.extra.qwen_vram = { ...before, keep_nothing: true };
  try {
    await app.queuePrompt(0, 1);
  } finally {
    if (before === undefined) delete graph.extra.qwen_vram;
    else graph.extra.qwen_vram = before;
  }
}

app.registerExtension({
  name: "QwenVRAM.Private",
  commands: [
    {
      id: COMMAND,
      label: "Run without keeping anything (Qwen VRAM)",
      icon: "pi pi-eye-slash",
      function: queuePrivate,
    },
  ],
  menuCommands: [{ path: ["Extensions", "Qwen VRAM"], commands: [COMMAND] }],
});
