// One comparison: from the first event to the vote. Nothing here touches the page.

/** A run that nothing has answered yet. `order` is that of the columns, as indices of arms. */
export function newRun(request, isBlind) {
  const arms = request.arms.map((arm) => ({ name: arm.name, status: "waiting", text: "", result: null, error: null }));
  const order = arms.map((_, index) => index);
  return {
    id: null,
    status: "running",
    error: null,
    blind: isBlind,
    order: isBlind ? shuffle(order) : order,
    arms,
    vote: null,
  };
}

/** Takes in one event of the stream; gives the index of the arm that changed, if one did. */
export function apply(run, event, milliseconds) {
  run.id ??= event.id;
  if (event.event === "done") {
    run.status = "done";
    return null;
  }
  const arm = run.arms[event.arm];
  if (!arm) return null;
  switch (event.event) {
    case "start":
      arm.result = { model: event.model, adapter: event.adapter, icl: event.icl };
      break;
    case "delta":
      // Until the server's own figure comes with the end, as seen from here.
      if (arm.text === "") arm.result = { ...arm.result, ttft_ms: milliseconds };
      arm.status = "streaming";
      arm.text += event.text;
      break;
    case "finish":
      arm.status = "finished";
      arm.text = event.text;
      arm.result = event;
      break;
    case "error":
      arm.status = "failed";
      arm.error = event.error.message;
      break;
  }
  return event.arm;
}

/** Ends a run that will get no further events; arms without an end keep the text they have. */
export function end(run, status, error) {
  run.status = status;
  run.error = error ?? null;
  for (const arm of run.arms) {
    if (arm.status === "waiting" || arm.status === "streaming") arm.status = "stopped";
  }
}

/** Names and figures stay hidden. */
export const isHidden = (run) => run.blind && !run.vote;

export const isOver = (run) => run.status !== "running";

/** Votes are for whole comparisons, between two answers at least, and once. */
export function canVote(run) {
  return run.status === "done" && !run.vote && run.arms.filter((arm) => arm.status === "finished").length > 1;
}

/** What the others are compared with: the first arm, or while names are hidden, the first column. */
export function reference(run) {
  return isHidden(run) ? run.order[0] : 0;
}

function shuffle(items) {
  for (let i = items.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [items[i], items[j]] = [items[j], items[i]];
  }
  return items;
}
