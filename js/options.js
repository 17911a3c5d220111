// The choices of this pack's nodes in the frontend's language. What is saved and sent stays as it
// is. Texts: locales/<language>/nodeDefs.json, `options` of an input, which ComfyUI itself ignores.
import { app } from "../../scripts/app.js";
import { definitionsIn, optionLabel } from "./options_core.js";
import { fetchJson } from "./requests.js";

const OURS = /^QwenVRAM/;
let definitions = {};

app.registerExtension({
  name: "QwenVRAM.Options",
  // Before nodes exist: HTML nodes ask for the labels once.
  async init() {
    const locale = app.extensionManager.setting.get("Comfy.Locale");
    definitions = definitionsIn(await fetchJson("/i18n"), locale);
  },
  nodeCreated(node) {
    const type = node.comfyClass ?? "";
    if (!OURS.test(type) || !definitions[type]) return;
    for (const widget of node.widgets ?? []) {
      if (widget.type !== "combo" || widget.options.getOptionLabel) continue;
      widget.options.getOptionLabel = (value) => optionLabel(definitions, type, widget.name, value);
    }
  },
});
