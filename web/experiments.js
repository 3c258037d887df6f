// The running experiments: how often each arm is accepted and wins, and what it costs.

import { get, key } from "./api.js";
import { byId, h } from "./dom.js";
import { intervalPlot, lossPlot, pairPlot } from "./plot.js";
import { watch } from "./watch.js";

const REFRESH_SECONDS = 10;

/** What the view shows now, as JSON. */
let shown = "";

/** The losses of jobs, by key and job: what a key may not see, another may. Jobs that have made a candidate have ended. */
const losses = new Map();

export function watchExperiments() {
  const refresh = () => show().then((message) => (byId("experiments-status").textContent = message));
  byId("experiments-refresh").onclick = () =>
    refresh().catch((error) => {
      byId("experiments-status").textContent = `Not up to date: ${error.message}.`;
    });
  return watch(REFRESH_SECONDS, "experiments-status", show);
}

async function show() {
  const { data } = await get("/v1/experiments");
  await Promise.all(data.map(({ promotion }) => fetchLosses(promotion?.trained?.job)));
  const now = JSON.stringify([data, key.get()]);
  // What has not changed is left alone, so that who reads it keeps the place and the focus.
  if (now !== shown) byId("experiments").replaceChildren(...(data.length > 0 ? data.map(experiment) : [empty()]));
  shown = now;
  return data.length === 1 ? "1 experiment" : `${data.length} experiments`;
}

const lossesOf = (job) => `${key.get()} ${job}`;

/** Who has no key has not that of the administrator, who alone may see jobs. */
async function fetchLosses(job) {
  if (!job || !key.get() || losses.has(lossesOf(job))) return;
  try {
    const { data } = await get(`/v1/fine_tuning/jobs/${encodeURIComponent(job)}/events?limit=10000`);
    losses.set(lossesOf(job), data.map((event) => event.data).filter(Boolean).reverse());
  } catch {
    losses.set(lossesOf(job), null);
  }
}

function empty() {
  return h(
    "div",
    { class: "empty" },
    h("h2", {}, "No experiment is running"),
    h(
      "p",
      {},
      "An experiment splits the traffic of one model name over several arms and counts what users keep. ",
      "It is set up in the configuration, under ",
      h("code", {}, "[experiments]"),
      ".",
    ),
  );
}

function experiment({ name, arms, pairs, canary, promotion }) {
  const id = `experiment-${name}`;
  const voted = pairs.filter((pair) => pair.a_wins + pair.b_wins + pair.ties > 0);
  return h(
    "section",
    { class: "report-card", "aria-labelledby": id },
    h("div", { class: "report-card-head" }, h("h2", { id }, name), ...canaryNote(canary)),
    h(
      "div",
      { class: "table-frame", role: "region", "aria-labelledby": id, tabindex: "0" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, ...COLUMNS.map(([label]) => h("th", { scope: "col" }, label)))),
        h("tbody", {}, ...arms.map(row)),
      ),
    ),
    voted.length > 0 ? h("h3", {}, "Side by side on the same prompt") : null,
    voted.length > 0 ? h("ul", { class: "pairs" }, ...voted.map(pair)) : null,
    ...(promotion ? record(promotion) : []),
  );
}

/** What a candidate is, what it was trained on, how its check went, and what was decided when. */
function record({ adapter, generation, arm, incumbent, stage, trained, check, steps }) {
  const metrics = trained && losses.get(lossesOf(trained.job));
  return [
    h("h3", {}, `Promotion of ${adapter}: ${stage}`),
    h(
      "div",
      { class: "record" },
      h("span", {}, `${generation.slice(0, 8)} in ${arm}, against ${incumbent}`),
      trained ? h("small", {}, `trained by ${trained.job} on ${trained.training_file}`) : null,
      metrics ? lossPlot(metrics) : null,
      check ? h("span", {}, h("strong", {}, incumbent), ` ${check.losses}`) : null,
      check ? pairPlot(asPair(check, incumbent, adapter)) : null,
      check ? h("span", {}, `${check.wins} `, h("strong", {}, adapter)) : null,
      check ? h("small", {}, `p = ${check.p_value.toPrecision(2)} on ${check.pairs} held-out pairs`) : null,
    ),
    h("ol", { class: "steps" }, ...steps.map(step)),
  ];
}

const asPair = ({ pairs, wins, losses }, incumbent, adapter) => ({
  a: incumbent,
  b: adapter,
  a_wins: losses,
  b_wins: wins,
  ties: pairs - wins - losses,
});

function step({ stage, at, cause }) {
  const time = new Date(at * 1000);
  return h(
    "li",
    {},
    h("strong", {}, stage),
    h("time", { datetime: time.toISOString() }, time.toLocaleString()),
    cause ? h("small", {}, cause) : null,
  );
}

const COLUMNS = [
  ["Arm", (arm) => [h("strong", {}, arm.name), h("small", {}, arm.model)]],
  [
    "Traffic",
    (arm) => [arm.shadow ? "shadow" : `weight ${arm.weight}`, h("small", {}, `${thousands(arm.requests)} requests`)],
  ],
  ["Accepted", (arm) => [intervalPlot("Accepted", arm.acceptance, arm.shown)]],
  ["Wins", (arm) => [intervalPlot("Wins", arm.win_rate, arm.comparisons)]],
  ["First token", (arm) => spread(arm.ttft_ms)],
  ["Per token", (arm) => spread(arm.tpot_ms)],
  [
    "Tokens",
    (arm) => [`${thousands(arm.prompt_tokens)} in`, h("small", {}, `${thousands(arm.completion_tokens)} out`)],
  ],
  ["Errors", (arm) => [thousands(arm.errors)]],
];

function row(arm) {
  return h(
    "tr",
    {},
    ...COLUMNS.map(([label, cells], index) =>
      h(index === 0 ? "th" : "td", index === 0 ? { scope: "row" } : { "data-label": label }, ...cells(arm)),
    ),
  );
}

function pair(pair) {
  return h(
    "li",
    {},
    h("span", {}, h("strong", {}, pair.a), ` ${pair.a_wins}`),
    pairPlot(pair),
    h("span", {}, `${pair.b_wins} `, h("strong", {}, pair.b)),
    h("small", {}, `${pair.ties} ties, p = ${pair.p_value.toPrecision(2)}`),
  );
}

function canaryNote(canary) {
  if (!canary) return [];
  const isBack = canary.state === "rolled_back";
  return [
    h(
      "span",
      { class: isBack ? "chip chip-bad" : "chip" },
      `canary ${canary.arm}: ${isBack ? "rolled back" : "within its bounds"}`,
    ),
    isBack ? h("small", {}, canary.cause) : null,
  ];
}

function spread(percentiles) {
  if (percentiles?.p50 === null || percentiles?.p50 === undefined) return ["–"];
  const { p50, p95 } = percentiles;
  return [`${round(p50)} ms`, h("small", {}, `p95 ${round(p95)} ms`)];
}

const round = (value) => (value < 100 ? value.toFixed(1) : Math.round(value));

const thousands = (value) => value.toLocaleString("en");
