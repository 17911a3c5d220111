// A command that has ComfyUI encode a list of prompts from a file of the user's machine.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { annotated, clipOf, doneText, isList, prefillPrompt, prefillWords } from "./prefill_core.js";
import { rejection } from "./pins_core.js";
import { findNode } from "./status_core.js";
import { toast } from "./toast.js";

const COMMAND = "QwenVRAM.Prefill";
const FOLDER = "qwen_vram"; // in ComfyUI's temporary folder, which it empties when it starts
const waiting = new Set(); // prompt ids
const early = new Map(); // prompt id -> what came before the answer that names the prompt
let asking = 0; // requests without an answer yet

const locale = () => app.extensionManager.setting.get("Comfy.Locale");
const words = () => prefillWords(locale());

/** What failed stays until it is closed: the list may have run for hours. */
function tell(severity, detail) {
  toast(severity, detail, { summary: words().title, ...(severity === "error" && { life: null }) });
}

function pickFile() {
  return new Promise((resolve) => {
    const input = document.createElement("input");
    Object.assign(input, { type: "file", accept: ".txt,.csv,.tsv" });
    input.addEventListener("change", () => resolve(input.files[0] ?? null));
    input.addEventListener("cancel", () => resolve(null));
    input.click();
  });
}

/** Execution ids of the selected nodes, also of those in a sub-graph. */
function selectedIds(output) {
  const selected = new Set(Object.values(app.canvas.selected_nodes ?? {}));
  const root = app.rootGraph ?? app.graph;
  return Object.keys(output).filter((id) => selected.has(findNode(root, id)));
}

/** How the node is to name the file. Raises Error. */
async function upload(file) {
  const body = new FormData();
  body.append("image", file, file.name); // the field that ComfyUI's upload route reads
  body.append("type", "temp");
  body.append("subfolder", FOLDER);
  const response = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`.trim());
  return annotated(await response.json());
}

/** Tell the result of a list that this page sent; other runs end here, too. */
function finished(promptId, ...result) {
  if (waiting.delete(promptId)) tell(...result);
  else if (asking) early.set(promptId, result);
}

async function prefill() {
  const { output, workflow } = await app.graphToPrompt();
  const { link, problem } = clipOf(output, selectedIds(output));
  if (problem) return tell("warn", words()[problem]);
  const file = await pickFile();
  if (!file) return;
  if (!isList(file.name)) return tell("error", words().notAList(file.name));
  let name;
  try {
    name = await upload(file);
  } catch (error) {
    return tell("error", words().upload(file.name, error.message));
  }
  await queue(prefillPrompt(output, link, name), workflow, file.name);
}

async function queue({ id, output }, workflow, fileName) {
  asking += 1;
  try {
    const options = { partialExecutionTargets: [id] };
    const { prompt_id: promptId } = await api.queuePrompt(0, { output, workflow }, options);
    tell("info", words().sent(fileName));
    waiting.add(promptId);
    if (early.has(promptId)) finished(promptId, ...early.get(promptId));
  } catch (error) {
    tell("error", words().refused(rejection(error.response, error.message)));
  } finally {
    asking -= 1;
    if (!asking) early.clear();
  }
}

/** For the menu; see menu.js. */
export const PREFILL_COMMANDS = [
  {
    id: COMMAND,
    label: "Encode a list of prompts (Qwen VRAM)",
    menubarLabel: "Encode a list of prompts",
    icon: "pi pi-list-check",
    function: prefill,
  },
];

app.registerExtension({
  name: "QwenVRAM.Prefill",
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const facts = detail.output?.qwen_vram?.[0];
      if (facts?.not_stored !== undefined) finished(detail.prompt_id, "success", doneText(facts, locale()));
    });
    api.addEventListener("execution_error", ({ detail }) => {
      finished(detail.prompt_id, "error", detail.exception_message);
    });
    api.addEventListener("execution_interrupted", ({ detail }) => {
      finished(detail.prompt_id, "warn", words().stopped);
    });
  },
});
