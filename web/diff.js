// The difference of two texts as someone who reads code sees it: by words and signs, not by characters.

/** A line end, a run of blanks, a word, a number, or one sign. */
const TOKEN = /\r?\n|[^\S\n]+|[\p{L}_][\p{L}\p{N}_]*|\p{N}+(?:\.\p{N}+)?|./gsu;
/** Cells of the table that finds the common tokens; beyond, whole lines are compared. */
const MAX_CELLS = 4_000_000;

/**
 * What turns `before` into `after`: `[{kind: "same" | "removed" | "added", text}]`, what is removed ahead of what is
 * added in its place. Without the removed parts it reads `after`, without the added ones `before`.
 */
export function diff(before, after) {
  const changes = compare(tokens(before), tokens(after)) ?? compare(lines(before), lines(after));
  return pieces(wholeLines(joinCrumbs(changes ?? [{ same: "", removed: before, added: after }])));
}

/** How many words, numbers and signs are added and removed. */
export function count(pieces) {
  const words = (kind) =>
    pieces
      .filter((piece) => piece.kind === kind)
      .flatMap((piece) => tokens(piece.text))
      .filter((token) => token.trim()).length;
  return { added: words("added"), removed: words("removed") };
}

function tokens(text) {
  return text.match(TOKEN) ?? [];
}

function lines(text) {
  return text.match(/[^\n]*\n|[^\n]+$/g) ?? [];
}

/** Steps of `same` text followed by a change, or nothing when the table would be too large. */
function compare(before, after) {
  let start = 0;
  while (start < before.length && start < after.length && before[start] === after[start]) start++;
  let end = 0;
  const shorter = Math.min(before.length, after.length) - start;
  while (end < shorter && before[before.length - 1 - end] === after[after.length - 1 - end]) end++;

  const old = before.slice(start, before.length - end);
  const now = after.slice(start, after.length - end);
  if (old.length * now.length > MAX_CELLS) return null;

  const steps = [{ same: before.slice(0, start).join(""), removed: "", added: "" }];
  const last = () => steps[steps.length - 1];
  const keep = (text) => {
    if (last().removed || last().added) steps.push({ same: "", removed: "", added: "" });
    last().same += text;
  };
  const longest = commonLengths(old, now);
  const width = now.length + 1;
  let i = 0;
  let j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i] === now[j]) {
      keep(old[i++]);
      j++;
    } else if (j === now.length || (i < old.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
      last().removed += old[i++];
    } else {
      last().added += now[j++];
    }
  }
  if (end > 0) keep(before.slice(before.length - end).join(""));
  return steps;
}

/** At `[i, j]`, the length of the longest common subsequence of `old[i..]` and `now[j..]`. */
function commonLengths(old, now) {
  const width = now.length + 1;
  const lengths = new Uint32Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) {
      lengths[i * width + j] =
        old[i] === now[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  return lengths;
}

/**
 * Joins the changes of a stretch in which more is changed than kept: one long change is easier to read than crumbs that
 * chance matches hold apart. A kept line, or the end of one with text in it, parts two stretches.
 */
function joinCrumbs(steps) {
  const stretches = [];
  for (const step of steps) {
    const isApart = (step.same.includes("\n") && step.same.trim() !== "") || !isChange(step);
    if (stretches.length === 0 || isApart) stretches.push([]);
    stretches[stretches.length - 1].push(step);
  }
  return stretches.flatMap((stretch) => {
    const [first, ...rest] = stretch;
    const kept = rest.reduce((sum, step) => sum + step.same.length, 0);
    const changed = (side) => stretch.reduce((sum, step) => sum + step[side].length, 0);
    if (kept >= Math.max(changed("removed"), changed("added"))) return stretch;
    const joined = (side) => first[side] + rest.map((step) => step.same + step[side]).join("");
    return [{ same: first.same, removed: joined("removed"), added: joined("added") }];
  });
}

/**
 * Moves changes to the ends of lines where that says the same. Of two equal indents around an added line, for example,
 * the first belongs to it and not the second; and a line of which only the last sign is kept is another line.
 */
function wholeLines(steps) {
  const result = isChange(steps[steps.length - 1]) ? [...steps, { same: "", removed: "", added: "" }] : steps;
  for (let i = 0; i + 1 < result.length; i++) {
    const [step, next] = [result[i], result[i + 1]];
    const side = step.removed === "" ? "added" : "removed";
    if (step.removed === "" || step.added === "") {
      const start = step.same.lastIndexOf("\n") + 1;
      const indent = step.same.slice(start);
      if (step[side].endsWith(indent) && step[side].includes("\n")) {
        step.same = step.same.slice(0, start);
        step[side] = indent + step[side].slice(0, step[side].length - indent.length);
        next.same = indent + next.same;
      }
    } else if (step.same === "" || step.same.endsWith("\n")) {
      const rest = next.same.slice(0, next.same.indexOf("\n") + 1);
      if (rest.length * 2 > Math.min(step.removed.length, step.added.length)) continue;
      step.removed += rest;
      step.added += rest;
      next.same = next.same.slice(rest.length);
    }
  }
  return result;
}

const isChange = (step) => step.removed !== "" || step.added !== "";

function pieces(steps) {
  return steps.flatMap(({ same, removed, added }) =>
    [
      { kind: "same", text: same },
      { kind: "removed", text: removed },
      { kind: "added", text: added },
    ].filter((piece) => piece.text !== ""),
  );
}
