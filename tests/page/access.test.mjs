// Everyone can use the page: by keyboard, by ear, on a phone, in the dark.

import assert from "node:assert/strict";

import { ask, columns, ended, names, parts } from "./browser.mjs";
import { pageTest } from "./page_test.mjs";

const VIEWS = ["compare", "experiments", "adapters"];
const CONTROLS = new Set([
  "button",
  "link",
  "textbox",
  "searchbox",
  "combobox",
  "listbox",
  "checkbox",
  "radio",
  "spinbutton",
  "slider",
  "img",
  "DisclosureTriangle",
  "region",
  "radiogroup",
  "table",
]);

async function show(page, view) {
  await page.evaluate((hash) => (location.hash = hash), view);
  await page.locator(`#view-${view}`).waitFor();
  await page.waitForLoadState("networkidle");
}

pageTest("every control has an accessible name of its own", { mock: {} }, async ({ page }) => {
  await page.getByText("API key").first().click();
  for (const kind of ["Fill in", "Chat"]) {
    await page.getByRole("radio", { name: kind }).check();
    await controlsHaveNames(page);
  }
  await page.getByRole("radio", { name: "Text" }).check();
  await page.locator("#arms details").evaluateAll((all) => all.forEach((details) => (details.open = true)));
  await ask(page);
  await ended(page);
  await controlsHaveNames(page);
  for (const view of ["experiments", "adapters"]) {
    await show(page, view);
    await controlsHaveNames(page);
  }
});

async function controlsHaveNames(page) {
  const session = await page.context().newCDPSession(page);
  const { nodes } = await session.send("Accessibility.getFullAXTree");
  const controls = nodes.filter((node) => !node.ignored && CONTROLS.has(node.role?.value));
  const nameless = controls.filter((node) => !node.name?.value.trim() && node.role.value !== "table");
  assert.ok(controls.length > 8, "the tree has been walked");
  assert.deepEqual(
    nameless.map((node) => [node.role.value, node.properties]),
    [],
  );
  const acting = controls
    .filter((node) => ["button", "textbox", "combobox", "spinbutton", "checkbox"].includes(node.role.value))
    .map((node) => `${node.role.value} ${node.name.value}`);
  assert.deepEqual(
    acting.filter((name, index) => acting.indexOf(name) !== index),
    [],
    "no two with one name",
  );
}

pageTest("a run and a vote need no mouse, and the focus is seen at each step", {}, async ({ page }) => {
  const tabTo = async (id) => {
    for (let steps = 0; steps < 60; steps++) {
      await page.keyboard.press("Tab");
      const focus = await page.evaluate(() => {
        const element = document.activeElement;
        // A radio shows it on the words beside it, a skip link by coming into view.
        const shown = element.type === "radio" ? element.nextElementSibling : element;
        const { outlineStyle, outlineWidth } = getComputedStyle(shown);
        return {
          id: element.id,
          tag: element.outerHTML.slice(0, 80),
          isSeen: outlineStyle !== "none" && outlineWidth !== "0px",
        };
      });
      assert.ok(focus.isSeen, focus.tag);
      if (focus.id === id) return;
    }
    assert.fail(`Tab does not reach #${id}`);
  };
  await tabTo("prompt-text");
  await page.keyboard.type("a list of squares");
  await page.keyboard.press("Control+Enter");
  await ended(page);
  assert.equal(await page.evaluate(() => document.activeElement.id), "answers");
  await page.keyboard.press("1");
  await page.locator("#status", { hasText: /^Your vote: A / }).waitFor();
  await page.keyboard.press("/");
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt-text");
  await page.keyboard.type("1 or 2");
  assert.equal(
    await page.locator("#prompt-text").inputValue(),
    "a list of squares1 or 2",
    "numbers in a text are text",
  );
  await tabTo("run");
  await page.keyboard.press("Enter");
  await ended(page);
  await tabTo("tie");
  await page.keyboard.press("Enter");
  await page.locator("#status", { hasText: "Your vote: a tie." }).waitFor();
});

