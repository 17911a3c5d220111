// The settings of the memory allocator, as core/allocator.py reads them. Pure: no DOM, no app.
// Texts in other languages: locales/<language>/settings.json.

const GROUP = ["Qwen VRAM", "Memory allocator (CUDA)"];
const FIRST = 50;
const LEAVE = "leave as it is";
const choice = (...values) => [LEAVE, ...values].map((value) => ({ text: value, value }));

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
    id: "QwenVRAM.Allocator.MaxSplitSizeMB",
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
    tooltip: "native and Linux only. It was slower when we measured it (5.3 s instead of 3.6 to 3.8 s).",
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
