// The pack's messages in a corner of the editor.
import { app } from "../../scripts/app.js";

const LIFE = { success: 15000, info: 10000, warn: 20000, error: 20000 }; // milliseconds

/** Show a message; with `life` null it stays until it is closed. */
export function toast(severity, detail, { summary = "Qwen VRAM", life = LIFE[severity] } = {}) {
  app.extensionManager.toast.add({ severity, summary, detail, life });
}
