// Words for children: the settings that nodes/settings.py reads, and the answers of Kind Words.
// Pure: no DOM, no app. Texts in other languages: locales/<language>/settings.json.
import { wordsOf } from "./text_core.js";

const GROUP = ["Qwen VRAM", "Words for children"];
const TITLE = { en: "Kind Words", zh: "友善词语" };

/** As the settings dialog wants them; it shows the highest sortOrder first. */
export const KIND_WORDS_SETTINGS = [
  {
    id: "QwenVRAM.KindWords.AlsoAvoid",
    name: "Also avoid",
    type: "text",
    defaultValue: "",
    tooltip:
      "Words and phrases, separated by commas, that Kind Words looks for beside its own list, in all " +
      "workflows.",
  },
  {
    id: "QwenVRAM.KindWords.AlwaysAllow",
    name: "Always allow",
    type: "text",
    defaultValue: "",
    tooltip:
      "Words and phrases, separated by commas, that are fine although the list of Kind Words has them. " +
      "What is also avoided stays avoided.",
  },
].map((setting, index) => ({ ...setting, category: [...GROUP, setting.id], sortOrder: 50 - index }));

/** What Kind Words answered in what a node showed: "" for nothing, null if it is another node. */
export function answerIn(output) {
  const shown = Array.isArray(output?.qwen_vram) ? output.qwen_vram : [];
  const answers = shown.map((item) => item?.answer).filter((answer) => typeof answer === "string");
  return answers.length ? (answers.find(Boolean) ?? "") : null;
}

/** What the message with an answer is called. */
export const titleOf = (locale) => wordsOf(TITLE, locale);
