// Keeps the status lines of this pack's nodes true when ComfyUI skips the nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { markOf, pinWords } from "./pins_core.js";
import { findNode, notRun, oursAmong } from "./status_core.js";

const locale = () => app.extensionManager.setting.get("Comfy.Locale");
const rootGraph = () => app.rootGraph ?? app.graph;
const isPinned = (id) => Boolean(markOf(findNode(rootGraph(), id) ?? {}, "pin"));

/** Show a line on a node of ours, as the server does. */
function show(nodeId, text) {
  api.dispatchCustomEvent("progress_text", { nodeId, text });
}

app.registerExtension({
  name: "QwenVRAM.Status",
  setup() {
    api.addEventListener("execution_cached", ({ detail }) => {
      for (const nodeId of oursAmong(rootGraph(), detail.nodes)) {
        show(nodeId, isPinned(nodeId) ? pinWords(locale()).line : notRun(locale()));
      }
    });
    // What was pinned runs under the node's id, and has no line of its own.
    api.addEventListener("executing", ({ detail: nodeId }) => {
      const ours = nodeId ? oursAmong(rootGraph(), [nodeId]) : [];
      for (const id of ours.filter(isPinned)) show(id, pinWords(locale()).line);
    });
  },
});
