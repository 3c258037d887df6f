// A real headless Chromium, and what a user does with the page in it.

import { chromium } from "playwright-core";

/** A running lorry to use instead of the mock. */
export const REAL = process.env.LORRY_URL;
/** For one step; generous, because a real server may be at work on a slow machine. */
export const TIMEOUT = REAL ? 180_000 : 20_000;

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export function launch() {
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
}

/** The page with its models loaded. */
export async function open(page, url) {
  await page.goto(url);
  await page.waitForFunction(
    () => document.querySelectorAll("#arms li").length > 1 || !document.getElementById("catalogue-error").hidden,
  );
}

/** Writes a prompt and runs it, as a user who has a keyboard does. */
export async function ask(page, prompt = "check if all elements in list `mylist` are the same") {
  await page.getByRole("textbox", { name: "Prompt", exact: true }).fill(prompt);
  await page.keyboard.press("Control+Enter");
}

/** Until the comparison has ended, in whatever way. */
export async function ended(page) {
  await page.waitForFunction(() => document.getElementById("stop-run").disabled);
}

export const columns = (page) => page.locator("#columns > li");

/** The texts of one part of each column, from left to right. */
export const parts = (page, name) => page.locator(`#columns [data-part=${name}]`).allTextContents();

export const names = (page) => page.locator("#columns h2").allTextContents();
