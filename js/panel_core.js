// The words and figures of the prompt cache panel. Pure: no DOM, no app.
import { secondsText, sizeText, wordsOf } from "./text_core.js";

const WORDS = {
  en: {
    memory: "In memory", disk: "On disk", redis: "In Redis", now: "Since ComfyUI started",
    total: "In total", pins: "Pinned outputs", folder: (path) => `Folder: ${path}`,
    place: "Place", entries: "Entries", size: "Size", bound: "At most",
    time: "Period", hits: "Hits", misses: "Misses", saved: "Saved",
    redisOff: "off: no URL is set", redisAway: "does not answer; ComfyUI's log says why",
    unknown: "not measurable",
    clearAll: "Clear prompt cache", clearUnused: "Clear what was unused for", days: "days",
    everything: "Remove everything, pins too", refresh: "Refresh", unpin: "Delete", noPins: "none",
    usedHere: "Used in this workflow", notHere: "no", lastUsed: "Last used",
    totals: "the totals", lists: (count) => (count === 1 ? "1 list of prompts" : `${count} lists of prompts`),
    warmUp: "the workflow for the warm-up at start",
    noPinsRoute: "Pinned outputs cannot be listed: this ComfyUI has no pins.",
    unreachable: "ComfyUI does not answer. Start it, then press Refresh.",
    badDays: "Days must be a number from 0 to 36500.",
    nothing: "Nothing was there to remove.",
    removed: (parts) => `Removed: ${parts}.`, failed: (names) => ` Could not be removed: ${names}.`,
    held: (place, entries, size) => `${place}: ${entries} (${size})`, listed: ", ",
    redisLeft: "Redis does not answer: what it holds is still there. Remove again when it answers.",
    counted: "Hits also count nodes that ComfyUI asked for without running what follows them.",
    shared: "Redis and a shared folder are cleared for all machines that use them.",
    ask: {
      all: "Remove all stored prompts and pictures? They are encoded again when they are needed.",
      unused: "Remove what was not used for {days} days? It is encoded again when it is needed.",
      everything: "Remove all stored prompts and pictures, the totals, all pinned outputs, all lists of " +
        "prompts that were sent for a prefill and the workflow that is kept for the warm-up at start? Workflows with pinned outputs will ask " +
        "to unpin them. Pictures that ComfyUI saved keep their prompts.",
      pin: "Delete this pinned output? Workflows that use it will ask to unpin it.",
    },
    pin: (count) => (count === 1 ? "1 pinned output" : `${count} pinned outputs`),
  },
  zh: {
    memory: "内存", disk: "磁盘", redis: "Redis", now: "本次启动以来",
    total: "累计", pins: "固定的输出", folder: (path) => `文件夹：${path}`,
    place: "位置", entries: "条目", size: "大小", bound: "上限",
    time: "时段", hits: "命中", misses: "未命中", saved: "节省",
    redisOff: "关闭：没有设置地址", redisAway: "没有应答，原因见 ComfyUI 的日志",
    unknown: "无法测量",
    clearAll: "清除提示词缓存", clearUnused: "清除未使用超过", days: "天的条目",
    everything: "全部删除，包括固定的输出", refresh: "刷新", unpin: "删除", noPins: "无",
    usedHere: "用于当前工作流", notHere: "否", lastUsed: "上次使用",
    totals: "累计数字", lists: (count) => `${count} 份提示词列表`,
    warmUp: "启动时预热用的工作流",
    noPinsRoute: "无法列出固定的输出：此 ComfyUI 没有该功能。",
    unreachable: "ComfyUI 没有应答。请启动它，然后按“刷新”。",
    badDays: "天数必须是 0 到 36500 之间的数。",
    nothing: "没有可删除的内容。",
    removed: (parts) => `已删除：${parts}。`, failed: (names) => `无法删除：${names}。`,
    held: (place, entries, size) => `${place}：${entries}（${size}）`, listed: "、",
    redisLeft: "Redis 没有应答：其中的内容仍然存在。请在它恢复后再清除一次。",
    counted: "命中次数也包括 ComfyUI 查询过、但其后续节点没有运行的节点。",
    shared: "Redis 和共享文件夹中的内容对所有使用它们的机器都会清除。",
    ask: {
      all: "清除所有已保存的提示词和图片编码？需要时会重新编码。",
      unused: "清除 {days} 天内没有使用过的条目？需要时会重新编码。",
      everything: "删除所有已保存的提示词和图片编码、累计数字、所有固定的输出、为预填充上传的所有提示词列表，以及为启动时预热保存的" +
        "工作流？含有固定输出的工作流会要求取消固定。ComfyUI 已保存的图片仍带有提示词。",
      pin: "删除这个固定的输出？使用它的工作流会要求取消固定。",
    },
    pin: (count) => `${count} 个固定的输出`,
  },
};

