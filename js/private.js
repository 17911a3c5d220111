// A run that keeps nothing: the server's queue_time reads the mark, and removes it from what is
// saved with the pictures.
import { app } from "../../scripts/app.js";
import { pinWords, withoutRunMark } from "./pins_core.js";
import { toast } from "./toast.js";

const COMMAND = "QwenVRAM.QueuePrivate";

async function queuePrivate() {
  if (app.processingQueue) {
    // This run would be sent later, by the one that is being queued: without the mark.
    return toast("warn", words().busy);
  }
  const graph = rootGraph();
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  graph.extra.qwen_vram = { ...graph.extra.qwen_vram, keep_nothing: true };
  try {
    if (await app.queuePrompt(0, 1)) toast("info", words().privateRun);
  } finally {
    forget(graph); // another one by now, if another tab was opened meanwhile
    // The frontend notes the graph when a request is queued, for undo and for the tab.
    const noted = [tracker?.activeState, ...(tracker?.undoQueue ?? [])];
    noted.filter(Boolean).forEach(forget);
    app.extensionManager.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.();
  }
}

const words = () => pinWords(app.extensionManager.setting.get("Comfy.Locale"));

const rootGraph = () => app.rootGraph ?? app.graph;

/** Take the mark of the run out of a graph, or out of one as it is saved. */
function forget(graph) {
  if (graph.extra) graph.extra = withoutRunMark(graph.extra);
}

/** For the menu; see menu.js. */
export const PRIVATE_COMMANDS = [
  {
    id: COMMAND,
    label: "Run without keeping anything (Qwen VRAM)",
    menubarLabel: "Run without keeping anything",
    icon: "pi pi-eye-slash",
    function: queuePrivate,
  },
];

app.registerExtension({
  name: "QwenVRAM.Private",
  // A page that was closed during such a run may have kept the mark in its draft.
  afterConfigureGraph: () => forget(rootGraph()),
});
