// The choices of this pack's nodes, and the names in its text fields, in the frontend's language.
// What is saved and sent stays as it is. Texts: locales/<language>/nodeDefs.json; its `options` of
// an input are ours, and ComfyUI ignores them.
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
      // An empty text field says its name: that of the input, which no user knows.
      if (widget.label && widget.element?.placeholder === widget.name) widget.element.placeholder = widget.label;
      if (widget.type !== "combo" || widget.options.getOptionLabel) continue;
      widget.options.getOptionLabel = (value) => optionLabel(definitions, type, widget.name, value);
    }
  },
});
