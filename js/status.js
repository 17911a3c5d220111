// Keeps the status lines of this pack's nodes true when ComfyUI skips the nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { notRun, oursAmong } from "./status_core.js";

app.registerExtension({
  name: "QwenVRAM.Status",
  setup() {
    api.addEventListener("execution_cached", ({ detail }) => {
      const text = notRun(app.extensionManager.setting.get("Comfy.Locale"));
      for (const nodeId of oursAmong(app.rootGraph ?? app.graph, detail.nodes)) {
        api.dispatchCustomEvent("progress_text", { nodeId, text });
      }
    });
  },
});
