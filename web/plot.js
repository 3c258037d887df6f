// Small plots, each with its figures in words for who cannot see it.

import { h, svg } from "./dom.js";

const WIDTH = 160;
const HEIGHT = 22;
const MIDDLE = HEIGHT / 2;
const INSET = 6;

const percent = (share) => `${Math.round(share * 100)} %`;

/** A rate with its interval, on a line from 0 to 100 %. Rates are 0..1; `null` is "nothing to count yet". */
export function intervalPlot(what, interval, observations) {
  if (interval?.rate === null || interval?.rate === undefined) return h("span", { class: "nothing" }, "nothing yet");
  const { rate, low, high } = interval;
  const x = (share) => INSET + share * (WIDTH - 2 * INSET);
  const label = `${what} ${percent(rate)}, interval ${percent(low)} to ${percent(high)}, of ${observations}`;
  return h(
    "span",
    { class: "plot" },
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": label },
      svg("line", { class: "axis", x1: x(0), x2: x(1), y1: MIDDLE, y2: MIDDLE }),
      ...[0, 0.5, 1].map((share) =>
        svg("line", { class: "axis", x1: x(share), x2: x(share), y1: MIDDLE - 4, y2: MIDDLE + 4 }),
      ),
      svg("line", { class: "interval", x1: x(low), x2: x(high), y1: MIDDLE, y2: MIDDLE }),
      svg("circle", { class: "rate", cx: x(rate), cy: MIDDLE, r: 4.5 }),
    ),
    h(
      "span",
      { class: "plot-value", "aria-hidden": "true" },
      percent(rate),
      h("small", {}, ` ${percent(low)}–${percent(high)}, n = ${observations}`),
    ),
  );
}

/** A value as a part of the largest beside it. */
export function bar(value, largest) {
  const width = largest > 0 ? Math.max(value > 0 ? 2 : 0, (value / largest) * 80) : 0;
  return svg(
    "svg",
    { class: "bar-plot", viewBox: "0 0 80 8", width: 80, height: 8, "aria-hidden": "true" },
    svg("rect", { class: "track", width: 80, height: 8, rx: 2 }),
    svg("rect", { class: "amount", width, height: 8, rx: 2 }),
  );
}

/** How the losses of a job went, from its first step to its last; `metrics` has those of each step, in order. */
export function lossPlot(metrics) {
  const points = (name) => metrics.filter((step) => step[name] !== undefined).map((step) => [step.step, step[name]]);
  const [training, validation] = [points("train_loss"), points("valid_loss")];
  const all = [...training, ...validation];
  if (all.length === 0) return h("span", { class: "nothing" }, "nothing yet");
  const [width, height] = [240, 64];
  const [low, high] = [Math.min(...all.map(([, loss]) => loss)), Math.max(...all.map(([, loss]) => loss))];
  const last = Math.max(1, ...all.map(([step]) => step));
  const x = (step) => INSET + (step / last) * (width - 2 * INSET);
  const y = (loss) => INSET + ((high - loss) / Math.max(high - low, 1e-9)) * (height - 2 * INSET);
  const line = (of, name) =>
    svg("polyline", { class: name, points: of.map(([step, loss]) => `${x(step)},${y(loss)}`).join(" ") });
  const best = Math.min(...validation.map(([, loss]) => loss));
  const label = `Training loss to step ${last}${validation.length > 0 ? `, validation loss ${best.toFixed(2)} at best` : ""}`;
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label },
    line(training, "curve curve-training"),
    line(validation, "curve"),
    ...validation.map(([step, loss]) => svg("circle", { class: "rate", cx: x(step), cy: y(loss), r: 2.5 })),
  );
}

/** Wins of one, ties and wins of the other, side by side. */
export function pairPlot({ a, b, a_wins, b_wins, ties }) {
  const width = 240;
  const scale = width / Math.max(1, a_wins + b_wins + ties);
  const label = `${a} wins ${a_wins}, ${b} wins ${b_wins}, ${ties} ties`;
  return svg(
    "svg",
    { viewBox: `0 0 ${width} 10`, width, height: 10, role: "img", "aria-label": label },
    svg("rect", { class: "amount", x: 0, width: a_wins * scale, height: 10 }),
    svg("rect", { class: "ties", x: a_wins * scale, width: ties * scale, height: 10 }),
    svg("rect", { class: "other", x: (a_wins + ties) * scale, width: b_wins * scale, height: 10 }),
  );
}
