// The settings of Kind Words, and its answers as a message: children do not look at nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { answerIn, KIND_WORDS_SETTINGS, titleOf } from "./kind_words_core.js";
import { toast } from "./toast.js";

app.registerExtension({
  name: "QwenVRAM.KindWords",
  settings: KIND_WORDS_SETTINGS,
  setup() {
    // ComfyUI sends this, too, at the end of a run for which it still had the answer, from a warm-up
    // perhaps: has_intermediate_output in nodes/kind_words.py.
    api.addEventListener("executed", ({ detail }) => {
      const answer = answerIn(detail?.output);
      const summary = titleOf(app.extensionManager.setting.get("Comfy.Locale"));
      if (answer) toast("info", answer, { summary });
    });
  },
});
