// The columns: what each arm says, what it costs, and how it differs from the first.

import { letter } from "./arms.js";
import { count, diff } from "./diff.js";
import { banner, byId, h } from "./dom.js";
import { canVote, isHidden, isOver, reference } from "./run.js";
import { state } from "./state.js";

const STATUS = { waiting: "waiting", streaming: "writing", failed: "failed", stopped: "stopped" };
const FINISH = { stop: "ended", length: "at max tokens" };

/** `[field of the result, label, unit, whether bars compare it]`. */
const FIGURES = [
  ["ttft_ms", "First token", "ms", true],
  ["tpot_ms", "Per token", "ms", true],
  ["total_ms", "Total", "ms", true],
  ["prompt_tokens", "Tokens in", "", false],
  ["completion_tokens", "Tokens out", "", false],
  ["logprob", "Log-prob.", "", false],
];

let vote = () => {};

/** `castVote` is called with the index of the arm that wins, or `null` for a tie. */
export function setUpAnswers(castVote) {
  vote = castVote;
  byId("tie").addEventListener("click", () => vote(null));
  byId("show-changes").addEventListener("change", refreshAnswers);
}

/** The arm in the column that the number `n` of the keyboard stands for. */
export function armOfColumn(run, n) {
  const index = run.order[n - 1];
  return run.arms[index]?.status === "finished" ? index : undefined;
}

/** The whole run, anew. */
export function showAnswers() {
  const { run } = state;
  byId("empty").hidden = run !== null;
  byId("columns").dataset.count = run?.order.length ?? 0;
  byId("columns").replaceChildren(...(run?.order.map((index, column) => card(index, column)) ?? []));
  refreshAnswers();
}

/** The same columns with what has changed in them: what has the focus keeps it. */
export function refreshAnswers() {
  showHead();
  state.run?.order.forEach(showArm);
}

/** More text for one arm: only its own column is touched. */
export function appendText(index, text) {
  const output = part(index, "output");
  const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 24;
  output.append(text);
  if (isAtEnd) output.scrollTop = output.scrollHeight;
}

/** One arm as it is now, and what depends on all of them. */
export function showArm(index) {
  const { run } = state;
  const arm = run.arms[index];
  const { result } = arm;
  const hidden = isHidden(run);
  const column = byId(`arm-${index}`);
  column.dataset.status = arm.status;
  column.classList.toggle("is-winner", run.vote?.arm === index);
  part(index, "detail").textContent = hidden ? "hidden until the vote" : detail(result);
  part(index, "state").textContent =
    run.vote?.arm === index ? "★ your vote" : (STATUS[arm.status] ?? FINISH[result?.finish_reason] ?? "ended");
  banner(part(index, "error"), arm.error);
  part(index, "output").hidden = arm.status === "failed";
  showOutput(index);
  for (const [field, , unit, hasBar] of FIGURES) {
    const value = hidden ? undefined : figure(result, field);
    const cell = column.querySelector(`[data-figure=${field}]`);
    cell.querySelector(".value").replaceChildren(...shown(field, value, unit, result));
    if (hasBar)
      cell.querySelector(".bar-fill").style.setProperty("--share", isOver(run) && value ? value / most(field) : 0);
  }
  const button = part(index, "vote");
  button.disabled = !canVote(run) || arm.status !== "finished";
  part(index, "copy").disabled = arm.text === "";
}

/** Status, tie, legend, the error of the whole run. */
export function showHead() {
  const { run, setup } = state;
  const isRunning = run?.status === "running";
  byId("run").disabled = isRunning;
  byId("stop-run").disabled = !isRunning;
  byId("tie").disabled = !run || !canVote(run);
  const isUnrecorded = run?.error && run.vote && !run.vote.recorded;
  const retry = isUnrecorded ? [h("button", { type: "button", click: () => vote(run.vote.arm) }, "Try again")] : [];
  banner(byId("run-error"), run?.error, ...retry);
  byId("status").textContent = run ? statusText(run) : "";
  // Its place is kept, so that nothing moves when a run ends.
  const isCompared = run && isOver(run) && setup.showChanges && run.arms.filter((arm) => arm.text !== "").length > 1;
  byId("legend").classList.toggle("is-off", !isCompared);
  // Of a comparison that was refused as a whole there is nothing to show but the cause.
  byId("columns").hidden = run?.status === "failed" && run.arms.every((arm) => arm.text === "" && !arm.error);
  if (run) byId("legend-reference").textContent = title(run, reference(run));
  document.title = isRunning ? "running… lorry" : "lorry: compare";
}

function statusText(run) {
  const ended = run.arms.filter((arm) => arm.status === "finished" || arm.status === "failed").length;
  const failed = run.arms.filter((arm) => arm.status === "failed").length;
  const failures = failed > 0 ? `, ${failed} failed` : "";
  switch (run.status) {
    case "running":
      return `${ended} of ${run.arms.length} answers complete`;
    case "stopped":
      return "Stopped.";
    case "interrupted":
      return "Interrupted when the page was left.";
    case "failed":
      return "";
  }
  if (!run.vote) return `${ended} answers${failures}. ${canVote(run) ? "Which is best?" : ""}`;
  const choice = run.vote.arm === null ? "a tie" : title(run, run.vote.arm);
  return `Your vote: ${choice}${run.vote.recorded ? "" : ", not recorded yet"}.`;
}

