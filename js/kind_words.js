// The settings of Kind Words, and its answers as a message: children do not look at nodes.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { answerIn, KIND_WORDS_SETTINGS, titleOf } from "./kind_words_core.js";
import { toast } from "./toast.js";

const answers = new Map(); // by execution id, of this page: ComfyUI does not repeat what it kept

function tell(nodeId) {
  const answer = answers.get(String(nodeId));
  const summary = titleOf(app.extensionManager.setting.get("Comfy.Locale"));
  if (answer) toast("info", answer, { summary });
}

app.registerExtension({
  name: "QwenVRAM.KindWords",
  settings: KIND_WORDS_SETTINGS,
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const answer = answerIn(detail?.output);
      if (answer === null) return;
      answers.set(String(detail.node), answer);
      tell(detail.node);
    });
    api.addEventListener("execution_cached", ({ detail }) => detail.nodes.forEach(tell));
  },
});