const PHONE = { viewport: { width: 360, height: 720 }, hasTouch: true, isMobile: true };

pageTest("a phone shows one column and scrolls down only", { mock: {}, context: PHONE }, async ({ page }) => {
  const overflow = () =>
    page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  await page.locator("#arms details").evaluateAll((all) => all.forEach((details) => (details.open = true)));
  await ask(page, "x".repeat(400));
  await ended(page);
  const lefts = await columns(page).evaluateAll((items) => items.map((item) => item.getBoundingClientRect().left));
  assert.equal(new Set(lefts).size, 1, "one column");
  assert.equal(await overflow(), 0);
  for (const view of VIEWS) {
    await show(page, view);
    assert.equal(await overflow(), 0, view);
  }
});

for (const colorScheme of ["light", "dark"]) {
  pageTest(`text has enough contrast in ${colorScheme}`, { mock: {}, context: { colorScheme } }, async ({ page }) => {
    await page.locator("#arms details").evaluateAll((all) => all.forEach((details) => (details.open = true)));
    assert.deepEqual(await faintTexts(page), [], "empty");
    await ask(page);
    await ended(page);
    await page.keyboard.press("1");
    await page.getByText("Your vote: A base.").waitFor();
    assert.deepEqual(await faintTexts(page), [], "answers");
    for (const view of ["experiments", "adapters"]) {
      await show(page, view);
      assert.deepEqual(await faintTexts(page), [], view);
    }
  });
}

/** A button that has just become enabled is still on its way to its colours. */
async function faintTexts(page) {
  await page.evaluate(() => {
    const transitions = document.getAnimations().filter((animation) => animation instanceof CSSTransition);
    return Promise.allSettled(transitions.map((transition) => transition.finished)).then(() => {});
  });
  return page.evaluate(tooFaint);
}

/** In the page: texts of enabled elements whose contrast with what is behind them is under 4.5. */
function tooFaint() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", {
    willReadFrequently: true,
  });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes]
      .filter((node) => node.nodeType === 3)
      .map((node) => node.data)
      .join("")
      .trim();
    if (
      !text ||
      !element.checkVisibility({ visibilityProperty: true }) ||
      element.closest("svg, noscript, option, :disabled")
    )
      continue;
    const [a, b] = [rgba(getComputedStyle(element).color), behind(element)].map(luminance).sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) faint.push(`${contrast.toFixed(2)} ${element.tagName} ${text.slice(0, 40)}`);
  }
  return faint;
}

pageTest("dark follows the system until the user chooses", { context: { colorScheme: "dark" } }, async ({ page }) => {
  const brightness = () =>
    page.evaluate(() => {
      const canvas = document.createElement("canvas").getContext("2d");
      canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
      canvas.fillRect(0, 0, 1, 1);
      return canvas.getImageData(0, 0, 1, 1).data[0];
    });
  assert.ok((await brightness()) < 60, "dark, as the system says");
  await page.getByRole("button", { name: "Theme: auto" }).click();
  assert.ok((await brightness()) > 200, "light, as chosen");
  await page.reload();
  assert.ok((await brightness()) > 200, "and it stays so");
  await page.getByRole("button", { name: "Theme: light" }).click();
  await page.emulateMedia({ colorScheme: "light" });
  assert.ok((await brightness()) < 60, "dark, as chosen");
});

pageTest("a rerun while the focus is in a column does not throw it out", { mock: {} }, async ({ page, mock }) => {
  let release;
  mock.options.hold = new Promise((resolve) => (release = resolve));
  await ask(page);
  await page.waitForFunction(() => document.querySelectorAll("#columns > li[data-status=streaming]").length === 4);
  await page.locator("#columns [data-part=output]").nth(2).focus();
  release();
  await ended(page);
  assert.equal(await page.evaluate(() => document.activeElement.dataset.part), "output");
  assert.deepEqual((await names(page)).length, (await parts(page, "output")).length);
});
