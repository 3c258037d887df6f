// The page's modules that need no page: the difference of two texts, and the reading of events.

import assert from "node:assert/strict";

import { pageTest } from "./page_test.mjs";

const diff = (page, before, after) =>
  page.evaluate(async ([before, after]) => (await import("/assets/diff.js")).diff(before, after), [before, after]);

pageTest("a change of one word marks that word", {}, async ({ page }) => {
  assert.deepEqual(await diff(page, "return total_sum + 1\n", "return total_count + 1\n"), [
    { kind: "same", text: "return " },
    { kind: "removed", text: "total_sum" },
    { kind: "added", text: "total_count" },
    { kind: "same", text: " + 1\n" },
  ]);
});

pageTest("a line that comes or goes takes its own indent with it", {}, async ({ page }) => {
  const [short, long] = ["if x:\n    a()\n    c()\n", "if x:\n    a()\n    b()\n    c()\n"];
  assert.deepEqual((await diff(page, long, short))[1], { kind: "removed", text: "    b()\n" });
  assert.deepEqual((await diff(page, short, long))[1], { kind: "added", text: "    b()\n" });
});

pageTest("a text that is another one altogether is marked as such", {}, async ({ page }) => {
  const before = "def f(items):\n    for item in items:\n        print(item)\n";
  const after = "print(*items, sep='\\n')\n";
  assert.deepEqual(await diff(page, before, after), [
    { kind: "removed", text: before },
    { kind: "added", text: after },
  ]);
});

pageTest("a chance match of a sign does not cut a change into crumbs", {}, async ({ page }) => {
  const pieces = await diff(page, "foo bar(baz)", "one two(six)");
  assert.deepEqual(
    pieces.map((piece) => piece.kind),
    ["removed", "added", "same"],
  );
});

pageTest("the pieces of any difference read as the one text or the other", {}, async ({ page }) => {
  const wrong = await page.evaluate(async () => {
    const { diff } = await import("/assets/diff.js");
    let seed = 7;
    const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
    const words = ["x", "foo", "1.5", " ", "    ", "\n", "\r\n", "(", "==", "é", "𝛼", "😀", "\t"];
    const text = () => Array.from({ length: random(40) }, () => words[random(words.length)]).join("");
    const wrong = [];
    for (let n = 0; n < 3000; n++) {
      const [before, after] = [text(), text()];
      const pieces = diff(before, after);
      const without = (kind) =>
        pieces
          .filter((piece) => piece.kind !== kind)
          .map((piece) => piece.text)
          .join("");
      if (without("added") !== before || without("removed") !== after) wrong.push([before, after]);
    }
    return wrong;
  });
  assert.deepEqual(wrong, []);
});

pageTest("texts too long for words are compared by lines", {}, async ({ page }) => {
  const lines = Array.from({ length: 1000 }, (_, n) => `line ${n} of many`);
  const before = ["a", ...lines, "z"].join("\n");
  const after = ["b", ...lines.with(500, "another"), "y"].join("\n");
  const pieces = await diff(page, before, after);
  assert.equal(pieces.filter((piece) => piece.kind === "removed").length, 3);
  assert.equal(
    pieces
      .filter((piece) => piece.kind !== "added")
      .map((piece) => piece.text)
      .join(""),
    before,
  );
});

pageTest("events read the same however the network cuts them", {}, async ({ page }) => {
  const results = await page.evaluate(async () => {
    const { events } = await import("/assets/api.js");
    const text =
      'data: {"a":1}\r\n\r\ndata:two\ndata: lines\n\n: a comment\nevent: x\ndata: {"é":"data: in"}\n\ndata: cut';
    const results = new Set();
    for (let size = 1; size <= text.length; size++) {
      const pieces = (async function* () {
        for (let at = 0; at < text.length; at += size) yield text.slice(at, at + size);
      })();
      const read = [];
      for await (const data of events(pieces)) read.push(data);
      results.add(JSON.stringify(read));
    }
    return [...results].map((read) => JSON.parse(read));
  });
  assert.deepEqual(results, [['{"a":1}', "two\nlines", '{"é":"data: in"}']]);
});

pageTest("requests are counted for each adapter over all ways to end", {}, async ({ page }) => {
  const counts = await page.evaluate(async () => {
    const { requestsByAdapter } = await import("/assets/adapters.js");
    return [
      ...requestsByAdapter(
        [
          "# TYPE lorry_requests_total counter",
          'lorry_requests_total{adapter="a",finish_reason="stop"} 3',
          'lorry_requests_total{adapter="a",finish_reason="length"} 4',
          'lorry_requests_total{finish_reason="stop",adapter="b-2"} 1',
          'lorry_tokens_total{kind="prompt"} 9',
        ].join("\n"),
      ),
    ];
  });
  assert.deepEqual(counts, [
    ["a", 7],
    ["b-2", 1],
  ]);
});
