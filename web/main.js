// The page as a whole: views, keys, theme, and the way from Run to the vote.

import { key, post, stream } from "./api.js";
import { watchAdapters } from "./adapters.js";
import { appendText, armOfColumn, refreshAnswers, setUpAnswers, showAnswers, showArm, showHead } from "./answers.js";
import { chooseFirstArms, setUpArms, showArmError, showArms } from "./arms.js";
import { loadCatalogue } from "./catalogue.js";
import { banner, byId, h } from "./dom.js";
import { watchExperiments } from "./experiments.js";
import { focusPrompt, setUpPrompt } from "./prompt.js";
import { compareRequest, isEmpty } from "./request.js";
import { apply, canVote, end, isOver, newRun } from "./run.js";
import { restore, save, state } from "./state.js";

const VIEWS = { compare: null, experiments: watchExperiments, adapters: watchAdapters };
const THEMES = { auto: "light", light: "dark", dark: "auto" };

let running = null;
let stopWatching = () => {};

restore();
setUpPrompt();
setUpArms();
setUpAnswers(castVote);
showAnswers();
setUpTheme();
setUpKey();
showView();
addEventListener("hashchange", showView);
addEventListener("keydown", onKey);
byId("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("stop-run").addEventListener("click", () => running?.abort());
await fillCatalogue();

async function run() {
  const { setup } = state;
  if (running || setup.arms.length === 0) return;
  if (isEmpty(setup)) {
    byId("status").textContent = "Write a prompt first.";
    focusPrompt();
    return;
  }
  running = new AbortController();
  setup.arms.forEach((_, index) => showArmError(index, null));
  const request = compareRequest(setup);
  state.run = newRun(request, setup.blind);
  showAnswers();
  byId("answers").focus({ preventScroll: true });
  byId("answers").scrollIntoView();
  const started = performance.now();
  try {
    for await (const event of stream("/v1/compare", request, running.signal)) {
      const index = apply(state.run, event, performance.now() - started);
      if (event.event === "delta") appendText(index, event.text);
      if (index !== null && (event.event !== "delta" || state.run.arms[index].text === event.text)) showArm(index);
      if (event.event === "finish" || event.event === "error") showHead();
    }
    if (!isOver(state.run)) end(state.run, "failed", "The connection ended before all answers were complete.");
  } catch (error) {
    onRunError(error);
  }
  running = null;
  save();
  refreshAnswers();
}

function onRunError(error) {
  if (error.name === "AbortError") {
    end(state.run, "stopped");
    return;
  }
  end(state.run, "failed", `The comparison did not run: ${error.message}`);
  const [, arm] = error.param?.match(/^arms\[(\d+)\]/) ?? [];
  if (arm !== undefined) showArmError(Number(arm), error.message);
  if (error.status === 401) byId("key").open = true;
}

/** A vote counts here at once; the server is asked again if it could not record it. */
async function castVote(arm) {
  const { run } = state;
  if (!run || !(canVote(run) || (run.vote && !run.vote.recorded))) return;
  run.vote = { arm, recorded: false };
  run.error = null;
  showVote();
  try {
    await post("/v1/feedback", { id: run.id, kind: "winner", arm: arm === null ? null : run.arms[arm].name });
    run.vote.recorded = true;
  } catch (error) {
    run.error = `Your vote was not recorded: ${error.message}`;
  }
  showVote();
}

/** The names come out, so the columns are made anew; the focus must not fall out of the page with them. */
function showVote() {
  save();
  showAnswers();
  byId("answers").focus({ preventScroll: true });
}

async function fillCatalogue() {
  const notice = byId("catalogue-error");
  try {
    await loadCatalogue();
    banner(notice, null);
    chooseFirstArms();
  } catch (error) {
    banner(notice, `No models: ${error.message}. `, h("button", { type: "button", click: fillCatalogue }, "Try again"));
    if (error.status === 401) byId("key").open = true;
  }
  showArms();
}

function onKey(event) {
  if (location.hash && location.hash !== "#compare") return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") {
    running?.abort();
  } else if (!event.ctrlKey && !event.metaKey && !event.altKey && !isTyping(event.target)) {
    onPlainKey(event);
  }
}

function onPlainKey(event) {
  if (event.key === "/") {
    event.preventDefault();
    focusPrompt();
  } else if (/^\d$/.test(event.key) && state.run && canVote(state.run)) {
    const arm = event.key === "0" ? null : armOfColumn(state.run, Number(event.key));
    if (arm !== undefined) castVote(arm);
  }
}

const isTyping = (target) => target.matches("textarea, select, input:not([type=checkbox], [type=radio])");

function showView() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "compare";
  for (const view of Object.keys(VIEWS)) byId(`view-${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  stopWatching();
  stopWatching = VIEWS[name]?.() ?? (() => {});
}

function setUpTheme() {
  const { dataset } = document.documentElement;
  const button = byId("theme");
  const show = () => {
    button.textContent = { auto: "◐", light: "☀", dark: "☾" }[dataset.theme];
    button.setAttribute("aria-label", `Theme: ${dataset.theme}`);
    button.title = `Theme: ${dataset.theme}`;
  };
  button.addEventListener("click", () => {
    dataset.theme = THEMES[dataset.theme] ?? "auto";
    localStorage.setItem("lorry.theme", dataset.theme);
    show();
  });
  show();
}

function setUpKey() {
  const panel = byId("key");
  const show = () => (byId("key-set").hidden = key.get() === "");
  byId("key-value").value = key.get();
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(byId("key-value").value.trim());
    panel.open = false;
    show();
    fillCatalogue();
    showView();
  });
  addEventListener("click", (event) => {
    if (!panel.contains(event.target)) panel.open = false;
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") panel.open = false;
  });
  show();
}
