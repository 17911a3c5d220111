// How the pack asks ComfyUI's server: never without an end.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { jsonOf, refusalIn } from "./refusal_core.js";

const SECONDS = 30;

/**
 * {status, statusText, ok, text, body}; `body` is null where the text is no JSON. `content` is sent
 * as JSON. Throws an Error named TimeoutError when the whole answer is not there after `seconds`,
 * RangeError when it has more than `most` letters, TypeError, as fetch does, when nobody answers.
 */
export async function request(path, { seconds = SECONDS, most = Infinity, content, ...options } = {}) {
  const limit = new AbortController();
  const late = new DOMException(`no answer within ${seconds} seconds`, "TimeoutError");
  const timer = setTimeout(() => limit.abort(late), seconds * 1000);
  if (content !== undefined)
    Object.assign(options, { body: JSON.stringify(content), headers: { "Content-Type": "application/json" } });
  try {
    const response = await api.fetchApi(path, { cache: "no-store", ...options, signal: limit.signal });
    const text = await readText(response, most);
    const { status, statusText, ok } = response;
    return { status, statusText, ok, text, body: jsonOf(text) };
  } catch (error) {
    throw limit.signal.aborted ? late : error;
  } finally {
    clearTimeout(timer);
  }
}

/** An answer's text; reading stops where it is too large. */
async function readText(response, most) {
  const reader = (response.body ?? new Blob().stream()).getReader(); // some answers have no body
  const decoder = new TextDecoder();
  let read = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return read + decoder.decode();
    read += decoder.decode(value, { stream: true });
    if (read.length <= most) continue;
    await reader.cancel();
    throw new RangeError(`more than ${most} letters`);
  }
}

/** The JSON of an answer. Throws an Error with the server's sentence where it refused. */
export async function fetchJson(path, options) {
  const { status, statusText, ok, body } = await request(path, options);
  const refusal = refusalIn(body, app.extensionManager.setting.get("Comfy.Locale"));
  if (!ok) throw new Error(refusal ?? `${status} ${statusText}`.trim());
  if (body === null) throw new Error(`${path}: no JSON`);
  return body;
}
