// The adapters: where their weights are, and who asks for them.

import { get, getText } from "./api.js";
import { byId, h } from "./dom.js";
import { bar } from "./plot.js";
import { watch } from "./watch.js";

const REFRESH_SECONDS = 3;
/** Rows of a table that a reader can still survey; the filter finds the others. */
const MAX_ROWS = 100;

const PHASES = { registered: "not loaded", loading: "loading", ready: "ready", failed: "refused" };

let adapters = [];
let requests = new Map();

export function watchAdapters() {
  byId("adapters-filter").oninput = draw;
  return watch(REFRESH_SECONDS, "adapters-status", show);
}

async function show() {
  const [list, metrics] = await Promise.all([get("/v1/adapters"), getText("/metrics").catch(() => "")]);
  requests = requestsByAdapter(metrics);
  adapters = list.data.toSorted(
    (a, b) => b.in_flight - a.in_flight || traffic(b) - traffic(a) || a.name.localeCompare(b.name),
  );
  draw();
  const inMemory = adapters.filter((adapter) => adapter.tier !== "disk");
  const bytes = inMemory.reduce((sum, adapter) => sum + adapter.bytes, 0);
  return `${adapters.length} registered, ${inMemory.length} in memory (${size(bytes)})`;
}

/** Requests ended since the server started, from the counter that Prometheus reads. */
export function requestsByAdapter(metrics) {
  const counts = new Map();
  for (const [, name, count] of metrics.matchAll(/^lorry_requests_total\{.*?\badapter="([^"]*)".*\} (\d+)/gm)) {
    counts.set(name, (counts.get(name) ?? 0) + Number(count));
  }
  return counts;
}

const traffic = (adapter) => requests.get(adapter.name) ?? 0;

function draw() {
  const filter = byId("adapters-filter").value.trim().toLowerCase();
  const found = adapters.filter((adapter) => adapter.name.toLowerCase().includes(filter));
  const most = Math.max(...found.map(traffic));
  // Only the rows are made anew: who scrolls the table keeps the place and the focus.
  byId("adapters-rows").replaceChildren(...found.slice(0, MAX_ROWS).map((adapter) => row(adapter, most)));
  byId("adapters-table").hidden = found.length === 0;
  byId("adapters-empty").hidden = found.length > 0;
  const hidden = found.length - MAX_ROWS;
  byId("adapters-more").hidden = hidden <= 0;
  byId("adapters-more").textContent = `${hidden} more: filter by name to see them.`;
}

function row(adapter, most) {
  const cell = (label, ...content) => h("td", { "data-label": label }, ...content);
  const count = traffic(adapter);
  return h(
    "tr",
    {},
    h(
      "th",
      { scope: "row" },
      h("strong", {}, adapter.name),
      h("small", {}, adapter.error ?? adapter.manifest?.description ?? adapter.model),
    ),
    cell(
      "State",
      h(
        "span",
        { class: adapter.phase === "failed" ? "chip chip-bad" : "chip" },
        PHASES[adapter.phase] ?? adapter.phase,
      ),
    ),
    cell("Weights in", adapter.tier === "host" ? "memory" : adapter.tier),
    cell("Size", adapter.bytes > 0 ? size(adapter.bytes) : "–"),
    cell("Requests", h("span", { class: "with-bar" }, bar(count, most), count.toLocaleString("en"))),
    cell("In flight", String(adapter.in_flight)),
    cell("Generation", h("code", {}, adapter.generation?.slice(0, 8) ?? "–")),
  );
}

function size(bytes) {
  const [unit, scale] = bytes >= 1e9 ? ["GB", 1e9] : ["MB", 1e6];
  return `${(bytes / scale).toFixed(1)} ${unit}`;
}
