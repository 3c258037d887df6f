// The arms to compare, each with its model, examples, strength and prompt format.

import { banner, byId, h } from "./dom.js";
import { catalogue } from "./catalogue.js";
import { armNames, options } from "./request.js";
import { MAX_ARMS, MIN_ARMS, newArm, saveSoon, state } from "./state.js";

const SELECTS = [
  ["fixed", "the first"],
  ["random", "random by seed"],
  ["bm25", "nearest to the prompt"],
];
const FORMATS = ["chat", "paper-v2", "paper-rev"];

/** The letter that stands for an arm everywhere on the page. */
export const letter = (index) => String.fromCharCode(65 + index);

export function setUpArms() {
  byId("add-arm").addEventListener("click", () => {
    const { arms } = state.setup;
    const { name, ...like } = arms.at(-1) ?? {};
    arms.push(newArm(like));
    changed();
    byId("arms").lastElementChild.querySelector("select").focus();
  });
  byId("arms").after(h("datalist", { id: "formats" }, ...FORMATS.map((value) => h("option", { value }))));
  showArms();
}

/** The question of the page: the base, the base with examples of the largest store, adapters. */
export function chooseFirstArms() {
  const { arms } = state.setup;
  if (arms.length > 0 || !catalogue.base) return;
  const [base, ...adapters] = catalogue.models.map((model) => model.id);
  const [store] = catalogue.stores.toSorted((a, b) => b.num_examples - a.num_examples);
  arms.push(newArm({ model: base }));
  if (store) arms.push(newArm({ model: base, store: store.name }));
  arms.push(...adapters.slice(0, 2).map((model) => newArm({ model })));
  while (arms.length < MIN_ARMS) arms.push(newArm({ model: base }));
}

/** Marks the arm that the server refused. */
export function showArmError(index, message) {
  const item = byId("arms").children[index];
  if (item) banner(item.querySelector(".banner"), message);
}

export function showArms() {
  const { arms } = state.setup;
  byId("add-arm").disabled = arms.length >= MAX_ARMS || !catalogue.base;
  const open = new Set([...document.querySelectorAll("#arms details[open]")].map((details) => details.dataset.key));
  byId("arms").replaceChildren(...arms.map((arm, index) => item(arm, index, open.has(String(arm.key)))));
  showNames();
}

function changed() {
  saveSoon();
  showArms();
}

/** What follows from an arm's settings, without touching the control that has the focus. */
function showNames() {
  const names = armNames(state.setup.arms);
  state.setup.arms.forEach((arm, index) => {
    const item = byId("arms").children[index];
    item.querySelector(".arm-name").placeholder = names[index];
    item.querySelector("summary span").textContent = options(arm);
    item.querySelector("[name=scale]").disabled = !catalogue.card(arm.model)?.adapter;
    item.querySelector("[name=k]").max = catalogue.store(arm.store)?.num_examples ?? "";
    for (const name of ["k", "select"]) item.querySelector(`[name=${name}]`).disabled = !arm.store;
  });
}

function item(arm, index, isOpen) {
  const { arms } = state.setup;
  const of = `arm ${letter(index)}`;
  const edit = (field, value) => {
    arm[field] = value;
    saveSoon();
    showNames();
  };
  const choose = (field, label, choices) => {
    const select = h(
      "select",
      { name: field, "aria-label": `${label}, ${of}`, change: (e) => edit(field, e.target.value) },
      ...choices,
    );
    select.value = arm[field];
    return select;
  };
  const number = (field, label, limits) =>
    h("input", {
      name: field,
      type: "number",
      "aria-label": `${label}, ${of}`,
      value: arm[field],
      input: (e) => Number.isFinite(e.target.valueAsNumber) && edit(field, e.target.valueAsNumber),
      ...limits,
    });

  return h(
    "li",
    { class: "arm" },
    h(
      "div",
      { class: "arm-head" },
      h("span", { class: "letter", "aria-hidden": "true" }, letter(index)),
      h("input", {
        class: "arm-name",
        "aria-label": `Name of ${of}`,
        spellcheck: "false",
        value: arm.name,
        input: (e) => edit("name", e.target.value),
      }),
      h(
        "button",
        {
          type: "button",
          class: "icon",
          "aria-label": `Remove ${of}`,
          title: arms.length > MIN_ARMS ? "Remove" : "A comparison has two arms at least",
          disabled: arms.length <= MIN_ARMS,
          click: () => {
            arms.splice(index, 1);
            changed();
            byId("add-arm").focus();
          },
        },
        "×",
      ),
    ),
    choose("model", "Model", modelOptions(arm)),
    h(
      "details",
      { "data-key": arm.key, open: isOpen },
      h("summary", { "aria-label": `Options of ${of}` }, h("span")),
      h(
        "div",
        { class: "arm-options" },
        field("Examples", choose("store", "Examples", storeOptions(arm))),
        field("How many", number("k", "Number of examples", { min: 1, step: 1 })),
        field(
          "Which",
          choose(
            "select",
            "Choice of examples",
            SELECTS.map(([value, label]) => h("option", { value }, label)),
          ),
        ),
        field("Strength", number("scale", "Strength of the adapter", { min: 0, max: 4, step: 0.05 })),
        field(
          "Prompt format",
          h("input", {
            name: "format",
            list: "formats",
            placeholder: "the model’s own",
            "aria-label": `Prompt format, ${of}`,
            spellcheck: "false",
            value: arm.format,
            input: (e) => edit("format", e.target.value.trim()),
          }),
        ),
      ),
    ),
    h("p", { class: "banner", role: "alert", hidden: true }),
  );
}

/** Controls have a full name for who hears them; this label is for who sees them. */
function field(label, control) {
  return h("div", { class: "field" }, h("span", { "aria-hidden": "true" }, label), control);
}

function modelOptions(arm) {
  const [base, ...adapters] = catalogue.models.map(({ id }) => h("option", { value: id }, id));
  return [
    base && h("optgroup", { label: "Base" }, base),
    adapters.length > 0 ? h("optgroup", { label: "Adapters" }, ...adapters) : null,
    unavailable(
      arm.model,
      catalogue.models.map((model) => model.id),
    ),
  ];
}

function storeOptions(arm) {
  return [
    h("option", { value: "" }, "none"),
    ...catalogue.stores.map(({ name, num_examples }) => h("option", { value: name }, `${name} (${num_examples})`)),
    unavailable(
      arm.store,
      catalogue.stores.map((store) => store.name),
    ),
  ];
}

/** What was chosen once stays chosen, though the server does not offer it now. */
function unavailable(chosen, offered) {
  return chosen && !offered.includes(chosen) ? h("option", { value: chosen }, `${chosen} (not offered)`) : null;
}
