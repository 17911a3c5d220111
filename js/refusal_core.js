// What a refusal of the pack's routes says: {error: English sentence, code}. Pure: no DOM, no app.
import { wordsOf } from "./text_core.js";

const MOST_LETTERS = 500;

/** Sentences that are always the same; another one names what is wrong, and is shown as it came. */
const KNOWN = {
  en: {},
  zh: {
    other_origin:
      "请求来自其他来源的页面，只有 ComfyUI 自己的页面可以发送。如果 ComfyUI 前面有代理，请让它保留带端口的 Host 请求头。",
    busy: "已有一次预热正在等待或运行。请等它结束，或先取消它。",
    another: "现在等待或运行的是另一次预热，没有动它；你的那次已经结束。",
    empty_prompt: "工作流里没有节点。",
    nothing_to_warm: "此工作流没有可预热的内容：没有一个输出节点需要模型、编码器、采样器或 VAE。",
    lost: "另一个客户端占用了它的位置，结果如何无法知道。",
    not_followed: "有一条关于它的消息无法读懂，结果如何无法知道。请查看 ComfyUI 的日志。",
  },
};

/** A body as JSON; null where it is none. */
export function jsonOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // another's page
  }
}

/** The sentence of a refusal in the frontend's language; null where the body has none. */
export function refusalIn(body, locale) {
  if (typeof body?.error !== "string") return null;
  const known = wordsOf(KNOWN, locale);
  return Object.hasOwn(known, body.code) ? known[body.code] : body.error.slice(0, MOST_LETTERS);
}
