// Views that follow the server while they are looked at.

import { byId } from "./dom.js";

/**
 * Calls `show` now and every `seconds` while the tab is visible; what goes wrong is said in `statusId`, and the view
 * keeps what it has. Gives the function that ends it.
 */
export function watch(seconds, statusId, show) {
  let timer;
  let isOver = false;
  const status = byId(statusId);
  const tick = async () => {
    if (document.visibilityState === "visible") {
      try {
        const message = await show();
        if (status.textContent !== message) status.textContent = message;
      } catch (error) {
        status.textContent = `Not up to date: ${error.message}.`;
      }
    }
    if (!isOver) timer = setTimeout(tick, seconds * 1000);
  };
  status.textContent = "Loading…";
  tick();
  return () => {
    isOver = true;
    clearTimeout(timer);
  };
}