function title(run, index) {
  return isHidden(run) ? `answer ${run.order.indexOf(index) + 1}` : `${letter(index)} ${run.arms[index].name}`;
}

function card(index, column) {
  const { run } = state;
  const hidden = isHidden(run);
  const name = title(run, index);
  const number = column + 1;
  return h(
    "li",
    { id: `arm-${index}`, class: "answer" },
    h(
      "div",
      { class: "answer-head" },
      h("span", { class: "letter", "aria-hidden": "true" }, hidden ? String(number) : letter(index)),
      h("h2", {}, hidden ? `Answer ${number}` : run.arms[index].name),
      h("span", { class: "state", "data-part": "state" }),
      h("p", { class: "detail", "data-part": "detail" }),
    ),
    h("p", { class: "banner", "data-part": "error", hidden: true }),
    h("pre", { class: "output", "data-part": "output", tabindex: "0", role: "group", "aria-label": `Text of ${name}` }),
    h(
      "dl",
      { class: "figures" },
      ...FIGURES.map(([field, label, , hasBar]) =>
        h(
          "div",
          { "data-figure": field },
          h("dt", {}, label),
          h("dd", {}, h("span", { class: "value" }), hasBar ? h("span", { class: "bar-fill" }) : null),
        ),
      ),
    ),
    h(
      "div",
      { class: "answer-foot" },
      h("p", { class: "changes", "data-part": "changes" }),
      h(
        "button",
        {
          type: "button",
          class: "quiet",
          "data-part": "copy",
          "aria-label": `Copy the text of ${name}`,
          click: (event) => copy(event.currentTarget, run.arms[index].text),
        },
        "Copy",
      ),
      h(
        "button",
        { type: "button", "data-part": "vote", "aria-label": `Vote for ${name}`, click: () => vote(index) },
        "Best",
        number < 10 ? h("kbd", { "aria-hidden": "true" }, String(number)) : null,
      ),
    ),
  );
}

function showOutput(index) {
  const { run, setup } = state;
  const arm = run.arms[index];
  const first = run.arms[reference(run)];
  const output = part(index, "output");
  const changes = part(index, "changes");
  // What an arm wrote before it failed is not shown, and nothing is compared with it.
  const hasFirst = first.text !== "" && first.status !== "failed";
  const isCompared = setup.showChanges && isOver(run) && arm !== first && arm.text !== "" && hasFirst;
  if (!isCompared) {
    output.replaceChildren(arm.text);
    changes.textContent = isOver(run) && arm === first && hasFirst ? "what the others are compared with" : "";
    return;
  }
  const pieces = diff(first.text, arm.text);
  output.replaceChildren(...pieces.map(piece));
  const { added, removed } = count(pieces);
  const agreement = arm.result?.agreement;
  const share = !isHidden(run) && agreement !== undefined ? ` · ${Math.round(agreement * 100)} % agreement` : "";
  const isSame = arm.text === first.text;
  changes.textContent = isSame ? `= the same as ${title(run, reference(run))}` : `+${added} −${removed} words${share}`;
}

function piece({ kind, text }) {
  if (kind === "same") return text;
  const tag = kind === "added" ? "ins" : "del";
  if (text.trim() === "" && text.includes("\n")) {
    // A line end alone would not be seen: a sign stands for it, which copying leaves out.
    return h(tag, {}, h("span", { class: "mark line-end" }), kind === "added" ? text : "");
  }
  // Lines are drawn on and through what is in a line, not its indent, unless that is all there is.
  const words = text.trim() === "" ? [text] : text.split(/(^[^\S\n]+|\n)/m);
  return h(
    tag,
    {},
    ...words.map((word) => (word.trim() || words.length === 1 ? h("span", { class: "mark" }, word) : word)),
  );
}

function detail(result) {
  if (!result?.model) return "";
  const { model, adapter, icl } = result;
  const parts = [model];
  if (adapter?.generation) parts.push(adapter.generation.slice(0, 8));
  if (icl) parts.push(`${icl.k} of ${icl.store}, ${icl.select}`);
  return parts.join(" · ");
}

function figure(result, field) {
  return result?.[field] ?? result?.usage?.[field];
}

/** The largest of all arms, for the bars. */
function most(field) {
  return Math.max(...state.run.arms.map((arm) => figure(arm.result, field) ?? 0));
}

function shown(field, value, unit, result) {
  if (value === undefined || value === null) return ["–"];
  if (field === "logprob") return [value.toFixed(2).replace("-", "−")];
  if (!unit) {
    const cached = field === "prompt_tokens" ? result.usage.prompt_tokens_details?.cached_tokens : 0;
    return [String(value), cached ? h("small", {}, ` ${cached} cached`) : null].filter(Boolean);
  }
  return [value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en"), h("small", {}, ` ${unit}`)];
}

function part(index, name) {
  return byId(`arm-${index}`).querySelector(`[data-part=${name}]`);
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
