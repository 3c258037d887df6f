// Elements without a framework.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. Functions become listeners, booleans and `value` properties, everything else attributes; what is
 * `undefined` or `null` is left out.
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (typeof value === "boolean" || name === "value") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Shows `message` in a banner, or hides it when there is none. */
export function banner(element, message, ...actions) {
  element.hidden = !message;
  element.replaceChildren(...(message ? [message, ...actions] : []));
}
