// Small helpers: elements whose texts are never markup, and numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

/** An element with attributes and children; a child that is no node becomes text. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) set(element, name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set an attribute if it differs; null or false removes it. */
export function set(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
}

/** Set the text if it differs, so that a screen reader does not read it again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A table with a header row; the first cell of each row is its heading. Cells are texts or nodes. */
export function fillTable(table, columns, rows) {
  const head = make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name))));
  const body = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell, i) => (i ? make("td", {}, cell) : make("th", { scope: "row" }, cell)))),
  );
  table.replaceChildren(head, make("tbody", {}, ...body));
}

const known = (value) => typeof value === "number" && Number.isFinite(value);

export function seconds(value) {
  if (!known(value)) return "–";
  if (Math.abs(value) >= 10) return `${value.toFixed(0)} s`;
  if (Math.abs(value) >= 1) return `${value.toFixed(1)} s`;
  if (value !== 0 && Math.abs(value) < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  return `${(value * 1e3).toFixed(0)} ms`;
}

export function bytes(value) {
  if (!known(value)) return "–";
  if (value >= 2 ** 30) return `${(value / 2 ** 30).toFixed(1)} GiB`;
  if (value >= 2 ** 20) return `${(value / 2 ** 20).toFixed(0)} MiB`;
  return `${(value / 2 ** 10).toFixed(0)} KiB`;
}

export function bitRate(bytesPerSecond) {
  if (!known(bytesPerSecond)) return "–";
  const bits = 8 * bytesPerSecond;
  return bits >= 1e9 ? `${(bits / 1e9).toFixed(1)} Gbit/s` : `${(bits / 1e6).toFixed(bits < 1e7 ? 1 : 0)} Mbit/s`;
}

export function percent(value, digits = 0) {
  return known(value) ? `${(100 * value).toFixed(digits)} %` : "–";
}

export function number(value, digits = 1) {
  return known(value) ? value.toFixed(digits) : "–";
}

export function age(now, moment) {
  if (!known(moment)) return "never";
  return now - moment < 1 ? "now" : `${seconds(now - moment)} ago`;
}

export function clock(moment) {
  return new Date(moment * 1e3).toLocaleTimeString([], { hour12: false });
}

/** Runs of consecutive blocks by name, such as "embed..layer.3, head". */
export function runs(indices, names) {
  const sorted = [...indices].sort((a, b) => a - b);
  const found = [];
  for (const index of sorted) {
    const last = found.at(-1);
    if (last && last[1] === index - 1) last[1] = index;
    else found.push([index, index]);
  }
  return found.map(([a, b]) => (a === b ? names[a] : `${names[a]}..${names[b]}`)).join(", ");
}
