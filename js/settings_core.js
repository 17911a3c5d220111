// The settings of the prompt cache, as nodes/settings.py reads them. Pure: no DOM, no app.
// Texts in other languages: locales/<language>/settings.json.

const GROUP = ["Qwen VRAM", "Prompt cache"];
const FIRST = 100;
const number = (max, digits) => ({ min: 0, max, maxFractionDigits: digits, showButtons: true });

/** As the settings dialog wants them; it shows the highest sortOrder first. */
export const SETTINGS = [
  {
    id: "QwenVRAM.Conditioning.Keep",
    name: "Keep encoded prompts and pictures of",
    type: "combo",
    options: [
      { text: "all nodes", value: "all encode nodes" },
      { text: "Qwen VRAM only", value: "nodes of Qwen VRAM" },
      { text: "nothing", value: "nothing" },
    ],
    defaultValue: "all encode nodes",
    tooltip:
      "All nodes: also ComfyUI's own CLIP Text Encode, Text Encode Qwen Image Edit and " +
      "VAE Encode. Nothing: neither look up nor store; what is stored stays until you clear it.",
  },
  {
    id: "QwenVRAM.Conditioning.MemoryMB",
    name: "In memory at most (MB)",
    type: "number",
    attrs: number(1e6, 0),
    defaultValue: 256,
    tooltip: "What was not used for longest goes first; it stays on disk.",
  },
  {
    id: "QwenVRAM.Conditioning.DiskGB",
    name: "On disk at most (GB)",
    type: "number",
    attrs: number(1e6, 2),
    defaultValue: 2,
    tooltip: "What was not used for longest is deleted first. 0 keeps nothing on disk.",
  },
  {
    id: "QwenVRAM.Conditioning.MoreNodes",
    name: "Other encode nodes",
    type: "text",
    defaultValue: "",
    tooltip:
      "Class names of nodes of other packs, separated by commas. Only nodes that always give the " +
      "same for the same inputs and model files.",
  },
  {
    id: "QwenVRAM.Conditioning.RedisURL",
    name: "Share over Redis (URL)",
    type: "text",
    defaultValue: "",
    tooltip:
      "The address of a Redis server, such as redis://server:6379/0. All machines with the same " +
      "address share what one of them has encoded. Empty: not shared. Needs pip install redis. A " +
      "password in the address can be read in ComfyUI's settings file: put the address into the " +
      "environment variable QWEN_VRAM_REDIS_URL instead.",
  },
  {
    id: "QwenVRAM.Conditioning.RedisDays",
    name: "Keep in Redis for (days)",
    type: "number",
    attrs: { ...number(3650, 2), min: 0.01 },
    defaultValue: 30,
    tooltip:
      "How long a prompt stays in Redis after its last use. Counts only with a Redis address above.",
  },
  {
    id: "QwenVRAM.Conditioning.RedisGB",
    name: "In Redis at most (GB)",
    type: "number",
    attrs: number(1e6, 2),
    defaultValue: 1,
    tooltip:
      "About how much this pack may keep in Redis. What was not used for longest is deleted first. " +
      "Counts only with a Redis address above.",
  },
].map((setting, index) => ({
  ...setting,
  category: [...GROUP, setting.id],
  sortOrder: FIRST - 1 - index,
}));

/** The panel of figures and buttons, among the settings. */
export function panelSetting(render) {
  const id = "QwenVRAM.Conditioning.Panel";
  const category = ["Qwen VRAM", "What is stored", id];
  return { id, name: "", type: render, defaultValue: null, category, sortOrder: FIRST };
}