/** The panel's words in the frontend's language. */
export const panelWords = (locale) => wordsOf(WORDS, locale);

/** A count with the separators of the language. */
export const countText = (count, locale) => count.toLocaleString(locale);

/** Rows of the first table: place, entries, size, bound, and how full it is (0 to 1). */
export function placeRows(report, locale) {
  const words = panelWords(locale);
  return ["memory", "disk", "redis"].map((name) => {
    const tier = report[name];
    if (name === "redis" && tier.state !== "connected") {
      const note = tier.state === "off" ? words.redisOff : words.redisAway;
      return { name: words[name], note };
    }
    if (tier.bytes === null) return { name: words[name], note: words.unknown };
    return {
      name: words[name],
      entries: countText(tier.entries, locale),
      size: sizeText(tier.bytes),
      bound: sizeText(tier.bound_bytes),
      full: tier.bound_bytes ? Math.min(1, tier.bytes / tier.bound_bytes) : 0,
    };
  });
}

/** Rows of the second table: time, hits, misses, seconds saved. */
export function savedRows(report, locale) {
  const words = panelWords(locale);
  return ["now", "total"].map((name) => ({
    name: words[name],
    hits: countText(report[name].hits, locale),
    misses: countText(report[name].misses, locale),
    saved: secondsText(report[name].seconds_saved),
  }));
}

/** Days as typed; null when the server would refuse them. */
export function daysOf(typed) {
  const text = String(typed).trim().replace(",", ".");
  const days = text === "" ? NaN : Number(text);
  return days >= 0 && days <= 36500 ? days : null;
}

/** The question before something is removed. */
export function question(kind, days, report, locale) {
  const words = panelWords(locale);
  const shared = kind !== "pin" && (report?.redis?.state ?? "off") !== "off";
  return [words.ask[kind].replace("{days}", days), shared && words.shared].filter(Boolean).join(" ");
}

/** What was removed, in one sentence; entries lie on several tiers at once and are not added up. */
export function removedText(removed, locale) {
  const words = panelWords(locale);
  const tiers = ["memory", "disk", "redis"]
    .filter((name) => removed[name]?.entries)
    .map((name) => {
      const { entries, bytes } = removed[name];
      return words.held(words[name], countText(entries, locale), sizeText(bytes));
    });
  const pins = removed.pins?.entries ?? removed.deleted;
  const more = [pins && words.pin(pins), removed.lists && words.lists(removed.lists)];
  const all = [...tiers, ...more, removed.warm_up && words.warmUp, removed.totals && words.totals].filter(Boolean);
  const done = all.length ? words.removed(all.join(" · ")) : words.nothing;
  const failed = removed.failed?.length ? words.failed(removed.failed.join(words.listed)) : "";
  const left = removed.redis?.state === "away" ? ` ${words.redisLeft}` : "";
  return done + failed + left;
}

/** Rows of the list of pins; `users` are the titles of the open workflow's nodes, by content. */
export function pinRows(pins, users, locale) {
  return pins.map((pin) => ({
    here: users.get(pin.content)?.join(", ") ?? panelWords(locale).notHere,
    content: pin.content,
    name: pin.types.join(", ") || pin.content.slice(0, 12),
    size: sizeText(pin.bytes),
    used: new Date(pin.last_used * 1000).toLocaleString(locale, {
      dateStyle: "medium",
      timeStyle: "short",
    }),
  }));
}
