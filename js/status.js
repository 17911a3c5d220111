// Keeps the status lines of this pack's nodes true when ComfyUI skips the nodes, and readable.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { markOf, pinWords } from "./pins_core.js";
import { findNode, isToldAgain, lineIn, notRun, oursAmong, toldLater } from "./status_core.js";

const locale = () => app.extensionManager.setting.get("Comfy.Locale");
const rootGraph = () => app.rootGraph ?? app.graph;
const isPinned = (id) => Boolean(markOf(findNode(rootGraph(), id) ?? {}, "pin"));

const LINE = "$$node-text-preview"; // the frontend's widget for it
const STYLED = "qwen-vram-status";
// The frontend breaks these lines anywhere, inside words too.
const STYLE = `.${STYLED} .break-all { word-break: normal; overflow-wrap: anywhere; }`;

/** Have the line of a node of ours wrap at spaces. */
function style({ detail: { nodeId } }) {
  const mark = () => {
    for (const id of oursAmong(rootGraph(), [nodeId])) {
      const widget = findNode(rootGraph(), id).widgets?.find(({ name }) => name === LINE);
      if (widget?.props) widget.props.class = STYLED; // Vue puts it on the element
    }
  };
  mark();
  queueMicrotask(mark); // the frontend may hear of the text after us, and make the widget then
}

/** Show a line on a node of ours, as the server does. */
function show(nodeId, text) {
  api.dispatchCustomEvent("progress_text", { nodeId, text });
}

function lineOfCached(nodeId) {
  if (isPinned(nodeId)) return pinWords(locale()).line;
  return isToldAgain(findNode(rootGraph(), nodeId)) ? toldLater(locale()) : notRun(locale());
}

app.registerExtension({
  name: "QwenVRAM.Status",
  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    api.addEventListener("progress_text", style);
    api.addEventListener("execution_cached", ({ detail }) => {
      for (const nodeId of oursAmong(rootGraph(), detail.nodes)) {
        show(nodeId, lineOfCached(nodeId));
      }
    });
    api.addEventListener("executed", ({ detail }) => {
      const [id] = oursAmong(rootGraph(), [detail.display_node ?? detail.node]);
      if (!id || !isToldAgain(findNode(rootGraph(), id))) return;
      show(id, lineIn(detail.output) ?? notRun(locale())); // none: what stop has kept from running
    });
    // What was pinned runs under the node's id, and has no line of its own.
    api.addEventListener("executing", ({ detail: nodeId }) => {
      const ours = nodeId ? oursAmong(rootGraph(), [nodeId]) : [];
      for (const id of ours.filter(isPinned)) show(id, pinWords(locale()).line);
    });
  },
});
