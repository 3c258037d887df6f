// What survives a reload: the prompt, the arms, and the last run with its vote.

const STORE = "lorry.compare";

export const MIN_ARMS = 2;
export const MAX_ARMS = 16;

let nextKey = 0;

/** An arm as the page edits it; `name` is empty while the name follows from the rest. */
export function newArm(fields = {}) {
  return { name: "", model: "", scale: 1, store: "", k: 3, select: "fixed", format: "", ...fields, key: nextKey++ };
}

const EMPTY = {
  kind: "text",
  text: "",
  prefix: "",
  suffix: "",
  messages: [{ role: "user", content: "" }],
  max_tokens: 128,
  temperature: 0,
  seed: 42,
  stop: "",
  blind: false,
  showChanges: true,
  /** Empty until the models are known for the first time. */
  arms: [],
};

/** What is set up on the left, and the last run, if any. */
export const state = { setup: structuredClone(EMPTY), run: null };

export function restore() {
  try {
    const saved = JSON.parse(localStorage.getItem(STORE)) ?? {};
    Object.assign(state.setup, saved.setup);
    state.setup.arms = state.setup.arms.map(newArm);
    state.run = saved.run ?? null;
  } catch {
    // Written by an older page, or by hand: start anew.
    state.setup = structuredClone(EMPTY);
    state.run = null;
  }
  const { run } = state;
  if (run?.status === "running") run.status = "interrupted";
  if (run?.vote && !run.vote.recorded) run.error ??= "Your vote may not have been recorded.";
}

/** Storage may be full or refused; the page works without. */
export function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch (error) {
    console.warn("the page will not survive a reload:", error.message);
  }
}

let pending;

/** Saves soon, once for many changes. */
export function saveSoon() {
  clearTimeout(pending);
  pending = setTimeout(save, 200);
}

addEventListener("pagehide", save);
