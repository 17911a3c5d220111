// How the memory panel looks. The variables are the frontend's: light and dark come with them.
export const STYLE = `
.qwen-vram-memory { padding: 0.75rem; display: flex; flex-direction: column; gap: 1rem;
  font-size: 0.8125rem; color: var(--base-foreground, var(--fg-color)); }
.qwen-vram-memory :is(h2, h3) { margin: 0; font-size: 0.875rem; font-weight: 600; }
.qwen-vram-memory h2 { font-size: 1rem; }
.qwen-vram-memory :is(.devices, .findings, .models, .device) { display: flex;
  flex-direction: column; gap: 0.5rem; }
.qwen-vram-memory .devices { gap: 1.25rem; }
.qwen-vram-memory .quiet, .qwen-vram-memory .said { font-weight: normal;
  color: var(--muted-foreground, var(--descrip-text)); }
.qwen-vram-memory :is(.said, .probed):empty { display: none; }
.qwen-vram-memory.stale .said { color: var(--base-foreground, var(--fg-color));
  border-left: 3px solid var(--destructive-background, #b3261e); padding-left: 0.5rem; }
.qwen-vram-memory.stale :is(.devices, .findings, .models) { opacity: 0.5; }
.qwen-vram-memory .bar { display: flex; height: 1.5rem; border-radius: 4px; overflow: hidden;
  background: var(--secondary-background, var(--comfy-input-bg));
  outline: 1px solid var(--border-subtle, var(--border-color)); }
.qwen-vram-memory .piece { height: 100%; flex: none;
  box-shadow: inset -1px 0 0 var(--comfy-menu-bg, #0008); }
.qwen-vram-memory .swatch { display: inline-block; width: 0.75rem; height: 0.75rem;
  margin-right: 0.5rem; border-radius: 2px; vertical-align: -0.05rem;
  outline: 1px solid var(--border-subtle, var(--border-color)); }
.qwen-vram-memory .free { background: transparent; }
.qwen-vram-memory .unexplained { background: repeating-linear-gradient(45deg,
  var(--muted-foreground, #888) 0 2px, transparent 2px 5px); }
.qwen-vram-memory table { width: 100%; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.qwen-vram-memory :is(th, td) { padding: 0.2rem 0 0.2rem 0.5rem; text-align: right;
  font-weight: normal; vertical-align: top; }
.qwen-vram-memory :is(th, td):first-child { text-align: left; overflow-wrap: anywhere; }
.qwen-vram-memory th:first-child:not(:has(> .swatch)) { padding-left: 0; }
.qwen-vram-memory td { white-space: nowrap; }
.qwen-vram-memory th:first-child:has(> .swatch) { padding-left: 1.25rem; text-indent: -1.25rem; }
.qwen-vram-memory th .quiet { text-indent: 0; }
.qwen-vram-memory .models :is(th, td) { padding-bottom: 0.4rem; }
.qwen-vram-memory thead th { color: var(--muted-foreground, var(--descrip-text)); }
.qwen-vram-memory ul { margin: 0; padding: 0; list-style: none; display: flex;
  flex-direction: column; gap: 0.5rem; }
.qwen-vram-memory details ul { margin-top: 0.4rem; padding-left: 1rem; list-style: disc; }
.qwen-vram-memory summary { cursor: pointer; color: var(--muted-foreground, var(--descrip-text)); }
.qwen-vram-memory li { overflow-wrap: anywhere; user-select: text; }
.qwen-vram-memory .finding { padding-left: 0.6rem;
  border-left: 3px solid var(--primary-background, #3b82f6); }
.qwen-vram-memory .finding.warning { border-color: #d97706; }
.qwen-vram-memory .finding.problem { border-color: var(--destructive-background, #b3261e); }
.qwen-vram-memory div.warning { color: var(--base-foreground, var(--fg-color));
  border-left: 3px solid #d97706; padding-left: 0.4rem; }
.qwen-vram-memory .actions { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.qwen-vram-memory button { padding: 0.35rem 0.7rem; border: 0; border-radius: 0.5rem;
  cursor: pointer; color: var(--base-foreground, var(--fg-color));
  background: var(--secondary-background, var(--comfy-input-bg)); }
.qwen-vram-memory button:hover { background: var(--secondary-background-hover, var(--border-color)); }
.qwen-vram-memory button[aria-disabled="true"] { opacity: 0.6; cursor: default; }
.qwen-vram-memory :is(button, summary):focus-visible { outline: 2px solid var(--primary-background, #3b82f6); }
.qwen-vram-memory .finding button { margin-top: 0.4rem; }
`;
