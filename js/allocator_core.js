// The settings of the memory allocator, as core/allocator.py reads them. Pure: no DOM, no app.
// Texts in other languages: locales/<language>/settings.json.
import { wordsOf } from "./text_core.js";

const GROUP = ["Qwen VRAM", "Memory allocator (CUDA)"];
const FIRST = 50;
const LEAVE = "leave as it is";
export const MAX_SPLIT = "QwenVRAM.Allocator.MaxSplitSizeMB";
const LEAST_SPLIT = 21; // as core/allocator.py takes it
const choice = (...values) => [LEAVE, ...values].map((value) => ({ text: value, value }));

const SPLIT_PROBLEMS = {
  en: (value) => `max_split_size_mb is ${value}, and has no effect: it must be 0 or at least ${LEAST_SPLIT}.`,
  zh: (value) => `max_split_size_mb 为 ${value}，不起作用：必须为 0 或至少 ${LEAST_SPLIT}。`,
};

/** What is wrong with a value that the dialog lets through; null for nothing. */
export function splitProblem(value, locale) {
  return value > 0 && value < LEAST_SPLIT ? wordsOf(SPLIT_PROBLEMS, locale)(value) : null;
}

/** As the settings dialog wants them; it shows the highest sortOrder first. */
export const ALLOCATOR_SETTINGS = [
  {
    id: "QwenVRAM.Allocator.Backend",
    name: "Allocator (after a restart)",
    type: "combo",
    options: choice("native", "cudaMallocAsync"),
    defaultValue: LEAVE,
    tooltip:
      "native is PyTorch's own, cudaMallocAsync is that of NVIDIA's driver and ComfyUI's usual " +
      "choice. What is set outside ComfyUI (PYTORCH_CUDA_ALLOC_CONF, PYTORCH_ALLOC_CONF, command " +
      "line) stays. Has no effect with --multi-user. The node Allocator Doctor says what is live.",
  },
  {
    id: MAX_SPLIT,
    name: "max_split_size_mb (after a restart)",
    type: "number",
    attrs: { min: 0, max: 1e6, maxFractionDigits: 0, showButtons: true },
    defaultValue: 0,
    tooltip:
      "MB, at least 21; 0 leaves it as it is. Blocks larger than this are not split. It is not a " +
      "minimum. native only. 128 changed nothing that we could measure.",
  },
  {
    id: "QwenVRAM.Allocator.ExpandableSegments",
    name: "expandable_segments (after a restart)",
    type: "combo",
    options: choice("on", "off"),
    defaultValue: LEAVE,
    tooltip: "native and Linux only. With dynamic VRAM it was slower on an H200.",
  },
  {
    id: "QwenVRAM.Allocator.GarbageCollectionThreshold",
    name: "garbage_collection_threshold (after a restart)",
    type: "number",
    attrs: { min: 0, max: 0.99, step: 0.05, maxFractionDigits: 2, showButtons: true },
    defaultValue: 0,
    tooltip:
      "Between 0 and 1; 0 leaves it as it is. native only, and only in a process with a memory " +
      "fraction, which ComfyUI does not set.",
  },
  {
    id: "QwenVRAM.Allocator.RoundupPower2Divisions",
    name: "roundup_power2_divisions (after a restart)",
    type: "text",
    defaultValue: "",
    tooltip:
      "A power of two from 1 to 64, or a list such as [256:1,512:2,>:8] with sizes in MB; empty " +
      "leaves it as it is. native only. Small numbers take more memory for each tensor.",
  },
].map((setting, index) => ({
  ...setting,
  category: [...GROUP, setting.id],
  sortOrder: FIRST - index,
}));
