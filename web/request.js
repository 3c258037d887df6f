// From what is set up on the page to the request that the server reads.

import { catalogue } from "./catalogue.js";

/** The names of the arms: what the user wrote, else what the arm is; told apart by a number where they are the same. */
export function armNames(arms) {
  const taken = new Set();
  return arms.map((arm) => {
    const name = arm.name.trim() || describe(arm);
    let unique = name;
    for (let n = 2; taken.has(unique); n++) unique = `${name} ${n}`;
    taken.add(unique);
    return unique;
  });
}

function describe(arm) {
  const card = catalogue.card(arm.model);
  const parts = [card ? (card.adapter?.name ?? "base") : arm.model || "base"];
  if (card?.adapter && arm.scale !== 1) parts.push(`×${arm.scale}`);
  if (arm.store) parts.push(`${arm.k}-shot${arm.select === "fixed" ? "" : ` ${arm.select}`}`);
  if (arm.format) parts.push(arm.format);
  return parts.join(" ");
}

/** What an arm does beyond its model, in words. */
export function options(arm) {
  const parts = [];
  if (arm.store) parts.push(`${arm.k} of ${arm.store}, ${arm.select}`);
  if (catalogue.card(arm.model)?.adapter && arm.scale !== 1) parts.push(`strength ${arm.scale}`);
  if (arm.format) parts.push(arm.format);
  return parts.join(" · ") || "no examples";
}

/** The body of `POST /v1/compare`. */
export function compareRequest(setup) {
  const names = armNames(setup.arms);
  return {
    ...prompt(setup),
    arms: setup.arms.map((arm, index) => ({ name: names[index], ...armFields(arm, setup) })),
    max_tokens: setup.max_tokens,
    temperature: setup.temperature,
    seed: setup.seed,
    stop: setup.stop ? [setup.stop.replaceAll("\\n", "\n")] : undefined,
    on_error: "skip",
    stream: true,
  };
}

/** Whether there is anything to ask. */
export function isEmpty(setup) {
  const texts = { text: [setup.text], fill: [setup.prefix, setup.suffix], chat: setup.messages.map((m) => m.content) };
  return texts[setup.kind].every((text) => text.trim() === "");
}

function prompt({ kind, text, prefix, suffix, messages }) {
  if (kind === "fill") return { prompt: prefix, suffix };
  if (kind === "chat") return { messages: messages.filter((message) => message.content.trim() !== "") };
  return { prompt: text };
}

function armFields(arm, { seed }) {
  const card = catalogue.card(arm.model);
  const isScaled = card?.adapter && arm.scale !== 1;
  return {
    model: isScaled ? card.parent : arm.model,
    adapters: isScaled ? [{ name: card.adapter.name, scale: arm.scale }] : undefined,
    icl: arm.store ? { store: arm.store, k: arm.k, select: arm.select, seed } : undefined,
    prompt_format: arm.format || undefined,
  };
}
