// Elements by id and from scratch. Nothing here, or anywhere in the page, turns a string into markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An HTML element; attributes that are null or false are left out. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** A figure with a fixed number of decimals and a true minus sign; "–" for what JSON writes as null. */
export function figure(value, decimals = 2) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(decimals);
  return Number(text) < 0 ? text.replace("-", "−") : text.replace("-", "");
}
