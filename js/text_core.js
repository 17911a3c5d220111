// Words, sizes, times, and what a server's refusal says. Pure: no DOM, no app.

/** The words of the frontend's language, English where there is no translation. */
export function wordsOf(words, locale) {
  return words[locale] ?? words[String(locale).split("-")[0]] ?? words.en;
}

/** A size for people: decimal, as the server (core/units.py), ComfyUI's log and shops count. */
export function sizeText(bytes) {
  if (!Number.isFinite(bytes)) return "?";
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(2)} GB`;
  if (bytes >= 1e5) return `${(bytes / 1e6).toFixed(1)} MB`;
  return bytes >= 1e3 ? `${(bytes / 1e3).toFixed(1)} kB` : `${bytes} B`;
}

/** Seconds for people. */
export function secondsText(seconds) {
  if (seconds < 0.05) return seconds > 0 ? "< 0.1 s" : "0 s";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 119.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}
