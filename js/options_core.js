// What the choices of a node are called in the frontend's language. Pure: no DOM, no app.
import { wordsOf } from "./text_core.js";

const NONE = {};

/** The node definitions of a language in what GET /i18n answers; {} where there are none. */
export function definitionsIn(answer, locale) {
  const { en: _, ...translated } = answer ?? NONE; // English is what the values say themselves
  return wordsOf({ ...translated, en: NONE }, locale)?.nodeDefs ?? NONE;
}

/** A choice as it is shown: in the user's language, and as help and messages name it. */
export function optionLabel(definitions, type, input, value) {
  const options = definitions[type]?.inputs?.[input]?.options ?? NONE;
  return Object.hasOwn(options, value) ? `${options[value]}（${value}）` : value;
}
